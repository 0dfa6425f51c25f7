"""The plan is a pure function of data, settings, seed and epoch: of nothing else, so of no number of processes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from gpt2ft.data import plan as plan_module
from gpt2ft.data.chunks import Chunks, ConversationTrees
from gpt2ft.data.plan import Plan
from gpt2ft.data.token_tree import counts, weigh
from gpt2ft.random import generator

CAPACITY = 256


class Held:
    """A list of trees in the place of a store."""

    def __init__(self, trees):
        self.trees = trees

    def tree(self, row, group):
        return self.trees[row]

    def keys(self):
        return np.arange(1, len(self.trees) + 1, dtype=np.uint64)


def chunks_of(trees, repeated=0):
    """Of trees that need no store; the first repeats some tokens of another."""
    counted = np.array([counts(tree) for tree in trees])
    rows = np.stack([np.zeros(len(trees), np.int64), np.arange(len(trees))], axis=1)
    whole = np.full(len(trees), -1)
    chunking = ConversationTrees("once", 1 << 20, 1 << 20)
    repeats = np.array([repeated] + [0] * (len(trees) - 1))
    nothing = np.zeros(0, np.int32), np.zeros(len(trees) + 1, np.int64)
    return Chunks([Held(trees)], chunking, rows, counted, whole, *nothing, repeats, left_out=Counter())


@pytest.fixture(scope="module")
def chunks(random_tree):
    """Some 150 random trees."""
    trees = (weigh(random_tree(np.random.default_rng(seed)), "once") for seed in range(200))
    chunks = chunks_of([tree for tree in trees if tree.num_supervised and len(tree.tokens) <= CAPACITY])
    assert len(chunks) > 100
    return chunks


def row_of(plan, steps):
    """The streams of the first steps, one after the other."""
    return [bin for step in range(steps) for bin in plan.micro_batches(step) if bin]


def same(one, other):
    return all(
        (getattr(one, name) == getattr(other, name)).all()
        for name in ["tokens", "positions", "horizons", "supervised", "targets", "weights", "groups"]
    )


@pytest.mark.parametrize("epochs", [1, 3, 4])
@pytest.mark.parametrize("per_step", [1, 7, 8])
def test_every_epoch_holds_every_chunk_once_and_only_the_last_step_is_short(chunks, per_step, epochs):
    """For any number of processes; and the short step is made of streams like any others."""
    plan = Plan(chunks, CAPACITY, per_step, 0, epochs)
    number = len(plan.streams)
    assert number % per_step or per_step == 1
    steps = [plan.micro_batches(step) for step in range(plan.steps)]
    assert all(all(step) and len(step) == per_step for step in steps[:-1])
    row = row_of(plan, plan.steps)
    assert len(row) == epochs * number
    short = len(row) - per_step * (plan.steps - 1)
    assert [bool(bin) for bin in steps[-1]] == [place < short for place in range(per_step)]
    for processes in {1, 2, per_step}:
        shares = [bin for rank in range(processes) for step in steps for bin in step[rank::processes] if bin]
        assert sorted(shares) == sorted(row)
    for epoch in range(epochs):
        here = row[epoch * number : (epoch + 1) * number]
        assert sorted(index for bin in here for index in bin) == list(range(len(chunks)))
    ends = [step for step in range(1, plan.steps + 1) if plan.ends_epoch(step)]
    assert ends == [-(-epoch * number // per_step) for epoch in range(1, epochs + 1)]


def test_without_an_end_no_step_is_short(chunks):
    endless, ends = Plan(chunks, CAPACITY, 8, seed=0), Plan(chunks, CAPACITY, 8, seed=0, epochs=2)
    assert endless.steps is None
    steps = [endless.micro_batches(step) for step in range(ends.steps + 5)]
    assert all(map(all, steps))
    assert steps[: ends.steps - 1] == [ends.micro_batches(step) for step in range(ends.steps - 1)]
    assert not any(ends.micro_batches(ends.steps))


@pytest.mark.parametrize("per_step", [1, 3, 8])
def test_no_step_is_a_small_one_and_none_comes_last_every_time(chunks, per_step):
    """Streams differ by little in their tokens, and each stands in other steps in every epoch."""
    plan = Plan(chunks, CAPACITY, per_step, seed=0)
    tokens = [sum(int(chunks.sizes[bin].sum()) for bin in plan.micro_batches(step)) for step in range(200)]
    assert min(tokens) > 0.6 * np.median(tokens)
    emptiest = min(plan.streams, key=lambda bin: chunks.sizes[bin].sum())
    number = len(plan.streams)
    row = row_of(plan, 10 * number // per_step + 1)
    places = [row[epoch * number : (epoch + 1) * number].index(emptiest) for epoch in range(10)]
    assert len(set(places)) > 5
    assert min(places) < number / 2


def test_a_step_takes_no_stream_twice(chunks):
    """Less data than a step could hold: each step is a whole epoch, as repeating it would not change its mean."""
    plan = Plan(chunks, CAPACITY, 1000, seed=0, epochs=3)
    assert plan.steps == 3
    for step in range(3):
        micro_batches = plan.micro_batches(step)
        assert len(micro_batches) == 1000
        assert sorted(bin for bin in micro_batches if bin) == sorted(plan.streams)
        assert plan.ends_epoch(step + 1)


def test_a_stream_is_no_longer_than_the_fullest_needs(make_tree):
    def plan_of(sizes):
        trees = [weigh(make_tree(("user", 2, -1), ("assistant", size - 2, 0)), "once") for size in sizes]
        return Plan(chunks_of(trees), capacity=8192, micro_batches_per_step=8, seed=0, epochs=2)

    small = plan_of([20] * 50)  # 1,000 tokens
    assert (small.capacity, len(small.streams), small.steps) == (1024, 1, 2)
    assert len(small.training_stream(0, 0).tokens) == 1024
    assert plan_of([100] * 100).capacity == 5120  # two streams, level with each other
    assert plan_of([128] * 64).capacity == 8192


@pytest.mark.parametrize(
    ("streams", "min_steps", "taken", "epochs"),
    [
        (5, 0, 4, 3),
        (5, 15, 1, 3),  # smaller steps are enough
        (5, 20, 1, 4),  # and here one more epoch
        (2, 50, 1, 25),
        (100, 100, 3, 3),
        (1000, 100, 4, 3),  # large data change nothing
    ],
)
def test_small_data_make_smaller_steps_and_then_more_epochs(make_tree, streams, min_steps, taken, epochs):
    trees = [weigh(make_tree(("user", 2, -1), ("assistant", 98, 0)), "once") for _ in range(streams)]
    plan = Plan(chunks_of(trees), 128, 4, seed=0, epochs=3, min_steps=min_steps)
    assert (len(plan.streams), plan.streams_per_step, plan.epochs) == (streams, taken, epochs)
    assert plan.steps >= min_steps
    row = row_of(plan, plan.steps)
    assert Counter(map(tuple, row)) == dict.fromkeys(map(tuple, plan.streams), epochs)
    endless = Plan(chunks_of(trees), 128, 4, seed=0, min_steps=min_steps)
    assert (endless.steps, endless.streams_per_step) == (None, min(4, streams))


def test_two_plans_are_the_same_plan(chunks):
    one, other = (Plan(chunks, CAPACITY, 4, seed=7) for _ in range(2))
    backwards = [other.micro_batches(step) for step in reversed(range(100))]
    assert [one.micro_batches(step) for step in range(100)] == backwards[::-1]
    assert same(one.stream(one.micro_batches(3)[0]), other.stream(other.micro_batches(3)[0]))


def test_epochs_differ_in_order_and_seeds_in_packing(chunks):
    plan = Plan(chunks, CAPACITY, 1, seed=0)
    row, number = row_of(plan, 2 * len(plan.streams)), len(plan.streams)
    first, second = row[:number], row[number:]
    assert number > 20
    assert first != second
    assert sorted(first) == sorted(second)  # the same streams
    other = Plan(chunks, CAPACITY, 1, seed=1)
    assert sorted(map(sorted, plan.streams)) != sorted(map(sorted, other.streams))


def test_a_far_step_is_a_seek(chunks, monkeypatch):
    """One epoch is put in order, once, and nothing else is touched, wherever the step lies."""
    plan = Plan(chunks, CAPACITY, 4, seed=0)
    drawn = []
    monkeypatch.setattr(plan_module, "generator", lambda *key: drawn.append(key) or generator(*key))
    step = 10**6 * len(plan.streams) // 4
    with monkeypatch.context() as patch:
        patch.setattr(Chunks, "tree", lambda *_: pytest.fail("a seek must not read trees"))
        assert len(plan.micro_batches(step)) == 4
        assert drawn == [(0, "order", 10**6)]
    for number in range(4):
        plan.training_stream(step, number)
    assert len(drawn) == 1


def test_all_streams_have_the_same_shapes_and_empty_ones_are_valid(chunks):
    plan = Plan(chunks, CAPACITY, 7, seed=0, epochs=1)
    streams = [plan.stream(bin) for step in range(plan.steps) for bin in plan.micro_batches(step)]
    empty = [stream for stream in streams if not stream.num_tokens]
    assert empty
    assert {(len(stream.tokens), len(stream.targets)) for stream in streams} == {(CAPACITY, plan.target_capacity)}
    assert plan.target_capacity % 64 == 0
    assert sum(stream.num_supervised for stream in streams) == plan.supervised == chunks.supervised.sum()
    assert sum(stream.num_tokens for stream in streams) == plan.tokens == chunks.sizes.sum()
    for stream in empty:
        assert stream.num_supervised == 0
        assert not stream.weights.any()
        assert stream.horizons.tolist() == list(range(1, CAPACITY + 1))


def test_fill_counts_what_stands_there_for_the_first_time(make_tree):
    def plan_of(sizes, repeated=0):
        trees = [weigh(make_tree(("user", 2, -1), ("assistant", size - 2, 0)), "once") for size in sizes]
        return Plan(chunks_of(trees, repeated), capacity=100, micro_batches_per_step=2, seed=0)

    assert plan_of([100, 90, 10]).fill == 1.0
    assert plan_of([100, 90, 20]).fill == pytest.approx(210 / 300)
    assert plan_of([100, 90, 20], repeated=30).fill == pytest.approx(180 / 300)
    assert plan_of([30]).fill == pytest.approx(0.3)


def test_the_digest_tells_what_has_been_trained_on(chunks):
    """Whichever steps were asked for before; and it differs as soon as a stream, their order or a piece does."""
    plan, again = (Plan(chunks, CAPACITY, 3, 0) for _ in range(2))
    found = [plan.digest(step) for step in range(9)]
    assert len(set(found)) == 9
    assert [again.digest(step) for step in (8, 2, 5)] == [found[8], found[2], found[5]]
    assert Plan(chunks, CAPACITY, 3, seed=1).digest(1) != found[1]
    longer = chunks.counts.copy()
    longer[plan.micro_batches(4)[2][0], 1] += 1  # one target more
    other = Plan(replace(chunks, counts=longer), CAPACITY, 3, 0)
    other.streams = plan.streams
    assert [other.digest(step) == found[step] for step in range(9)] == [True] * 5 + [False] * 4


@pytest.mark.parametrize("epochs", [2, None])
def test_the_position_counts_what_the_steps_train_on(chunks, epochs):
    plan = Plan(chunks, CAPACITY, 3, 0, epochs)
    seen = streams = 0
    assert plan.position(0)["tokens_seen"] == plan.position(0)["epoch"] == 0
    for step in range(plan.steps or 30):
        for number in range(3):
            stream = plan.training_stream(step, number)
            seen += stream.num_tokens - stream.num_repeated
            streams += bool(stream.num_tokens)
        position = plan.position(step + 1)
        assert position["tokens_seen"] == seen
        assert position["epoch"] == streams / len(plan.streams)
    assert streams > len(plan.streams)
    if epochs:
        assert position["epoch"] == 2
