"""Measures training speed: accelerate launch launch/benchmark.py sft [--model gpt2-medium ...]"""

import sys

from gpt2ft.settings import BenchmarkSettings, parse_script

if __name__ == "__main__":
    settings = parse_script(BenchmarkSettings, "what", sys.argv[1:])
    from gpt2ft.runs import benchmark, main

    main.run(benchmark.run, settings)
