"""Serves a model: python launch/serve.py [MODEL] [--port 8000 ...]"""

import sys

from gpt2ft.__main__ import run_script

if __name__ == "__main__":
    run_script("serve", sys.argv[1:])
