"""Reference log-probs for DPO, offline: accelerate launch launch/reference.py [RECIPE] [--section.key value ...]"""

import sys

from gpt2ft.__main__ import run_script

if __name__ == "__main__":
    run_script("reference", sys.argv[1:])
