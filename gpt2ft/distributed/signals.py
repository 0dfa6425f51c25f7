"""Being told to stop: by Ctrl-C, by `docker stop`, by Slurm or by a spot machine that is taken away.

SIGTERM, SIGUSR1 or SIGINT on any process ask all of them to finish the step under way, to save and to end. A second
Ctrl-C ends the process at once, and so does a SIGTERM more than five seconds after the first signal: launchers send
again what they were sent, which must do no harm.

Python looks at signals between its own instructions only, and one call into the backward pass may take a minute. So a
thread is told of each signal by the C handler itself.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, Thread

from gpt2ft.errors import Gpt2ftError, speaks_for_its_machine

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
SECONDS_OF_PATIENCE = 5.0
_PR_SET_PDEATHSIG = 1
_END = 0  # no signal has this number


class Preempted(Gpt2ftError):
    """The run has ended early because it was told to, and its last step is saved."""

    exit_code = 75  # EX_TEMPFAIL, "try again later"
    can_resume = True


class SignalHandler:
    """Whether this process was told to stop, and since when.

    Attributes:
        signal: the first that arrived, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._lock = RLock()

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Until it ends, signals are noted instead of ending the process."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        watcher = Thread(target=self._watch, args=(reader,), name="signals", daemon=True)
        watcher.start()
        before = {number: signal.signal(number, lambda number, _: self._note(number)) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
            os.write(writer, bytes([_END]))
            watcher.join()
            os.close(reader)
            os.close(writer)

    def _watch(self, reader: int) -> None:
        """In a thread: the first of our signals is noted, whatever the main thread is doing; a later one may end it."""
        is_first = True
        while (number := os.read(reader, 1)[0]) != _END:
            if number in SIGNALS and is_first:
                self._note(number)
                is_first = False
            elif number in SIGNALS:
                self._end_if_meant(number)

    def _note(self, number: int) -> None:
        with self._lock:
            if self.signal is not None:
                return
            self._since = time.monotonic()
            self.signal = signal.Signals(number)
        if speaks_for_its_machine():
            os.write(2, f"\n{self.signal.name}: finishing this step and saving; Ctrl-C to end at once\n".encode())

    def _end_if_meant(self, number: int) -> None:
        is_late = time.monotonic() - self._since > SECONDS_OF_PATIENCE
        by_hand = number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ  # torchrun sends it once more
        if by_hand or (is_late and number in (signal.SIGINT, signal.SIGTERM)):
            os._exit(128 + number)


def end_with_parent() -> None:
    """Has the kernel send SIGTERM when the parent dies, for launchers that do not pass it on. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
