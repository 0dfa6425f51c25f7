"""Checks a finished run, a model against its certificate, or compares two runs: python launch/verify.py [RUN]"""

import sys

from gpt2ft.__main__ import run_script

if __name__ == "__main__":
    run_script("verify", sys.argv[1:])
