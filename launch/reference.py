"""Reference log-probs for DPO, offline: accelerate launch launch/reference.py [RECIPE] [--section.key value ...]"""

import sys

from gpt2ft.settings.parsing import parse_recipe
from gpt2ft.settings.scripts import DPOSettings

if __name__ == "__main__":
    settings = parse_recipe(DPOSettings, "quickstart-dpo", sys.argv[1:])
    from gpt2ft.runs import compute_reference, main

    main.run(compute_reference.run, settings)
