"""Measures training speed: accelerate launch launch/benchmark.py sft [--model gpt2-medium ...]"""

import sys

from gpt2ft.settings.parsing import parse_script
from gpt2ft.settings.scripts import BenchmarkSettings

if __name__ == "__main__":
    settings = parse_script(BenchmarkSettings, "what", sys.argv[1:])
    from gpt2ft.runs import benchmark, main

    main.run(benchmark.run, settings)
