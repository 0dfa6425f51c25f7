"""The process at fault is named, nobody else is, and whoever is slow but alive is left alone."""

import socket
import sys
import threading
from contextlib import nullcontext
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import free_port, wait_until

from gpt2ft.distributed import watchdog
from gpt2ft.distributed.launch_checks import LaunchError
from gpt2ft.distributed.signals import Preempted
from gpt2ft.distributed.watchdog import Heartbeat, Watchdog

ROUND = 2.0  # seconds
LIMIT, LONG_LIMIT = 60.0, 1800.0


def of_rank(rank, num_processes, store=None, device="cpu"):
    accelerator = SimpleNamespace(
        process_index=rank, num_processes=num_processes, device=torch.device(device), wait_for_everyone=lambda: None
    )
    return Watchdog(store, accelerator)


class Group:
    """Some processes, as rank 0 hears of them round by round."""

    def __init__(self, num_processes):
        self.watchdog = of_rank(0, num_processes)
        self.beats = [Heartbeat(0, f"host{rank // 2}", "step 41", LIMIT, 7, 0, None) for rank in range(num_processes)]

    def change(self, rank, **changes):
        self.beats[rank] = self.beats[rank]._replace(**changes)

    def rounds(self, seconds, silent=(), living=()):
        """The sentence, the ranks at fault, and after how many seconds; None if nothing was found."""
        for number in range(round(seconds / ROUND)):
            for rank, beat in enumerate(self.beats):
                is_heard = rank not in silent and beat.place != "finished"
                self.beats[rank] = beat._replace(number=beat.number + is_heard, signs=beat.signs + (rank in living))
            found = self.watchdog.diagnose(list(self.beats), ROUND)
            if found is not None:
                return *found, number * ROUND
        return None


def test_processes_that_get_on_are_left_alone():
    assert Group(3).rounds(1000, living=(0, 1, 2)) is None


def test_one_without_heartbeats_is_named_within_half_a_minute():
    group = Group(4)
    group.change(3, place="step 42")
    sentence, suspects, seconds = group.rounds(100, silent=[3], living=[0, 1, 2])
    assert "rank 3 (host host1)" in sentence
    assert "no heartbeat for" in sentence
    assert "step 42" in sentence
    assert suspects == [3]
    assert 20 < seconds <= 32


def test_many_without_heartbeats_are_counted():
    sentence, suspects, _ = Group(8).rounds(100, silent=range(2, 8))
    for named in ("rank 2 (host host1)", "rank 3 (host host1)", "rank 4 (host host2)", "3 others"):
        assert named in sentence
    assert "rank 5" not in sentence
    assert suspects == [2, 3, 4, 5, 6, 7]


def test_the_one_that_all_wait_for_is_named():
    """It has begun fewer collectives than the others, and none shows a sign of life."""
    group = Group(3)
    for rank in (0, 2):
        group.change(rank, collectives=8)
    sentence, suspects, seconds = group.rounds(200)
    assert "no process has got on for" in sentence
    assert "rank 1 (host host0), last at step 41" in sentence
    assert suspects == [1]
    assert LIMIT <= seconds <= LIMIT + 2 * ROUND


@pytest.mark.parametrize("living", [0, 1])
def test_nobody_is_named_while_one_gets_on(living):
    group = Group(2)
    group.change(1, collectives=1000)
    assert group.rounds(10_000, living=[living]) is None


def test_where_all_stand_no_one_is_singled_out():
    sentence, suspects, _ = Group(2).rounds(200)
    assert "no process has got on for" in sentence
    assert suspects == [0, 1]


def test_the_awaited_process_says_how_long_it_may_take():
    """Rank 1 saves; the others have begun a step that is long over."""
    group = Group(2)
    group.change(0, collectives=8)
    group.change(1, limit=LONG_LIMIT, place="saving")
    assert group.rounds(LONG_LIMIT) is None
    assert group.rounds(10)[1] == [1]


def test_one_that_has_finished_is_waited_for_by_nobody():
    group = Group(2)
    group.change(1, place="finished")
    assert group.rounds(1000, living=[0]) is None
    assert group.rounds(1000) is None  # nor is the last one


def test_one_that_has_failed_is_named_if_its_launcher_does_not_end_the_others():
    group = Group(2)
    group.change(1, place=repr(OSError("no space left")))
    sentence, suspects, _ = group.rounds(100, silent=[1], living=[0])
    assert "rank 1 (host host0)" in sentence
    assert "OSError('no space left')" in sentence
    assert suspects == [1]


