"""Reference log-probs for DPO, offline: accelerate launch launch/reference.py [RECIPE] [--section.key value ...]"""

import sys

from gpt2ft.settings import DPOSettings, parse_recipe

if __name__ == "__main__":
    settings = parse_recipe(DPOSettings, "quickstart-dpo", sys.argv[1:])
    from gpt2ft.runs import main, reference

    main.run(reference.run, settings)
