"""Scores a model: python launch/evaluate.py [MODEL] --data SOURCE ..."""

import sys

from gpt2ft.__main__ import run_script

if __name__ == "__main__":
    run_script("evaluate", sys.argv[1:])
