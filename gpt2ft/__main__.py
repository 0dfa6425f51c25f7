"""Start a script by its name, where the package is installed without launch/, which holds a file for each.

gpt2ft sft [RECIPE] ...                     one process
accelerate launch -m gpt2ft sft [RECIPE] ...
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from gpt2ft.errors import fail
from gpt2ft.settings.parsing import nearest_name, parse_recipe, parse_script
from gpt2ft.settings.scripts import (
    BenchmarkSettings,
    ChatSettings,
    DPOSettings,
    EvaluateSettings,
    ExportSettings,
    ServeSettings,
    SFTSettings,
)
from gpt2ft.settings.sections import Section


class Script(NamedTuple):
    """One script.

    Attributes:
        module: in gpt2ft.runs; it is imported once the settings are known to be sound.
        recipe: the default; None for scripts without recipes.
        positional: the setting that the first argument gives without its name, in scripts without recipes.
    """

    settings: type[Section]
    module: str
    recipe: str | None = None
    positional: str = "model"


SCRIPTS = {
    "sft": Script(SFTSettings, "train_sft", recipe="quickstart"),
    "reference": Script(DPOSettings, "compute_reference", recipe="quickstart-dpo"),
    "dpo": Script(DPOSettings, "train_dpo", recipe="quickstart-dpo"),
    "evaluate": Script(EvaluateSettings, "evaluate_model"),
    "chat": Script(ChatSettings, "chat"),
    "serve": Script(ServeSettings, "serve"),
    "export": Script(ExportSettings, "export"),
    "benchmark": Script(BenchmarkSettings, "benchmark", positional="what"),
}


def run_script(name: str, arguments: Sequence[str]) -> None:
    """Read the settings of a script, then run it; exit with a sentence and a code if either fails."""
    script = SCRIPTS[name]
    if script.recipe is not None:
        settings = parse_recipe(script.settings, script.recipe, arguments)
    else:
        settings = parse_script(script.settings, script.positional, arguments)
    from gpt2ft.runs import main

    main.run(importlib.import_module(f"gpt2ft.runs.{script.module}").run, settings)


def main() -> None:
    """Run the script that the first word of the command line names."""
    words = sys.argv[1:]
    if words[:1] in ([], ["-h"], ["--help"]):
        print(f"usage: gpt2ft {{{','.join(SCRIPTS)}}} ...\n\n`gpt2ft SCRIPT --help` lists the settings of a script.")
    elif words[0] in SCRIPTS:
        run_script(words[0], words[1:])
    else:
        meant = nearest_name(words[0], list(SCRIPTS))
        fail(f"there is no script {words[0]!r}{meant}; there are: {', '.join(SCRIPTS)}")


if __name__ == "__main__":
    main()
