"""Being told to stop: by Ctrl-C, by `docker stop`, by Slurm or by a spot machine that is taken away.

SIGTERM, SIGUSR1 or SIGINT on any process ask all of them to finish the step under way, to save and to end. The same
signal may arrive several times, as launchers send it again. A second Ctrl-C, or a SIGTERM more than five seconds after
the first signal, ends the process at once.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from gpt2ft.settings import speaks_for_its_machine

EXIT_CODE = 75  # of a run that was told to stop and has saved: EX_TEMPFAIL, "try again later"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECONDS_OF_PATIENCE = 5.0
_PR_SET_PDEATHSIG = 1


class ToldToStop(RuntimeError):
    """The run has ended early because it was told to, and its last step is saved."""


class Interruption:
    """Whether this process was told to stop, and since when.

    Attributes:
        signal: the first that arrived, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Until it ends, signals are noted instead of ending the process."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
            if speaks_for_its_machine():
                name = self.signal.name
                os.write(2, f"\n{name}: finishing this step and saving; again to end at once\n".encode())
            return
        is_late = time.monotonic() - self._since > SECONDS_OF_PATIENCE
        if (number == signal.SIGINT == self.signal) or (number == signal.SIGTERM and is_late):
            os._exit(128 + number)


def end_with_parent() -> None:
    """Has the kernel send SIGTERM when the parent dies, for launchers that do not pass it on. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
