"""Who is started again meets those who are, whatever the dead have left."""

import json
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from gpt2ft.distributed import rendezvous
from gpt2ft.distributed.rendezvous import meet

TIMEOUT = timedelta(seconds=20)


@pytest.fixture
def store():
    return dist.HashStore()


def start(store, ranks, num_processes, found, delays=()):
    """Each in a thread of its own; `found` gets (rank, name)."""

    def run(rank):
        time.sleep(dict(zip(ranks, delays, strict=False)).get(rank, 0.0))
        found.append((rank, meet(store, rank, num_processes, TIMEOUT)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    return threads


def test_all_are_given_one_name_and_each_start_another(store):
    names = []
    for delays in ((0.0, 0.0, 0.0), (0.3, 0.0, 0.1), (0.0, 0.2, 0.4)):  # over what the start before has left
        found = []
        for thread in start(store, range(3), 3, found, delays):
            thread.join()
        assert sorted(rank for rank, _ in found) == [0, 1, 2]
        assert len({name for _, name in found}) == 1
        names.append(found[0][1])
    assert len(set(names)) == 3


def test_nobody_takes_the_dead_for_the_living(store):
    """Two of three are started again: they wait until the third is too."""
    found = []
    for thread in start(store, range(3), 3, found):
        thread.join()
    before = {name for _, name in found}
    found = []
    threads = start(store, [0, 1], 3, found)
    time.sleep(0.5)
    assert found == []
    for thread in [*threads, *start(store, [2], 3, found)]:
        thread.join()
    assert len({name for _, name in found}) == 1
    assert {name for _, name in found}.isdisjoint(before)


def test_one_alone_meets_itself(store):
    assert meet(store, 0, 1, TIMEOUT) != meet(store, 0, 1, TIMEOUT)


def test_who_does_not_come_is_not_waited_for(store):
    store.set("meeting/1", json.dumps(["dead", ["dead", "dead"]]))
    with pytest.raises(TimeoutError, match="not all of 2 processes have come together"):
        meet(store, 0, 2, timedelta(seconds=0.2))


def test_process_groups_begin_with_it(monkeypatch, store):
    def plain(url, **settings):
        yield store, 0, 1

    monkeypatch.setitem(rendezvous._handlers(), "env", plain)
    rendezvous.use()
    rendezvous.use()
    given, rank, num_processes = next(rendezvous._handlers()["env"]("env://", timeout=TIMEOUT))
    assert (rank, num_processes) == (0, 1)
    given.set("key", "value")
    assert not store.check(["key"])
    assert store.num_keys() == 2
