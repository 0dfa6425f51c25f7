"""Who is named, when, and who is not."""

import os
import socket
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from gpt2ft.distributed import watchdog as watch
from gpt2ft.distributed.diagnosis import Patience, Verdict, Vigil, Word
from gpt2ft.distributed.launch_checks import LaunchError
from gpt2ft.distributed.signals import Preempted
from gpt2ft.distributed.watchdog import Watch

ROUND = 2.0  # seconds


class Group:
    """What rank 0 hears of some processes, round by round."""

    def __init__(self, num_processes):
        self.vigil = Vigil(0, Patience())
        self.words = [Word(0, 0, "forward", 60.0, False, f"host{rank // 2}") for rank in range(num_processes)]

    def change(self, rank, **changes):
        self.words[rank] = replace(self.words[rank], **changes)

    def rounds(self, seconds, silent=(), advancing=()):
        """The verdict, and after how many seconds; None if there was none."""
        for number in range(round(seconds / ROUND)):
            for rank, word in enumerate(self.words):
                is_heard = rank not in silent and word.state == "working"
                step = int(rank in advancing)
                self.words[rank] = replace(word, number=word.number + is_heard, position=word.position + step)
            verdict = self.vigil.hear(self.words, ROUND)
            if verdict is not None:
                return verdict, number * ROUND
        return None


def test_processes_that_get_on_are_left_alone():
    assert Group(3).rounds(1000, advancing=(0, 1, 2)) is None


def test_one_that_is_silent_is_named_within_half_a_minute():
    group = Group(4)
    group.change(3, place="step 41, backward")
    verdict, seconds = group.rounds(100, silent=[3], advancing=[0, 1, 2])
    assert verdict.sentence == ("rank 3 (host host1) has not been heard of for 22 s; it was last at step 41, backward")
    assert verdict.accused == [3]
    assert seconds < 30


def test_one_that_cannot_speak_while_it_saves_is_given_time():
    group = Group(2)
    group.change(1, is_long=True, limit=1800.0)
    assert group.rounds(290, silent=[1]) is None
    assert group.rounds(20, silent=[1])


def test_many_that_are_silent_are_counted():
    verdict, _ = Group(8).rounds(100, silent=range(2, 8))
    assert verdict.sentence.startswith(
        "rank 2 (host host1) and rank 3 (host host1) and rank 4 (host host2) and 3 others have not been heard of"
    )
    assert verdict.accused == [2, 3, 4, 5, 6, 7]


def test_the_one_that_all_wait_for_is_named():
    """It is behind, and none gets on; the others have got to a collective."""
    group = Group(3)
    for rank in (0, 2):
        group.change(rank, position=1, place="step 41, backward")
    group.change(1, place="step 41, forward", within="sleep, tests.py:1")
    verdict, seconds = group.rounds(200)
    assert verdict.sentence == (
        "rank 1 (host host0) stands at step 41, forward (in sleep, tests.py:1); no process has got on for 62 s"
    )
    assert verdict.accused == [1]
    assert seconds <= 62


def test_nobody_is_named_while_one_gets_on():
    group = Group(2)
    group.change(1, position=1000)
    assert group.rounds(600, advancing=[0]) is None


def test_where_all_stand_no_one_is_singled_out():
    verdict, _ = Group(2).rounds(200)
    assert verdict.sentence == "no process has got on for 62 s; all stand at forward"


def test_the_slowest_process_says_how_long_it_may_take():
    group = Group(2)
    group.change(0, position=5)
    group.change(1, limit=600.0, place="sample replies")
    assert group.rounds(600) is None
    assert group.rounds(10)[0].accused == [1]


def test_one_that_has_finished_is_waited_for_by_nobody():
    group = Group(2)
    group.change(1, state="finished")
    assert group.rounds(1000, advancing=[0]) is None
    assert group.rounds(1000) is None  # nor is the last one


def test_one_that_has_failed_is_named_if_its_launcher_does_not_end_the_others():
    group = Group(2)
    group.change(1, state="failed", why="OSError: no space left", place="step 3, saving")
    assert group.rounds(10) is None
    assert group.rounds(10)[0].sentence == "rank 1 (host host0) has ended at step 3, saving (OSError: no space left)"


def test_one_process_on_each_machine_speaks():
    group = Group(4)
    group.rounds(ROUND)
    speakers = {}
    for accused in ([1], [0], [0, 1], [0, 1, 2, 3], []):
        found = []
        for rank in range(4):
            vigil = Vigil(rank, Patience())
            vigil.hear(group.words, ROUND)
            found += [rank] if vigil.speaks(Verdict("", accused)) else []
        speakers[tuple(accused)] = found
    assert speakers == {(1,): [0, 2], (0,): [1, 2], (0, 1): [0, 2], (0, 1, 2, 3): [0, 2], (): [0, 2]}


def test_a_word_survives_the_store():
    word = Word(3, 9, "step 1, saving", 60.0, True, "host", "write, files.py:3", "failed", "OSError: Ünknown")
    assert Word.from_bytes(word.to_bytes()) == word


