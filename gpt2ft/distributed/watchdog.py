"""Processes that watch each other: one that hangs or is lost is named within a minute, and all end.

Without it they would wait for it in a collective until that times out, half an hour later. A thread of each process
says every two seconds, in the store that the launcher has opened for them, where its main thread is, and listens to
the others. The main thread says no more than `at("backward")`, which costs a microsecond. Who is to be named is decided
in diagnosis.py.

A process that ends so has exit code 69, on which `torchrun --max_restarts` starts all again: they go on from the newest
checkpoint. GPT2FT_PATIENCE is the time in seconds that a process may stand still; 0 switches the watch off, for a
debugger.
"""

import atexit
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Condition, Event, Thread, Timer, main_thread
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from gpt2ft.distributed.diagnosis import Patience, Verdict, Vigil, Word
from gpt2ft.distributed.launch_checks import LaunchError
from gpt2ft.distributed.signals import Preempted

EXIT_CODE = 69  # of processes that end because one of them is lost or stands still: EX_UNAVAILABLE
TIMES_AS_LONG = 5  # as anything like it has taken so far is too long
ROUNDS_AT_A_PLACE = 3  # before it is said what the main thread is in

_watch: "Watch | None" = None


@contextmanager
def joining() -> Iterator[None]:
    """Around what waits for all processes for the first time, before they can watch each other.

    Raises:
        LaunchError: if GPT2FT_PATIENCE is no number.
    """
    seconds = _patience().first if os.environ.get("WORLD_SIZE", "1") != "1" else 0.0

    def give_up() -> None:
        rank = f"rank {os.environ.get('RANK', '0')} (host {socket.gethostname()})"
        _say(f"{rank} has waited {seconds:.0f} s for all processes to join")
        os._exit(EXIT_CODE)

    timer = Timer(seconds, give_up)
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def start(accelerator: Any) -> None:
    """Has the processes watch each other from here on. All come here together; one alone watches nobody.

    Raises:
        LaunchError: if GPT2FT_PATIENCE is no number.
    """
    global _watch
    stop()
    patience = _patience()
    if accelerator.num_processes == 1 or not patience.standing:
        return
    from accelerate.utils import broadcast_object_list

    (name,) = broadcast_object_list([uuid.uuid4().hex])  # restarts may share a store, and count differently
    watch = Watch(name, accelerator.process_index, accelerator.num_processes, patience)
    accelerator.wait_for_everyone()  # all have said their first word
    watch.begin()
    _watch = watch
    atexit.register(stop)


def at(place: str, step: int | None = None, is_long: bool = False) -> None:
    """The main thread has got on. All processes say so at the same places of the program, and equally often.

    Args:
        place: what it begins to do.
        step: from here on.
        is_long: whether that may take as long as it likes, and let no other thread run meanwhile.
    """
    if _watch is not None:
        _watch.at(place, step, is_long)


def stop(why: str | None = None) -> None:
    """This process needs to be watched no more.

    Args:
        why: what it has failed of, if it has.
    """
    global _watch
    watch, _watch = _watch, None
    if watch is not None:
        watch.end("finished" if why is None else "failed", why or "")


