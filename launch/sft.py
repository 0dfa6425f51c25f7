"""Supervised fine-tuning: accelerate launch launch/sft.py [RECIPE] [--section.key value ...]"""

import sys

from gpt2ft.__main__ import run_script

if __name__ == "__main__":
    run_script("sft", sys.argv[1:])
