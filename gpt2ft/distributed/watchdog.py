"""Name a process that hangs or is lost, and end all with exit code 69, on which torchrun starts them again.

Each process writes heartbeats into the launcher's store and reads those of the others. One without heartbeats is frozen
or lost. If none shows a sign of life, all wait for the one that has begun the fewest collectives. Signs of life are
Python code that moves on in any thread, collectives, bytes read or written and, on CPUs, computing: whoever downloads,
tokenises, compiles or evaluates is left alone. GPT2FT_PATIENCE (60 seconds) scales all times; 0 means no watchdog.
"""

import faulthandler
import json
import os
import socket
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread, Timer, get_ident
from traceback import walk_stack
from typing import Any

import psutil
from torch.distributed import DistError, Store, distributed_c10d

from gpt2ft.distributed.rendezvous import give_up, patience
from gpt2ft.distributed.signals import Preempted

INTERVAL, SILENT = 1 / 30, 1 / 2  # between two heartbeats; without any: multiples of GPT2FT_PATIENCE, like the next two
IN_LOOP, ELSEWHERE = 1, 30  # without a sign of life: elsewhere one call may close a large file, or compile a kernel
# number: one more each time; limit: seconds without a sign of life; collectives: begun so far; signs: of life, counted
Heartbeat = namedtuple("Heartbeat", "number host place limit collectives signs diagnosis")
_watchdog: "Watchdog | None" = None


def start(accelerator: Any) -> None:
    """Start the watchdogs of all processes, which call this together; a process that trains alone has none."""
    global _watchdog
    stop("finished")
    if accelerator.num_processes > 1 and patience():
        _watchdog = Watchdog(distributed_c10d._get_default_store().clone(), accelerator)
        _watchdog.store.set(_watchdog.keys[_watchdog.rank], _watchdog.beat())
        accelerator.wait_for_everyone()
        _watchdog.start()


def mark_progress(place: str, number: int | None = None) -> None:
    """Note where the main thread has got to: a step of a loop if it has a number, otherwise something longer."""
    if _watchdog is not None:
        _watchdog.place = place if number is None else f"{place} {number}"
        _watchdog.limit = (IN_LOOP if place in _watchdog.loops else ELSEWHERE) * patience()
        _watchdog.loops |= set() if number is None else {place}  # from the second step on: the first compiles kernels


def stop(place: str) -> None:
    """Send a last heartbeat, from the place "finished" or from the error that ends this process."""
    global _watchdog
    watchdog, _watchdog = _watchdog, None
    if watchdog is not None:
        watchdog.place = place
        watchdog.over.set()
        watchdog.join(timeout=3 + watchdog.interval)


@contextmanager
def announce_end() -> Iterator[None]:
    """Tell the other processes how this block, or decorated function, ends."""
    try:
        yield
    except BaseException as error:
        is_cut_off = isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        if is_cut_off and _watchdog is not None:  # on all processes, if one is lost; the watchdog names it
            _watchdog.over.wait(_watchdog.max_silence + 5 * _watchdog.interval)
        stop("finished" if isinstance(error, Preempted) else repr(error))
        raise
    stop("finished")


