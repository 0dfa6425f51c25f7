"""How a script ends that cannot go on: one clear sentence, and an exit code that is not 0."""

import os
import sys
import time
from typing import NoReturn

SECONDS_TO_SPEAK = 5.0  # left to the process that reports errors to come upon the same one


class SettingsError(Exception):
    """Settings that cannot be used; one line per problem."""


def speaks_for_its_machine() -> bool:
    """Whether this process is the one that reports errors: the first on each machine, as the launcher numbers them."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def fail(message: str, code: int = 2, everywhere: bool = False) -> NoReturn:
    """Ends the program with a message on stderr and an exit code.

    Args:
        everywhere: from every process, where the cause may lie in one alone; otherwise once on each machine.
    """
    rank = os.environ.get("RANK", "0")
    label = f"error on rank {rank}" if everywhere and rank != "0" else "error"
    if everywhere or speaks_for_its_machine():
        print("\n".join(f"{label}: {line}" for line in message.splitlines()), file=sys.stderr)
    elif "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends all processes as soon as one is gone
        time.sleep(SECONDS_TO_SPEAK)
    sys.exit(code)
