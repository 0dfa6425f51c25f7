"""What a run says of itself in its manifest.json."""

import importlib.metadata
import os
import platform
import sys


def versions() -> dict[str, str]:
    names = ["gpt2ft", "torch", "accelerate", "tiktoken", "datasets", "safetensors"]
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version()} | found


def command() -> str:
    return " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
