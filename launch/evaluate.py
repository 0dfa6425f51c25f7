"""Scores a model: python launch/evaluate.py [MODEL] --data SOURCE ..."""

import sys

from gpt2ft.settings.parsing import parse_script
from gpt2ft.settings.scripts import EvaluateSettings

if __name__ == "__main__":
    settings = parse_script(EvaluateSettings, "model", sys.argv[1:])
    from gpt2ft.runs import evaluate_model, main

    main.run(evaluate_model.run, settings)
