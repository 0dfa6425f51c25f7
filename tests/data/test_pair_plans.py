"""A plan of preferences: every pair once in an epoch, whoever computes it, and its replies where the plan says."""

from collections import Counter

import numpy as np
import pytest
import torch

from gpt2ft.data.chunks import chunk
from gpt2ft.data.kinds import PREFERENCES
from gpt2ft.data.packing import build_pairs, build_stream, number_replies
from gpt2ft.data.pairs import PreferencePairs
from gpt2ft.data.plan import Plan
from gpt2ft.data.store import open_store
from gpt2ft.settings.sections import FilterSettings

CAPACITY = 256


@pytest.fixture(scope="module")
def store(tokenizer, cache):
    return open_store("quickstart", FilterSettings(), tokenizer, cache, kind=PREFERENCES)


@pytest.fixture(scope="module", params=[(256, "all"), (64, "all"), (256, "adjacent")])
def chunks(request, store):
    """Of the quickstart's groups; with 64 tokens of context many are cut, so that some come in parts."""
    max_length, rule = request.param
    rows = np.array([(0, row) for row in range(len(store))])
    capacity = CAPACITY if max_length == 256 else 96
    return chunk([store], rows, PreferencePairs(rule, "prompt", max_length, capacity))


def plan_of(chunks, per_step=4, seed=0, epochs=1):
    """With the number of each reply in the place of its log-prob, so that streams tell which is which."""
    plan = Plan(chunks, CAPACITY, per_step, seed, epochs)
    assert np.isnan(plan.reference).all()
    plan.reference = np.arange(len(plan.reference), dtype=np.float64)
    return plan


def replies_in_order(chunks):
    """[(row, message, tokens after the role)] of each reply, chunk by chunk."""
    found = []
    for index in range(len(chunks)):
        tree = chunks.tree(index)
        for node in np.flatnonzero(tree.weights).tolist():
            tokens = tree.tokens[tree.starts[node] + 1 : tree.starts[node] + tree.lengths[node]]
            found.append((int(chunks.rows[index, 1]), int(tree.messages[node]), tokens.tolist()))
    return found


def real_pairs(stream):
    return stream.pairs.weights > 0


def epoch_streams(plan, rank, processes):
    for step in range(plan.steps):
        for number in range(rank, plan.micro_batches_per_step, processes):
            yield plan.micro_batches(step)[number], plan.training_stream(step, number)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_pair_once_in_an_epoch_for_any_number_of_processes(store, chunks, processes):
    replies = replies_in_order(chunks)
    expected = Counter()
    for row in range(len(store)):
        tree = chunks.chunking.whole(store, row, 0)
        expected.update((row, chosen, rejected) for chosen, rejected in tree.messages[tree.pairs].tolist())
    assert not chunks.left_out
    for epochs in (1, 3):
        plan = plan_of(chunks, epochs=epochs)
        found, weights = Counter(), Counter()
        for rank in range(processes):
            for _, stream in epoch_streams(plan, rank, processes):
                names = stream.pairs.reference[stream.pairs.index].long()[real_pairs(stream)].tolist()
                for (chosen, rejected), weight in zip(names, stream.pairs.weights.tolist(), strict=False):
                    row, message, _ = replies[chosen]
                    found[row, message, replies[rejected][1]] += 1
                    weights[row] += weight
                    assert replies[rejected][0] == row
        assert found == Counter({pair: number * epochs for pair, number in expected.items()})
        assert list(weights.values()) == pytest.approx([epochs] * len(store))
    assert chunks.is_cut.any() == (chunks.chunking.max_length == 64)
    assert chunks.pairs.sum() == expected.total() > 250


def test_the_replies_of_a_micro_batch_are_those_of_its_stream(chunks):
    plan = plan_of(chunks)
    replies = replies_in_order(chunks)
    seen = []
    for micro_batch, stream in epoch_streams(plan, 0, 1):
        numbers = plan.replies_of(micro_batch).tolist()
        assert stream.pairs.reference[: len(numbers)].tolist() == numbers
        real = slice(stream.num_supervised)
        for group, number in enumerate(numbers):
            targets = stream.targets[real][stream.groups[real] == group].tolist()
            assert targets == replies[number][2]
            assert stream.pairs.lengths[group] == len(targets)
        assert set(stream.groups[real].tolist()) == set(range(len(numbers)))
        seen += numbers
    assert sorted(seen) == list(range(len(replies)))


