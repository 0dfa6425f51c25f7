"""Packing: the choice of trees that share a stream, and the building of the stream.

Shape letters as in stream.py: N tokens, S supervised targets, R replies, P pairs.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2ft.data.token_tree import TokenTree
from gpt2ft.stream import Pairs, TokenStream


def pack(sizes: NDArray[np.int64], capacity: int, random: np.random.Generator) -> list[list[int]]:
    """Pack best-fit decreasing: each item goes to the fullest bin that still holds it, large items first.

    Sizes are shaken by up to 2 % for the order alone, so that other seeds give other neighbours.

    Returns:
        Bins of indices into `sizes`. Each holds at most `capacity`.
    """
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"an item of {sizes.max()} does not fit a bin of {capacity}")
    order = np.argsort(-sizes * random.uniform(0.98, 1.0, len(sizes)), kind="stable")
    bins: list[list[int]] = []
    by_gap: dict[int, list[int]] = {}  # free tokens -> bins with exactly that much room
    gaps = 0  # the same gaps as bits, so that the smallest sufficient one is a shift away
    for item in order.tolist():
        size = int(sizes[item])
        sufficient = gaps >> size
        if sufficient:
            gap = size + (sufficient & -sufficient).bit_length() - 1
            bin = by_gap[gap].pop()
            if not by_gap[gap]:
                gaps &= ~(1 << gap)
        else:
            bin, gap = len(bins), capacity
            bins.append([])
        bins[bin].append(item)
        by_gap.setdefault(gap - size, []).append(bin)
        gaps |= 1 << (gap - size)
    return bins


def level(bins: list[list[int]], sizes: NDArray[np.int64]) -> list[list[int]]:
    """Return the bins, the emptiest filled from the others: what is left over in the end makes no bin of its own.

    A stream may be a whole step, and one of a few short conversations would move the model as far as any other. So all
    bins, the fullest first, hand over the items that they took last, as long as the emptiest stays emptier than they.
    """
    loads = [int(sizes[bin].sum()) for bin in bins]
    emptiest = int(np.argmin(loads))
    moves = True
    while moves:
        moves = False
        for bin in np.argsort([-load for load in loads], kind="stable").tolist():
            size = int(sizes[bins[bin][-1]])
            if loads[emptiest] + size <= loads[bin] - size:
                bins[emptiest].append(bins[bin].pop())
                loads[emptiest] += size
                loads[bin] -= size
                moves = True
    return bins


def build_stream(trees: Sequence[TokenTree], capacity: int, target_capacity: int) -> TokenStream:
    """Lay trees out one after the other, each from position 0.

    Args:
        capacity: N. The tail is filled with tokens that see only themselves.
        target_capacity: S, at least 1. The tail is filled with targets of weight 0.

    Raises:
        ValueError: if the trees do not fit.
    """
    num_tokens = sum(len(tree.tokens) for tree in trees)
    num_supervised = sum(tree.num_supervised for tree in trees)
    if num_tokens > capacity or num_supervised > target_capacity or target_capacity < 1:
        raise ValueError(f"{num_tokens} tokens, {num_supervised} targets do not fit {capacity}, {target_capacity}")
    tokens = np.zeros(capacity, np.int64)
    positions = np.zeros(capacity, np.int64)
    horizons = np.arange(1, capacity + 1)
    supervised = np.zeros(target_capacity, np.int64)
    targets = np.zeros(target_capacity, np.int64)
    weights = np.zeros(target_capacity, np.float32)
    groups = np.zeros(target_capacity, np.int64)
    at, num_targets = 0, 0  # tokens and targets laid out so far
    for tree in trees:
        end = at + len(tree.tokens)
        within = np.arange(len(tree.tokens)) - np.repeat(tree.starts, tree.lengths)
        tokens[at:end] = tree.tokens
        positions[at:end] = within + np.repeat(tree.depths, tree.lengths)
        horizons[at:end] = at + np.repeat(tree.ends, tree.lengths)
        # A token has a target if the next one belongs to the same, supervised node: none crosses a branch.
        last = within == np.repeat(tree.lengths, tree.lengths) - 1
        token_weights = np.repeat(tree.weights, tree.lengths)
        index = np.flatnonzero((token_weights > 0) & ~last)
        chosen = slice(num_targets, num_targets + len(index))
        supervised[chosen] = at + index
        targets[chosen] = tree.tokens[index + 1]
        weights[chosen] = token_weights[index]
        groups[chosen] = np.repeat(tree.groups, tree.lengths)[index]
        at, num_targets = end, chosen.stop
    arrays = (tokens, positions, horizons, supervised, targets, weights, groups)
    return TokenStream(*map(torch.from_numpy, arrays), num_tokens=num_tokens, num_supervised=num_supervised)


def number_replies(trees: Sequence[TokenTree]) -> list[TokenTree]:
    """Number the supervised nodes of a stream's trees through; the numbers are the groups of their targets."""
    numbered, first = [], 0
    for tree in trees:
        is_reply = tree.weights > 0
        groups = np.where(is_reply, first + np.cumsum(is_reply) - 1, 0)
        numbered.append(replace(tree, groups=groups.astype(np.int32)))
        first += int(is_reply.sum())
    return numbered


def build_pairs(
    trees: Sequence[TokenTree], reference: NDArray[np.float64], pair_capacity: int, reply_capacity: int
) -> Pairs:
    """Return the pairs of the trees of a stream.

    Args:
        trees: whose supervised nodes are numbered through.
        reference: of the replies in their order.
        pair_capacity: P, at least 1. The tail is filled with pairs of weight 0.
        reply_capacity: R, at least 1.

    Raises:
        ValueError: if there is more than that.
    """
    num_pairs = sum(len(tree.pairs) for tree in trees)
    if num_pairs > pair_capacity or len(reference) > reply_capacity:
        raise ValueError(f"{num_pairs} pairs of {len(reference)} replies do not fit {pair_capacity}, {reply_capacity}")
    index = np.zeros((pair_capacity, 2), np.int64)
    weights = np.zeros(pair_capacity, np.float32)
    rankings = np.zeros(pair_capacity, np.int64)
    padded = np.zeros(reply_capacity, np.float64)
    lengths = np.ones(reply_capacity, np.float32)
    padded[: len(reference)] = reference
    at = num_rankings = 0
    for tree in trees:
        here = slice(at, at + len(tree.pairs))
        index[here] = tree.groups[tree.pairs]
        weights[here] = tree.pair_weights
        rankings[here] = num_rankings + tree.rankings
        num_rankings += int(tree.rankings.max(initial=-1)) + 1
        is_reply = tree.weights > 0
        lengths[tree.groups[is_reply]] = tree.lengths[is_reply] - 1
        at = here.stop
    return Pairs(*map(torch.from_numpy, (index, weights, padded, lengths, rankings)), num_pairs=num_pairs)