# --- the threads ----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(monkeypatch):
    """A store as the launcher opens it, for several watches in this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return store


@pytest.fixture
def pair(store, monkeypatch):
    """Two watches of one process, and the verdicts they have come to."""
    verdicts = []

    def carry_out(watch, verdict):
        verdicts.append(verdict)
        watch._is_over.set()

    monkeypatch.setattr(Watch, "_carry_out", carry_out)
    watches = [Watch("test", rank, 2, Patience(6.0)) for rank in range(2)]
    for each in watches:
        each.begin()
    yield *watches, verdicts
    for each in watches:
        each.end("finished", "")
    assert not [thread for thread in threading.enumerate() if thread.name == "watch"]


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_two_that_get_on_and_finish_name_nobody(pair):
    one, other, verdicts = pair
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        for each in (one, other):
            each.at("forward", 1, False)
        time.sleep(0.1)
    one.end("finished", "")
    time.sleep(2.5)  # longer than a silence
    assert verdicts == []


def test_a_long_place_is_known_before_it_begins(pair):
    one, other, _ = pair
    one.at("forward", 1, False)
    wait_for(lambda: other._heard[1] and not other._heard[1][0].is_long)
    one.at("saving", None, True)
    said = Word.from_bytes(other._store.get(one._key))
    assert (said.place, said.is_long, said.limit) == ("step 1, saving", True, 180.0)


def test_a_silent_one_is_named_by_the_other(pair):
    one, other, verdicts = pair
    for each in (one, other):
        each.at("forward", 1, False)
    wait_for(lambda: one._heard[1] and not one._heard[1][1].is_long)
    other._is_over.set()  # its threads end without a word: as good as frozen
    other._state = "working"
    wait_for(lambda: verdicts)
    assert verdicts[0].sentence.startswith(f"rank 1 (host {socket.gethostname()}) has not been heard of for ")


def test_limits_follow_what_was_usual(pair):
    one, _, _ = pair
    patience = one._patience
    one.at("forward", 0, False)
    assert one._place.limit == patience.first
    one._since -= 7.0  # it has taken that long
    one.at("backward", None, False)
    one.at("forward", 1, False)
    assert one._place.limit == pytest.approx(35.0, abs=1.0)
    one.at("backward", None, False)
    one.at("backward", None, False)
    assert one._place.limit == patience.standing
    assert str(one._place) == "step 1, backward"


def test_a_store_that_is_gone_is_named(pair, monkeypatch):
    one, _, verdicts = pair
    one.at("forward", 1, False)

    class Gone:
        def set(self, *_):
            raise RuntimeError("connection reset")

    monkeypatch.setattr(Watch, "_connect", lambda watch: Gone())
    one._store = Gone()
    wait_for(lambda: verdicts)
    store = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    assert verdicts[0].sentence.startswith(f"the store at {store}, on the first machine, has not answered for ")


# --- what the rest of the program sees ------------------------------------------------------------------------------


def test_one_process_watches_nobody(monkeypatch):
    from types import SimpleNamespace

    watch.start(SimpleNamespace(num_processes=1))
    watch.at("forward", 1)
    assert watch._watch is None
    monkeypatch.setenv("GPT2FT_PATIENCE", "0")
    watch.start(SimpleNamespace(num_processes=2))
    assert watch._watch is None
    monkeypatch.setenv("GPT2FT_PATIENCE", "a minute")
    with pytest.raises(LaunchError, match="GPT2FT_PATIENCE must be a number of seconds, or 0, but is 'a minute'"):
        watch.start(SimpleNamespace(num_processes=2))


def test_processes_that_never_join_are_not_waited_for(monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(watch.os, "_exit", codes.append)
    monkeypatch.setenv("GPT2FT_PATIENCE", "0.01")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with watch.joining():
        time.sleep(0.2)
    assert codes == []
    monkeypatch.setenv("WORLD_SIZE", "4")
    with watch.joining():
        wait_for(lambda: codes)
    assert codes == [watch.EXIT_CODE]
    assert "rank 3 (host" in capfd.readouterr().err


class Recorded:
    def __init__(self):
        self.said, self.waited = [], False

    def end(self, state, why):
        self.said.append((state, why))

    def wait_for_a_verdict(self):
        self.waited = True


@pytest.mark.parametrize(
    ("error", "said", "waits"),
    [
        (None, ("finished", ""), False),
        (Preempted("saved"), ("finished", ""), False),
        (OSError("disk full\nreally"), ("failed", "OSError: disk full"), False),
        (KeyboardInterrupt(), ("failed", "KeyboardInterrupt"), False),
        (RuntimeError("[gloo/pair.cc] Connection closed by peer"), ("failed", "RuntimeError: [gloo/pair.cc] C"), True),
        (dist.DistBackendError("NCCL error"), ("failed", "DistBackendError: NCCL error"), True),
    ],
)
def test_the_others_are_told_how_it_ends(error, said, waits, monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(watch, "_watch", recorded)
    with nullcontext() if error is None else pytest.raises(type(error)), watch.until_the_end():
        if error is not None:
            raise error
    (found,) = recorded.said
    assert found[0] == said[0]
    assert found[1].startswith(said[1])
    assert recorded.waited is waits
    assert watch._watch is None
