"""The turns of chunks that begin like another, one after the other in a temporary file: what prefixes.py looks at.

A turn is known by its chain, a digest of its tokens and of all turns above it. Memory holds numbers for each chunk and
never for all turns: these are gone through in blocks, again for each share of their chains where any two chunks may
hold the same turn. c chunks that begin like another, m nodes in them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2ft.data.chunks import Chunks
from gpt2ft.data.mixing import Keys, mixed
from gpt2ft.data.store import TokenStore
from gpt2ft.data.token_tree import TEXT

BLOCK = 1 << 18  # nodes that are looked at together, and tokens of chunks whose nodes are looked up together
NODE = np.dtype(
    [
        ("chain", np.uint64),  # digest of the tokens of the node and of all above it
        ("length", np.int32),
        ("weight", np.float32),
        ("is_context", np.bool_),  # true for turns that an earlier window of the conversation holds
        ("is_silent", np.bool_),  # true for supervised nodes that count in another chunk
    ]
)

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class TurnNodes:
    """The nodes of the chunks that begin like another, those of each chunk one after the other."""

    numbers: Numbers  # [c] of these chunks, ascending
    firsts: Numbers  # [c] the first node of each
    counts: NDArray[np.int32]  # [c]
    columns: np.memmap  # [m] of NODE

    def blocks(self, chunks: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
        """Yield the nodes of chunks in their order, about BLOCK at once, and the chunk of each (both as indices)."""
        ends = np.flatnonzero(np.diff(np.cumsum(self.counts[chunks]) // BLOCK)) + 1
        for first, end in pairwise([0, *ends.tolist(), len(chunks)]):
            block = chunks[first:end]
            chunk_of = np.repeat(block, self.counts[block])
            before = np.cumsum(self.counts[block]) - self.counts[block]
            yield np.repeat(self.firsts[block] - before, self.counts[block]) + np.arange(len(chunk_of)), chunk_of

    def counts_here(self, at: Numbers) -> NDArray[np.bool_]:
        """Return true for those of some nodes that are supervised and count in no other chunk."""
        return (self.columns["weight"][at] > 0) & ~self.columns["is_silent"][at]

    def of_share(self, at: Numbers, share: int) -> NDArray[np.bool_]:
        """Return true for those of some nodes whose chain is of one of the `shares`."""
        return self.columns["chain"][at] % np.uint64(self.shares) == share

    @property
    def shares(self) -> int:
        """Number of shares of the chains, each of which has about as many nodes as there are chunks."""
        return -(-len(self.columns) // max(BLOCK, len(self.numbers)))


def first_turns(chunks: Chunks) -> Keys:
    """[n] digest of each chunk's first turn, its source and, for copies that a mixing weight makes, its number."""
    tell_apart = (chunks.parts, chunks.rows[:, 1], chunks.rows[:, 0])
    order = np.lexsort(tell_apart)
    is_copy = np.append(False, np.logical_and.reduce([np.diff(column[order]) == 0 for column in tell_apart]))
    copies = np.empty(len(chunks), np.int64)
    place = np.arange(len(order))
    copies[order] = place - np.maximum.accumulate(np.where(is_copy, 0, place))
    roots = np.zeros(len(chunks), np.uint64)
    for number, store in enumerate(chunks.stores):
        here = np.flatnonzero(chunks.rows[:, 0] == number)
        nodes, _ = store.node_ranges(chunks.rows[here, 1])
        is_text = store.nodes_at("roles", nodes) == TEXT  # its parts are no prefixes
        is_cut = chunks.is_cut[here] & ~is_text
        nodes[is_cut] += _first_nodes(chunks, here[is_cut])
        ids = np.where(is_text, 0, _ids(store, nodes))
        apart = np.where(is_text, here, -1 - copies[here]).astype(np.uint64)
        roots[here] = mixed(ids + mixed(apart + mixed(np.array([number], np.uint64))))
    return roots


def _ids(store: TokenStore, nodes: Numbers) -> Keys:
    """Return digests of turns from those of their texts."""
    return mixed(store.nodes_at("digests", nodes) + store.nodes_at("roles", nodes).astype(np.uint64))


def _first_nodes(chunks: Chunks, cut: Numbers) -> Numbers:
    """Return the node of its row that each of the chunks opens with."""
    if not chunks.chunking.kind.rows_share_conversations:
        nodes = chunks.contents[chunks.contents_from[cut]].astype(np.int64)
        return np.where(nodes < 0, ~nodes, nodes)
    found = []
    for number in cut.tolist():
        store, row = chunks.rows[number].tolist()
        opening = chunks.tree(number).messages[0]
        found.append(int(np.searchsorted(chunks.stores[store].tree(row, 0).messages, opening)))
    return np.array(found, np.int64)


