"""Tuning on preferences: accelerate launch launch/dpo.py [RECIPE] [--section.key value ...]"""

import sys

from gpt2ft.__main__ import run_script

if __name__ == "__main__":
    run_script("dpo", sys.argv[1:])
