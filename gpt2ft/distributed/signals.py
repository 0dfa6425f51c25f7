"""Note signals that ask a run to stop: from Ctrl-C, `docker stop`, Slurm or a spot machine that is taken away.

SIGTERM, SIGUSR1 or SIGINT on any process has all of them finish the step under way, save and end. A second Ctrl-C ends
the process at once, and so does a SIGTERM more than five seconds after the first signal. Sooner it does no harm:
launchers send a signal again that they were sent themselves.

Python handles signals between its own instructions only, and one call into the backward pass may take a minute. So a
thread learns of each signal from the C handler, through a socket.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, Thread

from gpt2ft.errors import Gpt2ftError, is_first_on_machine
from gpt2ft.system import STOP_SIGNALS

SECONDS_OF_REPETITION = 5.0  # after the first signal, in which another SIGTERM may be the launcher's repetition
_END = 0  # no signal has this number


class Preempted(Gpt2ftError):
    """The early end of a run that was told to stop and has saved its last step."""

    exit_code = 75  # EX_TEMPFAIL, "try again later"
    can_resume = True
    label = "stopped"


class SignalHandler:
    """The signal that has told this process to stop, if one has.

    Attributes:
        received: the first that arrived, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._lock = RLock()  # another signal may interrupt a handler that holds it

    def was_signalled(self) -> bool:
        return self.received is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals in the block instead of letting them end the process."""
        reader, writer = socket.socketpair()  # of which Python can wake one up on Windows too
        writer.setblocking(False)
        watcher = Thread(target=self._watch, args=(reader,), name="signals", daemon=True)
        watcher.start()
        before = {number: signal.signal(number, lambda number, _: self._note(number)) for number in STOP_SIGNALS}
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
            writer.send(bytes([_END]))
            watcher.join()
            reader.close()
            writer.close()

    def _watch(self, reader: socket.socket) -> None:
        """In a thread, note the first signal, whatever the main thread is doing; a later one may end the process."""
        is_first = True
        while (number := reader.recv(1)[0]) != _END:
            if number in STOP_SIGNALS and is_first:
                self._note(number)
                is_first = False
            elif number in STOP_SIGNALS:
                self._end_unless_repeated(number)

    def _note(self, number: int) -> None:
        with self._lock:
            if self.received is not None:
                return
            self._since = time.monotonic()
            self.received = signal.Signals(number)
        if is_first_on_machine():
            os.write(2, f"\n{self.received.name}: finishing this step and saving; Ctrl-C to end at once\n".encode())

    def _end_unless_repeated(self, number: int) -> None:
        """End the process at a second Ctrl-C, or at a signal that no launcher has merely sent again."""
        is_late = time.monotonic() - self._since > SECONDS_OF_REPETITION
        by_hand = number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ  # torchrun sends it once more
        if by_hand or (is_late and number in (signal.SIGINT, signal.SIGTERM)):
            os._exit(128 + number)
