"""Start a script by its name, where the package is installed without launch/, which holds a file for each.

gpt2ft sft [RECIPE] ...                     one process
accelerate launch -m gpt2ft sft [RECIPE] ...
"""

import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Sequence
from typing import NamedTuple

from gpt2ft.errors import fail
from gpt2ft.settings.parsing import end_with, parse_recipe, parse_script
from gpt2ft.settings.sections import Section
from gpt2ft.text.display import outlive_readers


class Script(NamedTuple):
    """One script.

    Attributes:
        kind: of its settings, in gpt2ft.settings; it is imported for this script alone.
        purpose: of the script, for its help.
        module: in gpt2ft.runs; it is imported once the settings are known to be sound.
        recipe: the default; None for scripts without recipes.
        positional: the setting that the first argument gives without its name, in scripts without recipes.
    """

    kind: str
    purpose: str
    module: str
    recipe: str | None = None
    positional: str = "model"

    @property
    def settings(self) -> type[Section]:
        return pkgutil.resolve_name(f"gpt2ft.settings.{self.kind}")


SCRIPTS = {
    "sft": Script(
        "scripts:SFTSettings",
        "Fine-tunes GPT-2 on conversations, all weights or LoRA.",
        "train_sft",
        recipe="quickstart",
    ),
    "reference": Script(
        "scripts:ReferenceSettings",
        "Computes the reference log-probs of a preference recipe, which dpo then finds; it trains nothing.",
        "compute_reference",
        recipe="quickstart-dpo",
    ),
    "dpo": Script(
        "scripts:DPOSettings",
        "Tunes a chat model on preferences, against the log-probs that reference has computed, or computes them first.",
        "train_dpo",
        recipe="quickstart-dpo",
    ),
    "evaluate": Script(
        "measuring:EvaluateSettings",
        "Scores models on held-out data, and compares them with the first: loss, replies, preferences, forgetting.",
        "evaluate_model",
    ),
    "sample": Script(
        "measuring:SampleSettings",
        "Makes preferences without a judge: samples replies to prompts and ranks them by faults that can be checked.",
        "sample_replies",
    ),
    "chat": Script("using:ChatSettings", "Talks with a model in the terminal, or answers each line of a pipe.", "chat"),
    "serve": Script(
        "using:ServeSettings",
        "Serves a model to programs that speak OpenAI's API, and a page to talk with it in a browser. Settings of "
        "replies hold where a request says nothing else.",
        "serve",
    ),
    "export": Script(
        "using:ExportSettings",
        "Writes a model for other programs, reads it back and compares it with the model.",
        "export",
    ),
    "verify": Script(
        "measuring:VerifySettings",
        "Checks a finished run and writes its certificate; tells whether a model is that of a certificate; compares "
        "two runs. PATHS is a run; a certificate and a model; or two runs; default the newest finished run in runs/.",
        "verify",
        positional="paths",
    ),
    "benchmark": Script(
        "measuring:BenchmarkSettings",
        "Measures speed and memory, beside the usual way with --against. WHAT is sft, dpo, reference or generate.",
        "benchmark",
        positional="what",
    ),
}


def run_script(name: str, arguments: Sequence[str]) -> None:
    """Read the settings of a script, then run it; exit with a sentence and a code if either fails."""
    outlive_readers()
    script = SCRIPTS[name]
    if "--version" in arguments:
        end_with(f"gpt2ft {importlib.metadata.version('gpt2ft')}")
    try:
        if script.recipe is not None:
            settings = parse_recipe(script.settings, script.recipe, arguments, script.purpose)
        else:
            settings = parse_script(script.settings, script.positional, arguments, script.purpose)
        from gpt2ft.runs import main

        work = importlib.import_module(f"gpt2ft.runs.{script.module}").run
    except KeyboardInterrupt:  # PyTorch takes seconds to load
        fail("by Ctrl-C", code=130, label="stopped")
    main.run(work, settings)


def main() -> None:
    """Run the script that the first word of the command line names."""
    outlive_readers()
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        run_script("sft", words)
    elif words[:1] in ([], ["-h"], ["--help"]):
        from gpt2ft.settings.help import overview

        end_with(overview({name: script.purpose for name, script in SCRIPTS.items()}))
    elif words[0] in SCRIPTS:
        run_script(words[0], words[1:])
    else:
        from gpt2ft.settings.suggestions import nearest_name

        meant = nearest_name(words[0], SCRIPTS)
        fail(f"there is no script {words[0]!r}{meant}; there are: {', '.join(SCRIPTS)}")


if __name__ == "__main__":
    main()
