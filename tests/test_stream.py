"""The one rule, written out three ways, and the same each time: by paths of trees, by segments, by blocks."""

from dataclasses import fields
from itertools import accumulate

import numpy as np
import pytest
import torch

from gpt2ft.data.packing import build_stream
from gpt2ft.stream import Segment, block_kinds, segments, visible

DRAWN = torch.tensor([5, 5, 4, 4, 5, 7, 7, 8])  # the drawing in gpt2ft/stream.py: P P A A B C C and a token of tail


@pytest.fixture(scope="module")
def forests(random_tree):
    """Pairs of some random trees and their stream of 1,024 tokens."""

    def make(seed):
        random = np.random.default_rng(seed)
        trees = [random_tree(random) for _ in range(8)]
        while sum(len(tree.tokens) for tree in trees) > 1000:
            trees.pop()
        return trees, build_stream(trees, 1024, 1024)

    pairs = [make(seed) for seed in range(12)]
    assert all(trees and stream.num_tokens < 1024 for trees, stream in pairs)
    assert any(len(trees) > 2 for trees, _ in pairs)
    return pairs


def seen_by_paths(trees, length):
    """bool [length, length] by the definition: the tokens on the path to a node, and those before oneself in it."""
    seen = torch.eye(length, dtype=torch.bool)
    at = 0
    for tree in trees:
        ranges = [slice(at + start, at + start + size) for start, size in zip(tree.starts, tree.lengths, strict=True)]
        for node, own in enumerate(ranges):
            for ancestor in tree.path_to(node)[:-1]:
                seen[own, ranges[ancestor]] = True
            size = own.stop - own.start
            seen[own, own] = torch.ones(size, size, dtype=torch.bool).tril()
        at += len(tree.tokens)
    return seen


def test_the_drawing():
    expected = ["P.......", "PP......", "PPA.....", "PPAA....", "PP..B...", ".....C..", ".....CC.", ".......t"]
    drawn = ["".join("PPAABCCt"[k] if sees else "." for k, sees in enumerate(row)) for row in visible(DRAWN)]
    assert drawn == expected


def test_the_rule_is_ones_own_path(forests):
    branching = 0
    for trees, stream in forests:
        assert torch.equal(visible(stream.horizons), seen_by_paths(trees, 1024))
        branching += sum(len(set(tree.parents.tolist())) < len(tree.parents) for tree in trees)
    assert branching > 12


def test_positions_count_what_is_seen(forests):
    for _, stream in forests:
        seen = visible(stream.horizons).sum(1) - 1
        assert torch.equal(stream.positions[: stream.num_tokens], seen[: stream.num_tokens])


class TestSegments:
    def test_of_the_drawing(self):
        assert segments(DRAWN.tolist(), 7) == [
            Segment(2, ()),
            Segment(2, (0,)),
            Segment(1, (0,)),
            Segment(2, ()),
        ]

    def test_say_what_the_rule_says(self, forests):
        deepest, merged = 0, 0
        for trees, stream in forests:
            found = segments(stream.horizons.tolist(), stream.num_tokens)
            seen = torch.eye(1024, dtype=torch.bool)
            ends = list(accumulate(segment.length for segment in found))
            places = [slice(end - segment.length, end) for segment, end in zip(found, ends, strict=True)]
            for segment, own in zip(found, places, strict=True):
                seen[own, own] = torch.ones(segment.length, segment.length, dtype=torch.bool).tril()
                for number in segment.ancestors:
                    seen[own, places[number]] = True
            assert torch.equal(seen, visible(stream.horizons))
            assert ends[-1] == stream.num_tokens
            deepest = max(deepest, *(len(segment.ancestors) for segment in found))
            merged += sum(len(tree.lengths) for tree in trees) - len(found)
        assert deepest > 3
        assert merged > 10  # nodes that follow each other without a branch are one segment

    def test_of_nothing(self):
        assert segments([1, 2, 3], 0) == []


class TestBlockKinds:
    @pytest.mark.parametrize("block", [2, 8, 32, 128])
    def test_exactly_the_blocks_that_hold_anything(self, forests, block):
        num_full, num_empty = 0, 0
        for _, stream in forests:
            some, full = block_kinds(stream.horizons, block)
            by_block = visible(stream.horizons).view(1024 // block, block, 1024 // block, block)
            assert torch.equal(some, by_block.any(3).any(1))
            assert torch.equal(full, by_block.all(3).all(1))
            num_full += int(full.sum())
            num_empty += int((~some).tril().sum())
        assert num_empty > 0
        assert num_full > 0 or block == 128

    def test_one_long_conversation_fills_the_blocks_below_the_diagonal(self):
        some, full = block_kinds(torch.full((512,), 512), 128)
        assert torch.equal(some, torch.ones(4, 4, dtype=torch.bool).tril())
        assert torch.equal(full, torch.ones(4, 4, dtype=torch.bool).tril(-1))

    def test_a_stream_of_another_length_is_refused(self):
        with pytest.raises(ValueError, match="128.* 200"):
            block_kinds(torch.arange(1, 201), 128)


def test_a_stream_moves_as_a_whole(forests):
    _, stream = forests[0]
    moved = stream.to(torch.device("meta"))
    names = [field.name for field in fields(stream) if isinstance(getattr(stream, field.name), torch.Tensor)]
    assert len(names) == 7
    assert all(getattr(moved, name).is_meta for name in names)
    assert all(getattr(moved, name).shape == getattr(stream, name).shape for name in names)
    assert (moved.num_tokens, moved.num_supervised) == (stream.num_tokens, stream.num_supervised)
