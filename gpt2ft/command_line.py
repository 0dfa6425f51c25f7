"""The command line that started this process, as a person would type it again.

A clone has launch/sft.py and its like; an installed package has `gpt2ft sft`, and `-m gpt2ft sft` for launchers.
"""

import os
import shlex
import sys
from pathlib import Path

LAUNCHERS = {"accelerate": "accelerate", "accelerate-launch": "accelerate-launch", "torchrun": "torchrun"} | {
    "accelerate.commands.launch": "accelerate-launch",
    "torch.distributed.run": "torchrun",
}


def is_from_launch() -> bool:
    """Tell scripts in a folder named launch from the installed package."""
    return Path(sys.argv[0]).parent.name == "launch"


def running_script() -> str:
    """The running script as `python`, `torchrun` and `accelerate launch` take it: a path, or a module and a name."""
    return sys.argv[0] if is_from_launch() else " ".join(["-m", "gpt2ft", *sys.argv[1:2]])


def running_command() -> str:
    """The running script with its arguments, as launchers take it."""
    return " ".join([running_script(), *_quoted_arguments()])


def same_command() -> str:
    """The command that started this process: its launcher's, where one did."""
    import psutil  # not installed where models are only served

    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        words = []
    for number, word in enumerate(words):
        if launcher := LAUNCHERS.get(os.path.basename(word)):
            return shlex.join([launcher, *words[number + 1 :]])
    script = ["python", sys.argv[0]] if is_from_launch() else ["gpt2ft", *sys.argv[1:2]]
    return " ".join([*map(shlex.quote, script), *_quoted_arguments()])


def _quoted_arguments() -> list[str]:
    return [shlex.quote(word) for word in sys.argv[1 if is_from_launch() else 2 :]]


def program_name() -> str:
    """The running script in its own help."""
    return Path(sys.argv[0]).name if is_from_launch() else " ".join(["gpt2ft", *sys.argv[1:2]])


def words_to_start(script: str) -> list[str]:
    """The first words of a command that starts another script, such as `chat`."""
    return ["python", f"launch/{script}.py"] if is_from_launch() else ["gpt2ft", script]


def full_command() -> str:
    """The whole command line, without the path of the script."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
