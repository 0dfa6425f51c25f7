"""Scores a model: python launch/evaluate.py [MODEL] --data SOURCE ..."""

import sys

from gpt2ft.settings import EvaluateSettings, parse_script

if __name__ == "__main__":
    settings = parse_script(EvaluateSettings, "model", sys.argv[1:])
    from gpt2ft.runs import evaluate, main

    main.run(evaluate.run, settings)