def nodes_of(chunks: Chunks, is_shared: NDArray[np.bool_], roots: Keys, file: BinaryIO) -> TurnNodes:
    """Return the nodes of some chunks, whose first turns are `roots` [n]; they are written to a file."""
    of_kind = _built if chunks.chunking.kind.rows_share_conversations else _stored
    firsts, counts = np.zeros(len(chunks), np.int64), np.zeros(len(chunks), np.int32)
    written = 0
    ends = np.flatnonzero(np.diff(np.cumsum(chunks.sizes) // BLOCK)) + 1
    for block in pairwise([0, *ends.tolist(), len(chunks)]):
        here = block[0] + np.flatnonzero(is_shared[slice(*block)])
        for store in np.unique(chunks.rows[here, 0]).tolist():
            numbers = here[chunks.rows[here, 0] == store]
            chunk_of, parents, chains, lengths, weights, is_context = of_kind(chunks, chunks.stores[store], numbers)
            sizes = np.bincount(chunk_of)
            own = np.cumsum(sizes) - sizes
            chains[own] = roots[numbers]
            level, left = 1, np.flatnonzero(sizes > 1)
            while len(left):
                at = own[left] + level
                chains[at] = mixed(chains[own[left] + parents[at]] * np.uint64(3) + chains[at])
                level += 1
                left = left[sizes[left] > level]
            firsts[numbers], counts[numbers] = written + own, sizes
            nodes = np.zeros(len(chains), NODE)
            for name, column in zip(NODE.names, (chains, lengths, weights, is_context), strict=False):
                nodes[name] = column
            file.write(nodes.tobytes())
            written += len(nodes)
    file.flush()
    return TurnNodes(np.flatnonzero(is_shared), firsts[is_shared], counts[is_shared], np.memmap(file, NODE, "r+"))


def _stored(chunks: Chunks, store: TokenStore, numbers: Numbers) -> tuple[NDArray, ...]:
    """Return the nodes of some chunks of conversations of one store, straight from its columns.

    Returns:
        [m] index of the chunk, parent in it, digest of the turn, tokens, weight, and true where an earlier window
        holds it.
    """
    of_rows, counts = store.node_ranges(chunks.rows[numbers, 1])
    is_cut = chunks.parts[numbers] >= 0
    counts = np.where(is_cut, chunks.contents_from[numbers + 1] - chunks.contents_from[numbers], counts)
    chunk_of = np.repeat(np.arange(len(numbers)), counts)
    firsts = np.cumsum(counts) - counts
    nodes = np.arange(len(chunk_of)) - firsts[chunk_of]  # of the row
    is_first, is_context, in_cut = nodes == 0, np.zeros(len(nodes), bool), is_cut[chunk_of]
    content = chunks.contents_from[numbers][chunk_of[in_cut]] + nodes[in_cut]
    nodes[in_cut] = chunks.contents[content]
    if len(content):
        # The parts of a tree stand side by side: those before the first chunk here may hold its turns.
        begin, end = numbers[0] - max(chunks.parts[numbers[0]], 0), numbers[-1] + 1
        is_context[in_cut] = _in_earlier_window(chunks, begin, end)[content - chunks.contents_from[begin]]
    is_silent = nodes < 0
    nodes = np.where(is_silent, ~nodes, nodes)
    at = of_rows[chunk_of] + nodes
    # Of what is cut, the parent may be missing: then the node is the first, or stands below a system turn.
    parents, size = store.nodes_at("parents", at), int(nodes.max(initial=0)) + 1
    places = chunk_of * size + nodes  # ascending
    above = np.searchsorted(places, chunk_of * size + np.maximum(parents, 0))
    is_there = (parents >= 0) & (places[np.minimum(above, len(places) - 1)] == chunk_of * size + parents)
    own_parents = np.where(is_there, above - firsts[chunk_of], np.where(is_first, -1, 0)).astype(np.int32)
    weights = store.nodes_at("weights", at) * ~is_silent
    return chunk_of, own_parents, _ids(store, at), store.nodes_at("lengths", at), weights, is_context


def _in_earlier_window(chunks: Chunks, begin: int, end: int) -> NDArray[np.bool_]:
    """Return true for each node in the `contents` of chunks that an earlier part of the same tree holds.

    Args:
        begin, end: of the chunks; the first part of a tree must be among them if any is.
    """
    counts = np.diff(chunks.contents_from[begin : end + 1])
    tree = np.repeat(np.cumsum(chunks.parts[begin:end] <= 0), counts)
    contents = chunks.contents[slice(*chunks.contents_from[[begin, end]])]
    nodes = np.where(contents < 0, ~contents, contents)
    order = np.lexsort((nodes, tree))
    found = np.zeros(len(nodes), bool)
    found[order[1:]] = (np.diff(tree[order]) == 0) & (np.diff(nodes[order]) == 0)
    return found


def _built(chunks: Chunks, store: TokenStore, numbers: Numbers) -> tuple[NDArray, ...]:
    """Return the same of chunks of preferences, whose replies may be cut: each is built."""
    blocks = []
    for index, number in enumerate(numbers.tolist()):
        tree = chunks.tree(number)
        turns = np.split(tree.tokens, tree.starts[1:])
        digests = b"".join(hashlib.blake2b(turn.tobytes(), digest_size=8).digest() for turn in turns)
        ids, none = np.frombuffer(digests, np.uint64), np.zeros(len(turns), bool)
        blocks.append((np.full(len(turns), index), tree.parents, ids, tree.lengths, tree.weights, none))
    return tuple(map(np.concatenate, zip(*blocks, strict=True)))
