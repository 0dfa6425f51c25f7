"""Tuning on preferences: accelerate launch launch/dpo.py [RECIPE] [--section.key value ...]"""

import sys

from gpt2ft.settings.parsing import parse_recipe
from gpt2ft.settings.scripts import DPOSettings

if __name__ == "__main__":
    settings = parse_recipe(DPOSettings, "quickstart-dpo", sys.argv[1:])
    from gpt2ft.runs import main, train_dpo

    main.run(train_dpo.run, settings)
