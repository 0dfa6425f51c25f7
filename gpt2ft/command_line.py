"""The command line that started this process, as a person would type it again.

A clone has launch/sft.py and its like; an installed package has `gpt2ft sft`, and `-m gpt2ft sft` for launchers.
"""

import sys
from pathlib import Path


def is_from_launch() -> bool:
    """Tell scripts in a folder named launch from the installed package."""
    return Path(sys.argv[0]).parent.name == "launch"


def running_script() -> str:
    """The running script as `python`, `torchrun` and `accelerate launch` take it: a path, or a module and a name."""
    return sys.argv[0] if is_from_launch() else " ".join(["-m", "gpt2ft", *sys.argv[1:2]])


def program_name() -> str:
    """The running script in its own help."""
    return Path(sys.argv[0]).name if is_from_launch() else " ".join(["gpt2ft", *sys.argv[1:2]])


def words_to_start(script: str) -> list[str]:
    """The first words of a command that starts another script, such as `chat`."""
    return ["python", f"launch/{script}.py"] if is_from_launch() else ["gpt2ft", script]


def full_command() -> str:
    """The whole command line, without the path of the script."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
