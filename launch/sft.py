"""Supervised fine-tuning: accelerate launch launch/sft.py [RECIPE] [--section.key value ...]"""

import sys

from gpt2ft.settings.parsing import parse_recipe
from gpt2ft.settings.scripts import SFTSettings

if __name__ == "__main__":
    settings = parse_recipe(SFTSettings, "quickstart", sys.argv[1:])
    from gpt2ft.runs import main, train_sft

    main.run(train_sft.run, settings)