@pytest.mark.parametrize(
    ("suspects", "speakers"), [([1], [0, 2]), ([0], [1, 2]), ([0, 1], [0, 2]), ([0, 1, 2, 3], [0, 2]), ([], [0, 2])]
)
def test_one_process_on_each_machine_speaks(suspects, speakers, monkeypatch):
    said, dumped = [], []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda file: dumped.append(file))
    for rank in range(4):
        monkeypatch.setattr(watchdog, "give_up", lambda problem, rank=rank: problem and said.append(rank))
        monkeypatch.setattr(watchdog.socket, "gethostname", lambda rank=rank: f"host{rank // 2}")
        each = of_rank(rank, 4)
        each.interval = -0.25  # so that the others wait for torchrun no longer than is left of a second
        each.beats = Group(4).beats
        each.end("something is wrong", suspects)
    assert sorted(said) == (
        speakers if suspects else [0, 1, 2, 3]
    )  # without the store, the speaker may be lost with it
    assert len(dumped) == len(suspects)


@pytest.mark.parametrize(("rank", "suspects"), [(0, [3]), (1, [3]), (1, [])])
def test_one_that_ends_by_itself_meanwhile_says_nothing(rank, suspects, monkeypatch):
    """As torchrun has told it to, or after the first process has ended well and taken the store along."""
    monkeypatch.setattr(watchdog, "give_up", lambda problem: pytest.fail(problem))
    each = of_rank(rank, 4)
    each.beats = [beat._replace(host=socket.gethostname()) for beat in Group(4).beats]
    each.over.set()
    each.end("something is wrong", suspects)


# --- signs of life --------------------------------------------------------------------------------------------------


class Observed:
    """A watchdog that sends from a thread of its own, with this thread waiting at one place."""

    def __init__(self, device):
        self.watchdog = of_rank(0, 1, device=device)
        self.watchdog.interval = 0.5

    def shows_life(self, act):
        """What the heartbeat after `act` says; before that all threads have come to rest."""
        signs = []

        def send():
            self.watchdog.beat()
            signs.append(self.watchdog.signs)

        def work():
            wait_until(lambda: send() or signs[-3:].count(signs[-1]) == 3)
            act()
            send()

        thread = Thread(target=work)
        thread.start()
        thread.join()
        return signs[-1] > signs[-2]


@pytest.fixture
def observed(monkeypatch):
    """observed("cuda"): what pytest and earlier tests have left running in threads of their own is not looked at."""
    strangers = set(threading.enumerate()) - {threading.current_thread()}
    all_frames = sys._current_frames

    def frames():
        own = {thread.ident for thread in threading.enumerate() if thread not in strangers}
        return {ident: top for ident, top in all_frames().items() if ident in own}

    monkeypatch.setattr(sys, "_current_frames", frames)
    return lambda device="cpu": Observed(device)


def test_a_process_that_stands_still_shows_none(observed):
    assert not observed().shows_life(lambda: None)


def test_python_code_that_moves_on_is_a_sign_of_life(observed):
    """In any thread."""
    first, at_second, end = Event(), Event(), Event()

    def work():
        first.wait()
        at_second.set()
        end.wait()

    thread = Thread(target=work)
    thread.start()

    def move_on():
        first.set()
        at_second.wait()

    assert observed().shows_life(move_on)
    end.set()
    thread.join()


def test_bytes_are_a_sign_of_life(observed, tmp_path):
    """As in a download by one call of a library."""
    assert observed().shows_life(lambda: (tmp_path / "download").write_bytes(bytes(2**22)))


def compute():
    began = watchdog.time.process_time()
    while watchdog.time.process_time() - began < 0.2:
        pass


def test_computing_is_a_sign_of_life_on_a_cpu(observed):
    """A process that waits for its GPU seems to compute."""
    assert observed().shows_life(compute)
    assert not observed("cuda").shows_life(compute)


def test_collectives_are_counted_in_all_groups():
    """By PyTorch's own numbers, through names that it does not promise to keep."""
    each = of_rank(0, 1)

    def counted():
        return Heartbeat(*watchdog.json.loads(each.beat())).collectives

    assert counted() == 0
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(1))
        dist.barrier()
        assert counted() == 2
        dist.all_reduce(torch.ones(1), group=dist.new_group([0]))
        assert counted() == 3
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("marks", "place", "limit"),
    [
        ([], "getting ready", LONG_LIMIT),
        ([("step", 300)], "step 300", LONG_LIMIT),  # compiles
        ([("step", 300), ("step", 301)], "step 301", LIMIT),
        ([("step", 300), ("saving", None)], "saving", LONG_LIMIT),
        ([("step", 300), ("saving", None), ("step", 301)], "step 301", LIMIT),
        ([("step", 300), ("step", 301), ("held-out stream", 0)], "held-out stream 0", LONG_LIMIT),
    ],
)
def test_a_step_that_is_not_the_first_has_the_shorter_limit(marks, place, limit, monkeypatch):
    each = of_rank(0, 2)
    monkeypatch.setattr(watchdog, "_watchdog", each)
    for mark in marks:
        watchdog.mark_progress(*mark)
    assert (each.place, each.limit) == (place, limit)


