"""Fine-tunes GPT-2 into a chat model. The Python interface is described in gpt2ft/api.py; importing this loads nothing.

import gpt2ft

model = gpt2ft.load("runs/quickstart")
session = gpt2ft.open_session(model)
"""

from typing import Any

__all__ = ["load", "open_session", "reply_log_probs", "tokenise"]


def __getattr__(name: str) -> Any:
    """Load the interface, and PyTorch with it, once it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'gpt2ft' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("gpt2ft.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
