"""Measures training speed: accelerate launch launch/benchmark.py sft [--model gpt2-medium ...]"""

import sys

from gpt2ft.__main__ import run_script

if __name__ == "__main__":
    run_script("benchmark", sys.argv[1:])
