"""launch/sft.py in which one process of several comes to grief, to be started by a launcher.

    torchrun --nproc_per_node 2 tests/runs/troubled.py TROUBLE:RANK:STEP [RECIPE] [--section.key value ...]

In step STEP, the first being 0, unless the launcher has started it again; it leaves the time in the file
$TROUBLE_FOLDER/TROUBLE. "elsewhere" has a process write to another output folder than the others,
"differs" has it train with another learning rate.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from gpt2ft.settings.recipes import RECIPES


def sleeps():
    time.sleep(1e6)


def freezes():
    os.kill(os.getpid(), signal.SIGSTOP)


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def fails():
    raise OSError("no space left on any device")


TROUBLES = {work.__name__: work for work in (sleeps, freezes, dies, fails)}


def in_step(number, trouble):
    from gpt2ft.training import fit

    steps, whole = [], fit.loss_scale

    def loss_scale(*arguments):
        steps.append(None)
        if len(steps) == number + 1:
            (Path(os.environ["TROUBLE_FOLDER"]) / trouble.__name__).write_text(str(time.time()))
            trouble()
        return whole(*arguments)

    fit.loss_scale = loss_scale


if __name__ == "__main__":
    name, rank, step = sys.argv.pop(1).split(":")
    if os.environ["RANK"] == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        if name == "elsewhere":
            sys.argv[sys.argv.index("--output") + 1] += " of another"
        elif name == "differs":
            sys.argv += ["--optimizer.learning_rate", "0.5"]
        elif name in TROUBLES:
            in_step(int(step), TROUBLES[name])
    sys.argv[0] = str(RECIPES.parent / "sft.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
