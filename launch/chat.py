"""Talks with a model: python launch/chat.py [MODEL] [--temperature 0.7 ...]"""

import sys

from gpt2ft.__main__ import run_script

if __name__ == "__main__":
    run_script("chat", sys.argv[1:])