# --- the thread -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(monkeypatch):
    """Two watchdogs of one process, and a queue of what they would end with."""
    monkeypatch.setenv("GPT2FT_PATIENCE", "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    ends = []
    found = Event()

    def end(each, problem, suspects):
        ends.append((problem, suspects))
        each.over.set()
        found.set()

    monkeypatch.setattr(Watchdog, "end", end)
    server = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    both = [of_rank(rank, 2, server.clone()) for rank in range(2)]
    for each in both:
        each.store.set(each.keys[each.rank], each.beat())
    for each in both:
        each.start()
    yield SimpleNamespace(one=both[0], other=both[1], ends=ends, found=found)
    for each in both:
        each.over.set()
        each.join()


def finish(each):
    each.place = "finished"
    each.over.set()
    each.join()


def test_one_that_finishes_is_not_missed(pair):
    finish(pair.other)
    assert not pair.found.wait(4)  # twice as long as one may be silent
    assert pair.ends == []


def test_one_that_falls_silent_is_named_by_the_other(pair):
    pair.other.place = "step 3"
    pair.other.store = SimpleNamespace(set=lambda *_: None, multi_get=pair.other.store.multi_get)
    assert pair.found.wait(60)
    problem, suspects = pair.ends[0]
    assert f"rank 1 (host {socket.gethostname()})" in problem
    assert suspects == [1]


def test_one_that_another_process_has_named_is_named_at_once(pair):
    """So that processes whose clocks differ end for the same reason."""
    pair.one.diagnosis = ("it hangs", [1])
    assert pair.found.wait(60)
    pair.found.clear()
    assert len(pair.ends) == 2 or pair.found.wait(60)
    assert pair.ends == [("it hangs", [1])] * 2


@pytest.mark.parametrize("answer", ["error", "none"])
def test_a_store_that_is_gone_is_named(pair, answer):
    """PyTorch's own time limit ends some calls only: others wait for a store that is frozen."""
    thawed = Event()

    def gone(_):
        if answer == "none":
            thawed.wait()
        raise dist.DistNetworkError("connection reset")

    for each in (pair.one, pair.other):
        each.store = SimpleNamespace(set=lambda *_: None, multi_get=gone)
    assert pair.found.wait(60)
    thawed.set()
    assert "the store on 127.0.0.1" in pair.ends[0][0]
    assert pair.ends[0][1] == []


# --- what the rest of the program sees ------------------------------------------------------------------------------


def test_one_process_has_no_watchdog(monkeypatch):
    watchdog.start(SimpleNamespace(num_processes=1))
    watchdog.mark_progress("step", 1)
    assert watchdog._watchdog is None
    monkeypatch.setenv("GPT2FT_PATIENCE", "0")
    watchdog.start(SimpleNamespace(num_processes=2))
    assert watchdog._watchdog is None


@pytest.mark.parametrize("value", ["a minute", "-1", "nan", "inf"])
def test_a_patience_that_is_no_number_of_seconds_is_refused(value, monkeypatch):
    monkeypatch.setenv("GPT2FT_PATIENCE", value)
    with pytest.raises(LaunchError, match=rf"GPT2FT_PATIENCE .*'{value}'"):
        watchdog.start(SimpleNamespace(num_processes=2))


@pytest.mark.parametrize(
    ("error", "said", "waits"),
    [
        (None, "finished", False),
        (Preempted("saved"), "finished", False),
        (OSError("disk full\nreally"), "OSError('disk full", False),
        (KeyboardInterrupt(), "KeyboardInterrupt", False),
        (RuntimeError("[gloo/pair.cc] Connection closed by peer"), "RuntimeError('[gloo/pair.cc] C", True),
        (dist.DistBackendError("NCCL error"), "DistBackendError('NCCL error", True),
    ],
)
def test_the_others_are_told_how_it_ends(error, said, waits, monkeypatch):
    waited = []
    over = SimpleNamespace(set=lambda: None, wait=waited.append)
    each = SimpleNamespace(over=over, interval=2.0, max_silence=30.0, join=lambda timeout: None)
    monkeypatch.setattr(watchdog, "_watchdog", each)
    with nullcontext() if error is None else pytest.raises(type(error)), watchdog.announce_end():
        if error is not None:
            raise error
    assert each.place.startswith(said)
    assert bool(waited) is waits
    assert watchdog._watchdog is None
