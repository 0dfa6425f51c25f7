"""Makes preferences without a judge: python launch/sample.py [MODEL] --data PROMPTS --output pairs.jsonl"""

import sys

from gpt2ft.__main__ import run_script

if __name__ == "__main__":
    run_script("sample", sys.argv[1:])
