"""Processes that are started again meet each other, whatever dead ones have left; who never joins is not waited for."""

import json
import os
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from gpt2ft.distributed import rendezvous
from gpt2ft.distributed.rendezvous import COLLECTIVE_TIMEOUT, EXIT_CODE, joining, meet

TIMEOUT = timedelta(seconds=300)


@pytest.fixture
def store():
    return dist.HashStore()


@pytest.fixture
def looks(monkeypatch):
    """Released whenever a process has looked for the others and not found them all."""
    looked = threading.Semaphore(0)

    def sleep(seconds):
        looked.release()
        time.sleep(seconds / 10)

    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    return looked


def start(store, ranks, num_processes, found):
    """Each in a thread of its own; `found` gets (rank, name)."""
    threads = [
        threading.Thread(target=lambda rank=rank: found.append((rank, meet(store, rank, num_processes, TIMEOUT))))
        for rank in ranks
    ]
    for thread in threads:
        thread.start()
    return threads


def test_groups_of_any_library_wait_as_long_as_the_watchdog_lets_them(monkeypatch):
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, timedelta(minutes=10))
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "10")
    rendezvous.install()
    for backend in ("nccl", "gloo"):
        assert distributed_c10d._get_default_timeout(backend) == COLLECTIVE_TIMEOUT
    assert timedelta(minutes=int(os.environ["DEEPSPEED_TIMEOUT"])) == COLLECTIVE_TIMEOUT


def test_all_are_given_one_name_and_each_start_another(store, looks):
    names = []
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):  # over what the start before has left
        found, threads = [], []
        for rank in order[:2]:
            threads += start(store, [rank], 3, found)
            for _ in range(3):
                looks.acquire()
        for thread in [*threads, *start(store, order[2:], 3, found)]:
            thread.join()
        assert sorted(rank for rank, _ in found) == [0, 1, 2]
        assert len({name for _, name in found}) == 1
        names.append(found[0][1])
    assert len(set(names)) == 3


def test_nobody_takes_the_dead_for_the_living(store, looks):
    """Two of three are started again: they wait until the third is too."""
    found = []
    for thread in start(store, range(3), 3, found):
        thread.join()
    before = {name for _, name in found}
    found = []
    while looks.acquire(blocking=False):
        pass
    threads = start(store, [0, 1], 3, found)
    for _ in range(20):
        looks.acquire()
    assert found == []
    for thread in [*threads, *start(store, [2], 3, found)]:
        thread.join()
    assert len({name for _, name in found}) == 1
    assert {name for _, name in found}.isdisjoint(before)


def test_one_alone_meets_itself(store):
    assert meet(store, 0, 1, TIMEOUT) != meet(store, 0, 1, TIMEOUT)


def test_who_does_not_come_is_not_waited_for(store):
    store.set("meeting/1", json.dumps(["dead", ["dead", "dead"]]))
    with pytest.raises(TimeoutError, match="not all of 2 processes"):
        meet(store, 0, 2, timedelta(seconds=0.2))


def test_process_groups_begin_with_it(monkeypatch, store):
    def plain(url, **settings):
        yield store, 0, 1

    monkeypatch.setitem(rendezvous._handlers(), "env", plain)
    rendezvous.install()
    rendezvous.install()
    given, rank, num_processes = next(rendezvous._handlers()["env"]("env://", timeout=TIMEOUT))
    assert (rank, num_processes) == (0, 1)
    given.set("key", "value")
    assert not store.check(["key"])
    assert store.num_keys() == 2


@pytest.fixture
def codes(monkeypatch):
    """The exit codes of this process, which go on instead; set is released with each."""
    codes, ended = [], threading.Event()
    monkeypatch.setattr(rendezvous.os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setenv("RANK", "3")
    return SimpleNamespace(found=codes, ended=ended)


def test_processes_that_never_join_are_not_waited_for(codes, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("GPT2FT_PATIENCE", "0.01")
    with joining():
        assert codes.ended.wait(300)
    assert codes.found == [EXIT_CODE]
    assert "error: rank 3 (host" in capfd.readouterr().err


@pytest.mark.parametrize(("world_size", "patience"), [("1", "0.001"), ("4", "0"), ("4", "60")])
def test_joining_may_take_its_time(world_size, patience, codes, monkeypatch):
    """Ten times the patience, and as long as it likes for one process alone or without any patience."""
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("GPT2FT_PATIENCE", patience)
    with joining():
        assert not codes.ended.wait(0.1)
    assert codes.found == []