@contextmanager
def until_the_end() -> Iterator[None]:
    """Around all that may be watched: the others are told how it ends."""
    try:
        yield
    except Preempted:
        stop()
        raise
    except BaseException as error:
        if _watch is not None and _is_cut_off(error):
            _watch.wait_for_a_verdict()
        lines = str(error).splitlines()
        stop(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
        raise
    stop()


def _is_cut_off(error: BaseException) -> bool:
    """Whether a collective has failed, as it does on most processes when one is lost: which, it does not say."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _patience() -> Patience:
    value = os.environ.get("GPT2FT_PATIENCE", "60")
    try:
        return Patience(float(value))
    except ValueError:
        raise LaunchError(f"GPT2FT_PATIENCE must be a number of seconds, or 0, but is {value!r}") from None


class _Place(NamedTuple):
    position: int
    place: str
    step: int | None
    is_long: bool
    limit: float

    def __str__(self) -> str:
        return self.place if self.step is None else f"step {self.step}, {self.place}"


class Watch:
    """The two threads of one process: one speaks and listens, which may block; one judges what was heard.

    Args:
        name: of this start of the group, the same on all its processes.
    """

    def __init__(self, name: str, rank: int, num_processes: int, patience: Patience) -> None:
        self._patience = patience
        self._vigil = Vigil(rank, patience)
        self._keys = [f"watch/{name}/{number}" for number in range(num_processes)]
        self._key = self._keys[rank]
        self._host = socket.gethostname()
        self._address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self._longest: dict[str, float] = {}
        self._since = time.monotonic()
        self._place = _Place(0, "getting ready", None, True, patience.long)
        self._state: Literal["working", "finished", "failed"] = "working"
        self._why = ""
        self._number = 0
        self._rounds_here = 0
        self._said = -1  # the position of the last word
        self._news = Condition()
        self._is_due, self._is_over = Event(), Event()
        self._heard: tuple[int, list[Word]] = (0, [])
        self._threads = [Thread(target=work, name="watch", daemon=True) for work in (self._talk, self._judge)]
        self._store = self._connect()
        self._store.set(self._key, self._word().to_bytes())

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def at(self, place: str, step: int | None, is_long: bool) -> None:
        now, patience, before = time.monotonic(), self._patience, self._place
        self._longest[before.place] = max(self._longest.get(before.place, 0.0), now - self._since)
        longest = self._longest.get(place)
        usual = patience.first if longest is None else max(patience.standing, TIMES_AS_LONG * longest)
        limit = max(patience.long, usual) if is_long else usual
        self._since = now
        self._place = _Place(before.position + 1, place, before.step if step is None else step, is_long, limit)
        if is_long != before.is_long:
            self._is_due.set()
        if is_long and not before.is_long:  # the others must know before no thread of this process can speak
            with self._news:
                self._news.wait_for(lambda: self._said >= self._place.position, timeout=patience.interval)

    def end(self, state: Literal["finished", "failed"], why: str) -> None:
        """Says so, and ends the threads."""
        self._state, self._why = state, why
        self._is_over.set()
        self._is_due.set()
        for thread in self._threads:
            thread.join(timeout=self._patience.interval + 3)

    def wait_for_a_verdict(self) -> None:
        """Until who is lost must have been noticed, which ends this process."""
        self._is_over.wait(self._patience.silence + 5 * self._patience.interval)

    # --- speaking and listening -------------------------------------------------------------------------------------

    def _connect(self) -> dist.TCPStore:
        timeout = timedelta(seconds=max(1.0, self._patience.silence / 4))
        return dist.TCPStore(*self._address, is_master=False, timeout=timeout, wait_for_workers=False)

    def _word(self) -> Word:
        place = self._place
        self._number += 1
        self._rounds_here = self._rounds_here + 1 if place.position == self._said else 0
        within = _frame_of_main_thread() if self._rounds_here >= ROUNDS_AT_A_PLACE else ""
        return Word(
            number=self._number,
            position=place.position,
            place=str(place),
            limit=place.limit,
            is_long=place.is_long,
            host=self._host,
            within=within,
            state=self._state,
            why=self._why,
        )

    def _talk(self) -> None:
        while True:
            is_last = self._is_over.is_set()
            try:
                if self._store is None:
                    self._store = self._connect()
                word = self._word()
                self._store.set(self._key, word.to_bytes())
                with self._news:
                    self._said = word.position
                    self._news.notify_all()
                if is_last:
                    return
                words = [Word.from_bytes(data) for data in self._store.multi_get(self._keys)]
                self._heard = (self._heard[0] + 1, words)
            except (RuntimeError, OSError):  # whether it stays away is judged there
                if is_last:
                    return
                self._store = None
            self._is_due.wait(self._patience.interval)
            self._is_due.clear()

    # --- judging ----------------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Time in which this very process was frozen counts for nobody: a round is at most two intervals long."""
        patience, before, last, deaf = self._patience, time.monotonic(), 0, 0.0
        while not self._is_over.wait(patience.interval):
            now = time.monotonic()
            deaf, before = deaf + min(now - before, 2 * patience.interval), now
            number, words = self._heard
            if number != last:
                verdict = self._vigil.hear(words, min(deaf, 3 * patience.interval))
                last, deaf = number, 0.0
            else:
                verdict = self._deaf(deaf)
            if verdict is not None and not self._is_over.is_set():
                self._carry_out(verdict)

    def _deaf(self, seconds: float) -> Verdict | None:
        place = self._place
        if seconds <= (self._patience.long_silence if place.is_long else self._patience.silence):
            return None
        host, port = self._address
        return Verdict(f"the store at {host}:{port}, on the first machine, has not answered for {seconds:.0f} s", [])

    def _carry_out(self, verdict: Verdict) -> None:
        speaks = self._vigil.speaks(verdict)
        if not speaks and self._is_over.wait(1 + 4 * self._patience.interval):  # torchrun ends all once one is gone
            return
        if speaks or not verdict.accused:  # without the store, the one that should speak may be what is lost
            _say(verdict.sentence)
        os._exit(EXIT_CODE)


def _say(why: str) -> None:
    os.write(2, f"error: {why}: ending, so that the launcher can start again\n".encode())


def _frame_of_main_thread() -> str:
    frame = sys._current_frames().get(main_thread().ident or 0)
    return f"{frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""
