"""How every script ends: with what it did, or with one clear sentence and a code that is not 0."""

from collections.abc import Callable
from typing import Any

from gpt2ft.errors import SettingsError, fail


def run(work: Callable[[Any], None], settings: Any) -> None:
    """Runs `work`, and turns the failures a person can do something about into a sentence.

    Exit codes: 2 for settings, data and model folders; 1 for what happens while running; 75 for a run that was
    told to stop and has saved (SIGTERM, SIGUSR1, Ctrl-C); 69 for one of several processes where another is lost or
    stands still; 130 for Ctrl-C at any other time.
    """
    import torch

    from gpt2ft.checkpoint import CheckpointError
    from gpt2ft.data.reading import DataError
    from gpt2ft.distributed import watchdog
    from gpt2ft.distributed.accelerator import LaunchError
    from gpt2ft.distributed.signals import EXIT_CODE, Preempted
    from gpt2ft.model.pretrained import ModelError
    from gpt2ft.training.fit import TrainingDiverged
    from gpt2ft.training.memory_probe import DoesNotFit
    from gpt2ft.training.preflight import PreflightError
    from gpt2ft.training.reference_store import ReferenceLogProbError

    resumes = getattr(settings, "resume", None) == "auto"
    again = "; the same command continues from the newest checkpoint" if resumes else ""
    try:
        with watchdog.until_the_end():
            work(settings)
    except (
        SettingsError,
        DataError,
        ModelError,
        ConnectionError,
        LaunchError,
        CheckpointError,
        PreflightError,
        ReferenceLogProbError,
    ) as error:
        fail(str(error))
    except Preempted as error:
        fail(f"{error}{again}", code=EXIT_CODE)
    except TrainingDiverged as error:
        fail(str(error), code=1)
    except DoesNotFit as error:
        fail(str(error), code=1, everywhere=True)
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        fail(
            f"{first} Halve the tokens per micro-batch and double the micro-batches per step: a step keeps its size",
            code=1,
            everywhere=True,
        )
    except OSError as error:
        fail(f"{error}{again}", code=1, everywhere=True)
    except KeyboardInterrupt:
        fail(f"interrupted{again}", code=130)
