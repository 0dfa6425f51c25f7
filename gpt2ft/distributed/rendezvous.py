"""Bring the processes of one start together, and no others.

Torchrun keeps its store when it starts processes again (2.10 to 2.13), under the same keys. A process that reads the
address of another before that has written its new one waits for a dead process, and the restart fails or hangs. The
number of restarts does not tell the starts apart: machines count for themselves. So before anything else the processes
make sure that all have seen all as they are now, and continue under a name that only they know.
"""

import hashlib
import importlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer
from typing import Any, NoReturn

from torch.distributed import PrefixStore, Store, distributed_c10d

from gpt2ft.distributed.launch_checks import LaunchError

EXIT_CODE = 69  # of processes that end so that all can be started again: EX_UNAVAILABLE
SECONDS_BETWEEN_LOOKS = 0.05
COLLECTIVE_TIMEOUT = timedelta(days=7)  # whoever is slow but alive is waited for; the watchdog names the others


def patience() -> float:
    """Seconds from GPT2FT_PATIENCE, of which the times to wait for other processes are multiples; 0 is for ever.

    Raises:
        LaunchError: if that is no number of seconds.
    """
    value = os.environ.get("GPT2FT_PATIENCE", "60")
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise LaunchError(f"GPT2FT_PATIENCE must be a number of seconds, or 0, but is {value!r}")
    return seconds


def give_up(problem: str) -> NoReturn:
    """End this process at once, whatever its main thread waits for; an empty problem is not printed."""
    if problem:
        os.write(2, f"error: {problem}: ending, so that the launcher can start again\n".encode())
    os._exit(EXIT_CODE)


@contextmanager
def joining() -> Iterator[None]:
    """End this process if the block, in which all processes join, takes more than ten times the patience."""
    seconds = 10 * patience() if os.environ.get("WORLD_SIZE", "1") != "1" else 0.0
    rank = f"rank {os.environ.get('RANK', '0')} (host {socket.gethostname()})"
    timer = Timer(seconds, give_up, [f"{rank} has waited {seconds:.0f} s for all processes to join"])
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def install() -> None:
    """Have every process group that is made from here on, by whatever library, begin with `meet` and wait for long.

    By default NCCL ends a process that has waited ten minutes in a collective, and DeepSpeed makes groups of its own.
    """
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = COLLECTIVE_TIMEOUT
    os.environ["DEEPSPEED_TIMEOUT"] = str(COLLECTIVE_TIMEOUT // timedelta(minutes=1))
    handlers = _handlers()
    original = handlers["env"]
    if getattr(original, "meets", False):
        return

    def handler(url: str, **settings: Any) -> Iterator[tuple[Store, int, int]]:
        for store, rank, num_processes in original(url, **settings):
            name = meet(store, rank, num_processes, settings.get("timeout", COLLECTIVE_TIMEOUT))
            yield PrefixStore(name, store), rank, num_processes

    handler.meets = True
    handlers["env"] = handler


def _handlers() -> dict[str, Any]:
    """Return torch's own, by scheme of the URL, because registering another under a name in use is refused."""
    module = importlib.import_module("torch.distributed.rendezvous")  # the package has a function of that name
    return module._rendezvous_handlers


def meet(store: Store, rank: int, num_processes: int, timeout: timedelta) -> str:
    """Return a name that all processes of this start are given, and those of no other start.

    Each process draws a number and publishes it with the numbers of the others that it sees. Once all publish the same
    numbers, all are there: a dead process cannot have seen a number that was drawn after its death.

    Raises:
        TimeoutError: if not all come.
    """
    mine, seen = uuid.uuid4().hex, None
    keys = [f"meeting/{number}" for number in range(num_processes)]
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        store.set(keys[rank], json.dumps([mine, seen]))
        if store.check(keys):
            published = [json.loads(store.get(key)) for key in keys]
            drawn = [number for number, _ in published]
            if all(view == drawn for _, view in published):
                return f"meeting/{hashlib.sha256(json.dumps(drawn).encode()).hexdigest()}"
            seen = drawn
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {num_processes} processes have come together in {timeout}")
        time.sleep(SECONDS_BETWEEN_LOOKS)