class Watchdog(Thread):
    """Send the heartbeats of this process, and judge those of all."""

    def __init__(self, store: Store, accelerator: Any) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.store, self.rank, size = store, accelerator.process_index, accelerator.num_processes
        self.host, self.on_cpu = socket.gethostname(), accelerator.device.type == "cpu"
        self.keys = [f"heartbeat/{rank}" for rank in range(size)]
        self.interval, self.max_silence = INTERVAL * patience(), SILENT * patience()
        self.place, self.limit, self.loops, self.over = "getting ready", ELSEWHERE * patience(), set(), Event()
        self.number, self.signs, self.seen, self.diagnosis = 0, 0, ([], 0, 0.0), None
        self.beats, self.silent, self.still = [], [0.0] * size, [0.0] * size  # seconds, by rank

    def run(self) -> None:
        before = time.monotonic()
        while not self.over.wait(self.interval):
            beat = self.beat()  # before the timer starts, which is a thread too
            timer = Timer(self.max_silence, self.end, [f"the store on {os.environ['MASTER_ADDR']} does not answer", []])
            timer.start()
            try:
                self.store.set(self.keys[self.rank], beat)
                beats = [Heartbeat(*json.loads(beat)) for beat in self.store.multi_get(self.keys)]
            except RuntimeError:  # the first process has ended, and this one is about to, or the timer ends it
                return
            timer.cancel()
            if diagnoses := [beat.diagnosis for beat in beats if beat.diagnosis]:  # of any process, this one too
                self.end(*diagnoses[0])
            passed, before = min(time.monotonic() - before, 3 * self.interval), time.monotonic()  # unless frozen
            self.diagnosis = self.diagnosis or self.diagnose(beats, passed)
        with suppress(RuntimeError):
            self.store.set(self.keys[self.rank], self.beat())

    def beat(self) -> str:
        """Return a heartbeat of this process, as the store holds it."""
        frames = [walk_stack(top) for ident, top in sys._current_frames().items() if ident != get_ident()]
        stacks = [(frame.f_code, frame.f_lasti) for stack in frames for frame, _ in stack]
        moved = psutil.Process().io_counters()[2:] if hasattr(psutil.Process, "io_counters") else ()  # not on macOS
        before, self.seen, self.number = self.seen, (stacks, sum(moved), time.process_time()), self.number + 1
        computes = self.on_cpu and self.seen[2] - before[2] > self.interval / 10  # who waits for a GPU is busy too
        self.signs += computes or stacks != before[0] or self.seen[1] - before[1] > 2**20
        collectives = sum(group._get_sequence_number_for_group() for group in list(distributed_c10d._world.pg_map))
        return json.dumps([self.number, self.host, self.place, self.limit, collectives, self.signs, self.diagnosis])

    def diagnose(self, beats: list[Heartbeat], seconds: float) -> tuple[str, list[int]] | None:
        """Return the problem and the suspects, if there are any, from heartbeats `seconds` after the last ones."""
        for rank, (old, new) in enumerate(zip(self.beats or beats, beats, strict=True)):
            self.silent[rank] = self.silent[rank] + seconds if new.number == old.number else 0.0
            self.still[rank] = self.still[rank] + seconds if new[2:6] == old[2:6] else 0.0  # place to signs
        self.beats = beats
        working = [rank for rank, beat in enumerate(beats) if beat.place != "finished"]
        fewest = min((beats[rank].collectives for rank in working), default=0)
        awaited = [rank for rank in working if beats[rank].collectives == fewest]
        still = min((self.still[rank] for rank in working), default=0.0)
        suspects = [rank for rank in working if self.silent[rank] > self.max_silence and rank != self.rank]
        if suspects:
            problem = f"no heartbeat for {min(self.silent[rank] for rank in suspects):.0f} s of"
        elif len(working) > 1 and still > max(beats[rank].limit for rank in awaited):
            suspects, problem = awaited, f"no process has got on for {still:.0f} s, and all wait for"
        names = " and ".join(f"rank {rank} (host {beats[rank].host})" for rank in suspects[:3])
        more = f" and {len(suspects) - 3} others" if len(suspects) > 3 else ""
        return (f"{problem} {names}{more}, last at {beats[suspects[0]].place}", suspects) if suspects else None

    def end(self, problem: str, suspects: list[int]) -> None:
        """End this process. One on each machine says why, a suspect only if there is no other."""
        here = [rank for rank, beat in enumerate(self.beats) if beat.host == self.host]
        speaker = min([rank for rank in here if rank not in suspects] or here, default=self.rank)
        if self.over.wait(0 if self.rank == speaker else 1 + 4 * self.interval):  # torchrun ends all
            return
        if self.rank in suspects:
            faulthandler.dump_traceback(file=2)
        give_up(problem if self.rank == speaker or not suspects else "")
