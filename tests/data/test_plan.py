"""The plan is a pure function of data, settings, seed and epoch: of nothing else, so of no number of processes."""

from collections import Counter

import numpy as np
import pytest
import torch

from gpt2ft.data import plan as plan_module
from gpt2ft.data.augmentation import Augmentation
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


def chunks_of(trees, repeated=0):
    """Of trees that need no store."""
    counted = np.array([counts(tree) for tree in trees])
    rows = np.stack([np.zeros(len(trees), np.int64), np.arange(len(trees))], axis=1)
    whole = np.full(len(trees), -1)
    chunking = ConversationTrees("once", 1 << 20, 1 << 20)
    return Chunks([Held(trees)], chunking, rows, counted, whole, left_out=Counter(), repeated=repeated)


@pytest.fixture(scope="module")
def chunks(random_tree):
    """Some 150 random trees."""
    trees = (weigh(random_tree(np.random.default_rng(seed)), "once") for seed in range(200))
    chunks = chunks_of([tree for tree in trees if tree.num_supervised and len(tree.tokens) <= CAPACITY])
    assert len(chunks) > 100
    return chunks


def epoch_of(plan, epoch=0):
    """All micro-batches of an epoch, step by step."""
    first = epoch * plan.steps_per_epoch
    return [plan.micro_batches(step) for step in range(first, first + plan.steps_per_epoch)]


def streams_of(steps):
    return [bin for step in steps for bin in step]


def same(one, other):
    return all(
        (getattr(one, name) == getattr(other, name)).all()
        for name in ["tokens", "positions", "horizons", "supervised", "targets", "weights", "groups"]
    )


@pytest.mark.parametrize("per_step", [1, 3, 8, 1000])
def test_an_epoch_holds_every_chunk_once_for_any_number_of_processes(chunks, per_step):
    plan = Plan(chunks, CAPACITY, per_step, seed=0)
    for epoch in range(3):
        steps = epoch_of(plan, epoch)
        assert all(len(step) == per_step for step in steps)
        for processes in {1, 2, per_step}:
            shares = [[bin for step in steps for bin in step[rank::processes]] for rank in range(processes)]
            seen = sorted(index for share in shares for bin in share for index in bin)
            assert seen == list(range(len(chunks)))


def test_two_plans_are_the_same_plan(chunks):
    one, other = (Plan(chunks, CAPACITY, 4, seed=7) for _ in range(2))
    assert [epoch_of(one, epoch) for epoch in (0, 1, 5)] == [epoch_of(other, epoch) for epoch in (0, 1, 5)]
    backwards = [other.micro_batches(step) for step in reversed(range(20))]
    assert [one.micro_batches(step) for step in range(20)] == backwards[::-1]
    assert same(one.stream(one.micro_batches(3)[0]), other.stream(other.micro_batches(3)[0]))


def test_epochs_differ_in_order_and_seeds_in_packing(chunks):
    plan = Plan(chunks, CAPACITY, 4, seed=0)
    assert plan.steps_per_epoch > 5
    first, second = epoch_of(plan, 0), epoch_of(plan, 1)
    assert first != second
    assert sorted(streams_of(first)) == sorted(streams_of(second))  # the same streams
    other = Plan(chunks, CAPACITY, 4, seed=1)
    assert sorted(map(sorted, plan.streams)) != sorted(map(sorted, other.streams))


def test_evaluation_goes_through_the_streams_in_one_order(chunks):
    plan = Plan(chunks, CAPACITY, 4, seed=0, shuffle=False)
    assert epoch_of(plan, 0) == epoch_of(plan, 3)
    assert streams_of(epoch_of(plan))[: len(plan.streams)] == plan.streams


def test_the_short_last_step_holds_the_emptiest_streams(chunks):
    per_step = next(n for n in range(3, 20) if len(Plan(chunks, CAPACITY, 1, 0).streams) % n > 1)
    plan = Plan(chunks, CAPACITY, per_step, seed=0)
    short = len(plan.streams) % per_step
    filled = sorted(sum(chunks.sizes[index] for index in bin) for bin in plan.streams)
    for epoch in range(3):
        *_, last = epoch_of(plan, epoch)
        assert [bool(bin) for bin in last] == [True] * short + [False] * (per_step - short)
        assert sorted(sum(chunks.sizes[index] for index in bin) for bin in last if bin) == filled[:short]


def test_a_far_step_is_a_seek(chunks, monkeypatch):
    """One epoch is put in order and nothing else is touched, wherever the step lies."""
    plan = Plan(chunks, CAPACITY, 4, seed=0)
    drawn = []
    monkeypatch.setattr(plan_module, "generator", lambda *key: drawn.append(key) or generator(*key))
    monkeypatch.setattr(Chunks, "tree", lambda *_: pytest.fail("a seek must not read trees"))
    assert len(plan.micro_batches(10**6)) == 4
    assert drawn == [(0, "order", 10**6 // plan.steps_per_epoch)]


def test_all_streams_have_the_same_shapes_and_empty_ones_are_valid(chunks):
    plan = Plan(chunks, CAPACITY, 7, seed=0)
    streams = [plan.stream(bin) for bin in streams_of(epoch_of(plan))]
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


def test_fill_leaves_the_last_stream_out(make_tree):
    def plan_of(sizes, repeated=0):
        trees = [weigh(make_tree(("user", 2, -1), ("assistant", size - 2, 0)), "once") for size in sizes]
        return Plan(chunks_of(trees, repeated), capacity=100, micro_batches_per_step=2, seed=0)

    assert plan_of([100, 90, 10]).fill == 1.0  # two streams: the full one counts
    assert plan_of([100, 90, 20]).fill == pytest.approx(190 / 200)
    assert plan_of([100, 90, 20], repeated=38).fill == pytest.approx(152 / 200)
    assert plan_of([30]).fill == pytest.approx(0.3)  # the only stream counts


def test_position_jitter_moves_whole_trees_within_the_context(chunks):
    """Positions alone change, by one number for each tree; the longest path still ends within max_length."""
    longest = max(int((chunks.tree(i).depths + chunks.tree(i).lengths).max()) for i in range(len(chunks)))
    still = Plan(chunks, CAPACITY, 4, seed=0)
    moved = Plan(chunks, CAPACITY, 4, seed=0, augmentation=Augmentation(position_jitter=40, max_length=longest + 20))
    shifts = []
    for step in range(3):
        for number, micro_batch in enumerate(still.micro_batches(step)):
            expected, found = still.training_stream(step, number), moved.training_stream(step, number)
            assert torch.equal(expected.tokens, found.tokens)
            assert torch.equal(expected.horizons, found.horizons)
            assert torch.equal(expected.positions, still.stream(micro_batch).positions)
            assert torch.equal(found.positions, moved.training_stream(step, number).positions)
            assert int(found.positions.max()) < longest + 20
            start = 0
            for index in micro_batch:
                end = start + len(chunks.tree(index).tokens)
                shift = (found.positions - expected.positions)[start:end]
                assert shift.min() == shift.max()
                shifts.append(int(shift[0]))
                start = end
    assert min(shifts) < 10
    assert 30 < max(shifts) <= 40
    assert len(set(shifts)) > 10
