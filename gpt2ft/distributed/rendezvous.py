"""Processes that were started again meet each other, and not what the dead have left in the store.

Torchrun keeps its store when it starts processes again (2.10 to 2.13), under the same keys. One that reads the address
of another before that has written its new one waits for the dead, and the restart fails or hangs. How often a machine
has restarted does not tell the starts apart: machines count for themselves. So before anything else processes make sure
that all have seen all as they are now, and continue under a name that only they know.
"""

import hashlib
import importlib
import json
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store

SECONDS_BETWEEN_LOOKS = 0.05


def use() -> None:
    """Has every process group that is made from here on, by whatever library, begin with a meeting."""
    handlers = _handlers()
    plain = handlers["env"]
    if getattr(plain, "meets", False):
        return

    def meeting(url: str, **settings: Any) -> Iterator[tuple[Store, int, int]]:
        for store, rank, num_processes in plain(url, **settings):
            name = meet(store, rank, num_processes, settings.get("timeout", timedelta(minutes=30)))
            yield PrefixStore(name, store), rank, num_processes

    meeting.meets = True
    handlers["env"] = meeting


def _handlers() -> dict[str, Any]:
    """Torch's own, by scheme of the URL: to register another under a name that is taken is refused."""
    module = importlib.import_module("torch.distributed.rendezvous")  # the package has a function of that name
    return module._rendezvous_handlers


def meet(store: Store, rank: int, num_processes: int, timeout: timedelta) -> str:
    """A name that all processes of this start are given, and none of any other.

    Each draws a number and says which numbers of the others it sees. Who finds that all say the same as it does itself
    knows that all are there: the dead cannot have seen its number.

    Raises:
        TimeoutError: if not all come.
    """
    mine, seen = uuid.uuid4().hex, None
    keys = [f"meeting/{number}" for number in range(num_processes)]
    until = time.monotonic() + timeout.total_seconds()
    while True:
        store.set(keys[rank], json.dumps([mine, seen]))
        if store.check(keys):
            words = [json.loads(store.get(key)) for key in keys]
            drawn = [number for number, _ in words]
            if all(view == drawn for _, view in words):
                return f"meeting/{hashlib.sha256(json.dumps(drawn).encode()).hexdigest()}"
            seen = drawn
        if time.monotonic() > until:
            raise TimeoutError(f"not all of {num_processes} processes have come together in {timeout}")
        time.sleep(SECONDS_BETWEEN_LOOKS)
