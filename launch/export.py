"""Writes a model as others read it: python launch/export.py [MODEL] --format hf|adapter|gguf --output FOLDER"""

import sys

from gpt2ft.__main__ import run_script

if __name__ == "__main__":
    run_script("export", sys.argv[1:])
