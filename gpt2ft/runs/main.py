"""End every script well, or with one clear sentence and an exit code that is not 0."""

import sys
from collections.abc import Callable
from typing import Any

from gpt2ft.command_line import same_command
from gpt2ft.errors import Gpt2ftError, fail


def run(work: Callable[[Any], None], settings: Any) -> None:
    """Run `work`, and turn the failures a person can do something about into a sentence.

    Exit codes: 2 for settings, data and model folders; 1 for what happens while running; 75 for a run that was
    told to stop and has saved (SIGTERM, SIGUSR1, Ctrl-C); 69 for one of several processes where another is lost or
    stands still; 130 for Ctrl-C at any other time.
    """
    try:
        work(settings)
    except Gpt2ftError as error:
        how = _how_to_resume(settings) if error.can_resume else ""
        fail(f"{error}{how}", error.exit_code, error.on_every_rank, error.label)
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        fail(f"{told}{_how_to_resume(settings)}", code=1, everywhere=True)
    except KeyboardInterrupt:
        fail(f"by Ctrl-C{_how_to_resume(settings)}", code=130, label="stopped")
    except _out_of_memory() as error:
        first = str(error).splitlines()[0]
        fail(
            f"{first} Halve the tokens per micro-batch and double the micro-batches per step: a step keeps its size",
            code=1,
            everywhere=True,
        )


def _how_to_resume(settings: Any) -> str:
    """Return the command that continues a training run; nothing for one that was told not to, and other scripts."""
    if getattr(settings, "resume", None) != "auto":
        return ""
    return f"; `{same_command()}` continues from the newest checkpoint, if there is one"


def _out_of_memory() -> tuple[type[BaseException], ...]:
    """Return torch's error, or nothing to catch in a process that has not loaded torch."""
    torch = sys.modules.get("torch")
    return (torch.OutOfMemoryError,) if torch else ()