def test_the_tail_of_a_stream_compares_nothing(chunks):
    plan = plan_of(chunks)
    shapes, tails = set(), 0
    for micro_batch, stream in epoch_streams(plan, 0, 1):
        pairs = stream.pairs
        num_pairs, num_replies = (int(number[micro_batch].sum()) for number in (chunks.pairs, chunks.replies))
        assert real_pairs(stream).tolist() == [True] * num_pairs + [False] * (len(pairs.weights) - num_pairs)
        assert pairs.num_pairs == num_pairs
        assert not pairs.index[num_pairs:].any()
        assert not pairs.reference[num_replies:].any()
        assert (pairs.lengths[num_replies:] == 1).all()
        assert int(pairs.index.max()) < max(num_replies, 1)
        shapes.add((len(pairs.weights), len(pairs.reference)))
        tails += num_pairs < len(pairs.weights)
    assert len(shapes) == 1
    assert tails > 0
    empty = plan.stream([]).pairs
    assert (len(empty.weights), len(empty.reference)) in shapes
    assert not empty.weights.any()
    assert not empty.index.any()


def test_what_is_not_yet_known_of_the_reference_is_no_number(chunks):
    stream = Plan(chunks, CAPACITY, 4, seed=0).stream([0, 1])
    known = int(chunks.replies[[0, 1]].sum())
    assert torch.isnan(stream.pairs.reference).tolist() == [True] * known + [False] * (
        len(stream.pairs.reference) - known
    )


def test_more_pairs_or_replies_than_there_is_room_for_are_refused(chunks):
    trees = number_replies([chunks.tree(0), chunks.tree(1)])
    pairs, replies = (int(number[:2].sum()) for number in (chunks.pairs, chunks.replies))
    reference = np.zeros(replies)
    assert build_pairs(trees, reference, pairs, replies).weights.all()
    for capacity in ((pairs - 1, replies), (pairs, replies - 1)):
        with pytest.raises(ValueError, match=f"{pairs} pairs of {replies} replies .* {capacity[0]}, {capacity[1]}"):
            build_pairs(trees, reference, *capacity)


def test_a_group_is_in_a_stream_what_it_is_alone(chunks):
    plan = plan_of(chunks)
    micro_batch = max(plan.streams, key=len)
    assert len(micro_batch) > 1
    packed = plan.stream(micro_batch)
    at = scored = replies = pairs = 0
    for index in micro_batch:
        alone = plan.stream([index])
        tokens, targets = slice(at, at + alone.num_tokens), slice(scored, scored + alone.num_supervised)
        assert torch.equal(packed.tokens[tokens], alone.tokens[: alone.num_tokens])
        assert torch.equal(packed.positions[tokens], alone.positions[: alone.num_tokens])
        assert torch.equal(packed.horizons[tokens] - at, alone.horizons[: alone.num_tokens])
        assert torch.equal(packed.supervised[targets] - at, alone.supervised[: alone.num_supervised])
        assert torch.equal(packed.targets[targets], alone.targets[: alone.num_supervised])
        assert torch.equal(packed.groups[targets] - replies, alone.groups[: alone.num_supervised])
        here = slice(pairs, pairs + int(chunks.pairs[index]))
        assert torch.equal(packed.pairs.index[here] - replies, alone.pairs.index[real_pairs(alone)])
        assert torch.equal(packed.pairs.weights[here], alone.pairs.weights[real_pairs(alone)])
        at, scored = tokens.stop, targets.stop
        replies, pairs = replies + int(chunks.replies[index]), here.stop
    assert (at, scored) == (packed.num_tokens, packed.num_supervised)


def test_a_reply_sees_its_prompt_and_no_other_reply(chunks):
    """In numbers: each reply's tokens are within no other's horizon, and all of the prompt's reach to the end."""
    index = int(np.argmax(chunks.replies))
    tree = chunks.tree(index)
    stream = build_stream([tree], CAPACITY, 256)
    prompt = int(tree.lengths[tree.weights == 0].sum())
    assert (stream.horizons[:prompt] == len(tree.tokens)).all()
    for node in np.flatnonzero(tree.weights).tolist():
        here = slice(int(tree.starts[node]), int(tree.starts[node] + tree.lengths[node]))
        assert (stream.horizons[here] == here.stop).all()
        assert stream.positions[here].tolist() == list(range(prompt, prompt + int(tree.lengths[node])))
    assert chunks.replies[index] >= 2
