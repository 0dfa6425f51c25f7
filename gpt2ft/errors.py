"""End a script that cannot go on with one clear sentence and an exit code that is not 0.

Errors that a user can act on derive from `Gpt2ftError`, where they are raised, and bring their exit code with them.
Nothing else is turned into a sentence: a traceback is a mistake of ours.
"""

import os
import sys
import time
from typing import ClassVar, NoReturn

SECONDS_TO_REPORT = 5.0  # until the process that reports errors has met the same one


class Gpt2ftError(Exception):
    """An error that ends a script with its message, one line per problem, and without a traceback.

    Attributes:
        exit_code: of the script: 2 for what has to be mended first, 1 for what happens while running.
        on_every_rank: every process reports it, because the cause may lie in one alone; otherwise one per machine.
        can_resume: the same command continues a training run from its newest checkpoint.
        label: first word of each line: being told to stop is no error.
    """

    exit_code: ClassVar[int] = 2
    on_every_rank: ClassVar[bool] = False
    can_resume: ClassVar[bool] = False
    label: ClassVar[str] = "error"


class SettingsError(Gpt2ftError):
    """Settings that cannot be used."""


class NetworkError(Gpt2ftError):
    """A file that is in no cache and could not be downloaded."""


def reason(error: Exception) -> str:
    """Return why something failed, without the path that the sentence around it names already."""
    if isinstance(error, UnicodeError):
        return "it is no text in UTF-8"
    of_system = [cause.strerror for cause in (error, error.__cause__) if isinstance(cause, OSError) and cause.strerror]
    return of_system[0] if of_system else " ".join(str(error).split())


def is_first_on_machine() -> bool:
    """Return True in the first process on each machine, which alone reports what all have met."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def fail(message: str, code: int = 2, everywhere: bool = False, label: str = "error") -> NoReturn:
    """End the program with a message on stderr and an exit code.

    Args:
        everywhere: from every process; otherwise once on each machine.
        label: first word of each line.
    """
    rank = os.environ.get("RANK", "0")
    label = f"{label} on rank {rank}" if everywhere and rank != "0" else label
    if everywhere or is_first_on_machine():
        print("\n".join(f"{label}: {line}" for line in message.splitlines()), file=sys.stderr)
    elif "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends all processes as soon as one is gone
        time.sleep(SECONDS_TO_REPORT)
    sys.exit(code)
