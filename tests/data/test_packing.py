"""No bin overflows and hardly one is wasted; a stream is exactly the one drawn in gpt2ft/stream.py."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2ft.data.chunks import ConversationTrees, chunk
from gpt2ft.data.packing import build_stream, level, pack
from gpt2ft.data.plan import Plan
from gpt2ft.data.store import open_store
from gpt2ft.data.token_tree import weigh
from gpt2ft.random import generator
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.stream import visible


def random_sizes(seed):
    """A few hundred sizes of one of several shapes, and a capacity that holds the largest."""
    random = np.random.default_rng(seed)
    number = int(random.integers(1, 400))
    kinds = [
        random.integers(1, 1001, number),
        np.minimum(1000, random.lognormal(5, 1, number).astype(np.int64) + 1),
        np.full(number, 7),
        random.choice([1, 250, 500, 750, 1000], number),
    ]
    sizes = kinds[seed % len(kinds)].astype(np.int64)
    return sizes, int(sizes.max() + random.integers(0, 1000))


def first_fit(sizes, capacity):
    """How many bins first-fit needs, in the order of the data."""
    free = []
    for size in sizes.tolist():
        for bin, room in enumerate(free):
            if room >= size:
                free[bin] -= size
                break
        else:
            free.append(capacity - size)
    return len(free)


class TestPack:
    def test_every_item_once_and_no_bin_too_full(self):
        most = 0
        for seed in range(100):
            sizes, capacity = random_sizes(seed)
            bins = pack(sizes, capacity, generator(seed, "packing"))
            assert sorted(item for bin in bins for item in bin) == list(range(len(sizes)))
            assert all(0 < sizes[bin].sum() <= capacity for bin in bins)
            assert len(bins) <= first_fit(sizes, capacity) + 1
            most = max(most, len(bins))
        assert most > 50

    def test_an_exact_fit_is_found(self):
        sizes = np.array([60, 50, 50, 40, 30, 70, 100])
        bins = pack(sizes, 100, generator(0, "packing"))
        assert sorted(sorted(sizes[bin].tolist()) for bin in bins) == [[30, 70], [40, 60], [50, 50], [100]]

    def test_the_fullest_bin_that_still_holds_an_item(self):
        assert pack(np.array([80, 55, 20]), 100, generator(0, "packing")) == [[0, 2], [1]]

    def test_the_seed_alone_decides(self):
        sizes = np.random.default_rng(0).integers(100, 1000, 500)
        first, again, other = (pack(sizes, 4096, generator(seed, "packing")) for seed in (3, 3, 4))
        assert first == again
        assert first != other

    def test_nothing_to_pack(self):
        assert pack(np.array([], np.int64), 100, generator(0, "packing")) == []

    def test_an_item_larger_than_a_bin_is_refused(self):
        with pytest.raises(ValueError, match="101 .* 100"):
            pack(np.array([5, 101]), 100, generator(0, "packing"))


class TestLevel:
    def test_nothing_is_lost_and_no_bin_stays_nearly_empty(self):
        """The emptiest bin holds a few left-over items before, and nearly as much as the others after."""
        lifted = 0
        for seed in range(100):
            sizes, capacity = random_sizes(seed)
            bins = pack(sizes, capacity, generator(seed, "packing"))
            before = sorted(int(sizes[bin].sum()) for bin in bins)
            levelled = level([list(bin) for bin in bins], sizes)
            loads = sorted(int(sizes[bin].sum()) for bin in levelled)
            assert sorted(item for bin in levelled for item in bin) == list(range(len(sizes)))
            assert len(loads) == len(before)
            assert loads[-1] <= capacity
            assert loads[0] >= before[0]
            lifted += before[0] < 0.5 * np.median(before) and loads[0] > 0.75 * np.median(loads)
        assert lifted > 20

    def test_the_fullest_hand_over_their_last_item_first(self):
        sizes = np.array([60, 40, 50, 30, 10, 90])
        assert level([[0, 1], [2, 3, 4], [5]], sizes) == [[0, 1], [2, 3, 4], [5]]  # none would be fuller for it
        sizes = np.array([60, 30, 10, 50, 40, 5, 5])
        assert level([[0, 1, 2], [3, 4, 5], [6]], sizes) == [[0], [3, 4], [6, 2, 5, 1]]


class TestBuildStream:
    """The drawing: a prompt P with the replies A and B, an unrelated conversation C, one token of tail."""

    def drawn(self, make_tree, capacity=8, target_capacity=4):
        prompt = weigh(make_tree(("user", 2, -1), ("assistant", 2, 0), ("assistant", 1, 0), group=5), "once")
        other = weigh(make_tree(("assistant", 2, -1), group=6), "leaves")
        return build_stream([prompt, other], capacity, target_capacity)

    def test_exact_arrays(self, make_tree):
        stream = self.drawn(make_tree)
        assert stream.tokens.tolist() == [0, 1, 1000, 1001, 2000, 0, 1, 0]
        assert stream.positions.tolist() == [0, 1, 2, 3, 2, 0, 1, 0]
        assert stream.horizons.tolist() == [5, 5, 4, 4, 5, 7, 7, 8]
        assert stream.supervised.tolist() == [2, 5, 0, 0]  # B is one token: nothing of it is scored
        assert stream.targets.tolist() == [1001, 1, 0, 0]
        assert stream.weights.tolist() == [1, 1, 0, 0]
        assert stream.groups.tolist() == [5, 6, 0, 0]
        assert (stream.num_tokens, stream.num_supervised) == (7, 2)

    def test_types(self, make_tree):
        stream = self.drawn(make_tree)
        whole = (stream.tokens, stream.positions, stream.horizons, stream.supervised, stream.targets, stream.groups)
        assert {tensor.dtype for tensor in whole} == {torch.int64}
        assert stream.weights.dtype == torch.float32

    def test_who_sees_whom(self, make_tree):
        rows = ["".join(".#"[seen] for seen in row) for row in visible(self.drawn(make_tree).horizons).tolist()]
        assert rows == [
            "#.......",  # P
            "##......",
            "###.....",  # A sees P
            "####....",
            "##..#...",  # B sees P, not A
            ".....#..",  # C sees C
            ".....##.",
            ".......#",  # the tail sees itself
        ]

    def test_an_empty_stream(self):
        stream = build_stream([], 128, 64)
        assert stream.horizons.tolist() == list(range(1, 129))
        assert stream.weights.sum() == 0
        assert (stream.num_tokens, stream.num_supervised) == (0, 0)
        assert (len(stream.tokens), len(stream.supervised)) == (128, 64)

    def test_exactly_full(self, make_tree):
        stream = self.drawn(make_tree, capacity=7, target_capacity=2)
        assert (len(stream.tokens), len(stream.targets)) == (7, 2)

    @pytest.mark.parametrize(("capacity", "target_capacity"), [(6, 4), (8, 1)])
    def test_what_does_not_fit_is_refused(self, make_tree, capacity, target_capacity):
        with pytest.raises(ValueError, match=f"7 tokens, 2 targets .* {capacity}, {target_capacity}"):
            self.drawn(make_tree, capacity, target_capacity)

    def test_targets_are_the_next_token_of_the_same_node(self, random_tree):
        scored = 0
        for seed in range(50):
            random = np.random.default_rng(seed)
            trees = [weigh(random_tree(random), "leaves") for _ in range(3)]
            stream = build_stream(trees, 2048, 1024)
            assert stream.num_supervised == sum(tree.num_supervised for tree in trees)
            real = slice(stream.num_supervised)
            index, targets = stream.supervised[real], stream.targets[real]
            assert torch.equal(stream.tokens[index + 1], targets)
            assert torch.equal(stream.tokens[index] + 1, targets)  # message and offset are spelled by the token
            assert (stream.weights[real] > 0).all()
            assert not stream.weights[stream.num_supervised :].any()
            assert (targets % 1000).min() == 1  # every supervised node from its role token on
            scored += stream.num_supervised
        assert scored > 5000


@pytest.mark.parametrize("capacity", [4096, 8192, 16384])
def test_streams_of_real_conversations_are_full(test_data, gpt2_tokenizer, cache, capacity):
    """No more streams than if 98 % of each were tokens that stand in no other place."""
    files = [test_data("oasst/en_100_tree.jsonl"), test_data("oasst/oasst1_en_validation.messages.jsonl")]
    stores = [open_store(str(file), FilterSettings(), gpt2_tokenizer, Path(cache)) for file in files]
    rows = np.array([(number, row) for number, store in enumerate(stores) for row in range(len(store))])
    chunks = chunk(stores, rows, ConversationTrees("once", max_length=1024, capacity=capacity))
    plan = Plan(chunks, capacity, micro_batches_per_step=8, seed=0)
    assert plan.repeated > 0
    assert len(plan.streams) > 20
    assert len(plan.streams) <= np.ceil((plan.tokens - plan.repeated) / (0.98 * capacity))
