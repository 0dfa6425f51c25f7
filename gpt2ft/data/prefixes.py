"""Prefixes found by content: chunks of one source that begin alike become one tree.

    alone       system  user A  assistant                     together    system ─┬─ user A ── assistant ─┬─ user B ...
                system  user A  assistant  user B  ...                            │                       └─ user C ...
                system  user A  assistant  user C  ...                            └─ user D ── assistant
                system  user D  assistant

It is the last thing done to chunks: which conversations are held out, which a mixing weight takes twice, and which
turns the context keeps has been decided for each alone. So turns are shared where their tokens and those of all turns
above them in the chunk are the same, nowhere else, and copies that a mixing weight makes stay copies.

The weights of a turn in several chunks add up, so that `leaves` gives the gradient of all conversations alone. With
`once` a turn counts in the one of them that gives it most weight. Pairs of replies are those of each chunk alone.

Chunks that share their first turn are sorted by all their turns. Where together they are more than a stream holds, what
follows the turns that all of them share is packed into trees, each of which repeats those: a system turn of ten
thousand conversations stands in as many trees as they fill.

Memory holds numbers for each conversation and never for all their turns. These stand in a temporary file, and are gone
through in blocks: again for each share of their digests where any two chunks may hold the same turn. c chunks that
begin like another, m nodes in them.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2ft.conversation import ROLES
from gpt2ft.data.chunks import Chunks
from gpt2ft.data.mixing import Keys, mixed
from gpt2ft.data.packing import level, pack
from gpt2ft.data.store import TokenStore
from gpt2ft.data.token_tree import TEXT, TokenTree, merge
from gpt2ft.files import failing_as
from gpt2ft.random import generator

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
class Together:
    """Chunks put together: the chunks alone that each is made of."""

    alone: Chunks
    members: Numbers  # of all chunks, one after the other: numbers in `alone`
    members_from: Numbers  # [n + 1] where those of each begin
    silent: NDArray[np.uint8]  # a bit for each node of chunks that begin alike: set if it counts in another chunk
    bits_from: Numbers  # [chunks alone] where the bits of each begin, -1 where it has none
    tokens_alone: Numbers  # [n] of its chunks alone, those included that add nothing to it

    def members_of(self, number: int) -> list[int]:
        return self.members[slice(*self.members_from[number : number + 2])].tolist()

    def tree(self, number: int) -> TokenTree:
        return merge([self._counting(member) for member in self.members_of(number)])

    def _counting(self, member: int) -> TokenTree:
        """Return a chunk alone, supervised where it counts."""
        tree, first = self.alone.tree(member), int(self.bits_from[member])
        if first < 0:
            return tree
        end = first + len(tree.weights)
        bits = np.unpackbits(self.silent[first // 8 : -(-end // 8)])[first % 8 :][: len(tree.weights)]
        return replace(tree, weights=tree.weights * (1 - bits)) if bits.any() else tree

    @cached_property
    def keys(self) -> Keys:
        """[n] digest of what the chunks of each are."""
        of_alone = self.alone.pieces[self.members]
        return np.add.reduceat(mixed(of_alone[:, 0] + mixed(of_alone[:, 1])), self.members_from[:-1])


def openings(store: TokenStore) -> Keys:
    """[rows] digest of the first turn that is no system turn: what rows that are held out together have in common."""
    first, counts = store.node_ranges(np.arange(len(store)))
    return store.nodes_at("digests", first + ((store.nodes_at("roles", first) == ROLES.index("system")) & (counts > 1)))


def share_prefixes(chunks: Chunks) -> Chunks:
    """Return the chunks with those that begin alike put together, as far as they fit a stream.

    Where none do, they are the same chunks. Else each stands where the first of its chunks has stood.
    """
    roots = _roots(chunks)
    order = np.argsort(roots)
    again = roots[order[1:]] == roots[order[:-1]]
    if not again.any():
        return chunks
    is_shared = np.zeros(len(chunks), np.bool_)
    is_shared[order[1:]] = again
    is_shared[order[:-1]] |= again
    del order, again
    sentence = f"`data.share_prefixes` could not write its temporary file (in {tempfile.gettempdir()}: see $TMPDIR)"
    with failing_as(sentence), tempfile.TemporaryFile(prefix="gpt2ft-") as file:
        return _together(chunks, _nodes_of(chunks, is_shared, roots, file))


def _together(chunks: Chunks, nodes: "_Nodes") -> Chunks:
    """Return the chunks with those put together whose nodes are given."""
    order, common = _sorted(nodes)
    if chunks.chunking.counts_once:
        _silence_repeats(nodes, order)
    speaks = np.zeros(len(nodes.numbers), np.bool_)
    for at, chunk_of in nodes.blocks(np.arange(len(nodes.numbers))):
        speaks[chunk_of[nodes.counts_here(at)]] = True
    name = np.arange(len(chunks))  # of the tree that a chunk is a part of: the first chunk there, or itself
    tree_of = _trees(nodes, chunks, order, common, speaks)
    first_member = np.full(tree_of.max() + 1, len(chunks))
    np.minimum.at(first_member, tree_of[speaks], nodes.numbers[speaks])
    name[nodes.numbers] = first_member[tree_of]
    is_member, slot = np.ones(len(chunks), bool), np.zeros(len(chunks), np.int64)
    is_member[nodes.numbers], slot[nodes.numbers[order]] = speaks, np.arange(len(order))
    members = np.flatnonzero(is_member)
    members = members[np.lexsort((slot[members], name[members]))]
    del order, common, tree_of, first_member, slot
    names, members_from = np.unique(name[members], return_index=True)
    counts, repeated = chunks.counts[names], chunks.repeated[names]
    counts[:, 3:] = np.add.reduceat(chunks.counts[members, 3:], members_from)
    put_together, figures, repeated_there = _counted(nodes, name[nodes.numbers], speaks)
    here, columns = np.searchsorted(names, put_together), 3 if chunks.chunking.kind.rows_share_conversations else 2
    counts[here, :columns], repeated[here] = figures[:, :columns], repeated_there
    bits_from = np.full(len(chunks), -1)
    bits_from[nodes.numbers] = nodes.firsts
    together = Together(
        alone=chunks,
        members=members,
        members_from=np.append(members_from, len(members)),
        silent=np.packbits(nodes.columns["is_silent"]),
        bits_from=bits_from,
        tokens_alone=np.bincount(np.searchsorted(names, name), chunks.sizes).astype(np.int64),
    )
    parts = np.maximum.reduceat(chunks.parts[members], members_from)
    return replace(chunks, rows=chunks.rows[names], counts=counts, parts=parts, repeated=repeated, together=together)


@dataclass(frozen=True)
class _Nodes:
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


def _roots(chunks: Chunks) -> Keys:
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


def _nodes_of(chunks: Chunks, is_shared: NDArray[np.bool_], roots: Keys, file: BinaryIO) -> _Nodes:
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
    return _Nodes(np.flatnonzero(is_shared), firsts[is_shared], counts[is_shared], np.memmap(file, NODE, "r+"))


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


def _sorted(nodes: _Nodes) -> tuple[Numbers, Numbers]:
    """Sort the chunks by their turns, turn by turn; those of one root stand where the first of them is.

    Returns:
        [c] the chunks in their order, and [c] the tokens that each shares with the one before it.
    """
    order, common = np.arange(len(nodes.numbers)), np.zeros(len(nodes.numbers), np.int64)
    slots, group, level = order.copy(), np.zeros(len(order), np.int64), 0
    while len(slots):
        at = order[slots]
        goes_on = nodes.counts[at] > level
        node = nodes.firsts[at] + np.minimum(level, nodes.counts[at] - 1)
        key = np.where(goes_on, nodes.columns["chain"][node], 0)
        if level == 0:
            _, index, inverse = np.unique(key, return_index=True, return_inverse=True)
            key = index[inverse]
        by = np.lexsort((key, group))
        at, key, group, goes_on, node = at[by], key[by], group[by], goes_on[by], node[by]
        order[slots] = at
        is_same = (np.diff(group) == 0) & (key[1:] == key[:-1]) & goes_on[1:] & goes_on[:-1]
        common[slots[1:]] += nodes.columns["length"][node[1:]] * is_same
        group = np.cumsum(np.append(True, ~is_same))
        in_run = np.append(False, is_same) | np.append(is_same, False)
        slots, group, level = slots[in_run], group[in_run], level + 1
    return order, common


def _silence_repeats(nodes: _Nodes, order: Numbers) -> None:
    """Have a supervised node that several chunks hold count in that which gives it most weight, or stands first."""
    columns = nodes.columns

    def loudest(at: Numbers) -> Numbers:
        """Return those of some nodes that count, in their order, and silence the others."""
        by = np.lexsort((-columns["weight"][at], columns["chain"][at]))
        chains = columns["chain"][at[by]]
        is_repeat = np.append(False, chains[1:] == chains[:-1])[: len(by)]
        columns["is_silent"][at[by[is_repeat]]] = True
        return at[np.sort(by[~is_repeat])]

    for share in range(nodes.shares):
        blocks = (at[nodes.of_share(at, share) & (columns["weight"][at] > 0)] for at, _ in nodes.blocks(order))
        loudest(np.concatenate(list(map(loudest, blocks))))


def _trees(nodes: _Nodes, chunks: Chunks, order: Numbers, common: Numbers, speaks: NDArray[np.bool_]) -> Numbers:
    """Return [c] the number of the tree that each chunk becomes a part of.

    Args:
        order, common: as of `_sorted`.
        speaks: [c] true if anything of a chunk counts; else it adds nothing, and goes with one that begins alike.
    """
    kept = np.flatnonzero(speaks[order])
    with_last = np.minimum.reduceat(common[: kept[-1] + 1], np.append(0, kept[:-1] + 1))
    trees = _packed(chunks.sizes[nodes.numbers[order[kept]]], with_last, chunks.chunking.capacity)
    roots, places = np.cumsum(common == 0), np.arange(len(order))
    nearest = np.minimum(np.searchsorted(kept, places), len(kept) - 1)
    nearest -= roots[kept[nearest]] != roots
    tree_of = np.empty(len(order), np.int64)
    tree_of[order] = trees[nearest]
    return tree_of


def _packed(sizes: Numbers, common: Numbers, capacity: int) -> Numbers:
    """Return [k] the number of the tree that each of k chunks in their order becomes a part of.

    Args:
        sizes: in tokens.
        common: tokens of them that each shares with the one before it.
    """
    tokens, shared = (np.append(0, np.cumsum(values)) for values in (sizes, common))
    numbers, random = np.zeros(len(sizes), np.int64), generator(0, "prefixes")

    def number(firsts: Numbers, ends: Numbers) -> Numbers:
        """Number the trees of several runs of chunks, each of which begins alike; return the size of each tree."""
        of_runs = tokens[ends] - tokens[firsts] - (shared[ends] - shared[firsts + 1])
        large = np.flatnonzero(of_runs > capacity).tolist()
        of_parts = [divide(int(firsts[run]), int(ends[run])) for run in large]
        times = np.ones(len(of_runs), np.int64)
        times[large] = list(map(len, of_parts))
        before = np.cumsum(times) - times
        numbers[firsts[0] : ends[-1]] += np.repeat(before, ends - firsts)
        of_trees = np.repeat(of_runs, times)
        for run, parts in zip(large, of_parts, strict=True):
            of_trees[before[run] : before[run] + len(parts)] = parts
        return of_trees

    def divide(first: int, end: int) -> Numbers:
        """Number the trees of chunks that are more than one together; return the size of each."""
        prefix = int(common[first + 1 : end].min())  # of all of them
        opens = first + 1 + np.flatnonzero(common[first + 1 : end] == prefix)
        own = number(np.append(first, opens), np.append(opens, end)) - prefix
        order = np.argsort(own == 0, kind="stable")  # those of the prefix alone last: they fit anywhere
        own = own[order]
        bins = level(pack(own[own > 0], capacity - prefix, random), own)
        bins[0] += range(np.count_nonzero(own), len(own))
        tree_of = np.empty(len(own), np.int64)
        tree_of[order[np.concatenate(bins)]] = np.repeat(np.arange(len(bins)), list(map(len, bins)))
        numbers[first:end] = tree_of[numbers[first:end]]
        return np.array([prefix + own[bin].sum() for bin in bins])

    firsts = np.flatnonzero(common == 0)
    number(firsts, np.append(firsts[1:], len(sizes)))
    return numbers


def _counted(nodes: _Nodes, names: Numbers, speaks: NDArray[np.bool_]) -> tuple[Numbers, Numbers, Numbers]:
    """Return [t] the names of the trees, [t, 3] their tokens, targets and supervised nodes, [t] tokens repeated.

    A tree of one chunk is that chunk as it is, in which two replies to a turn may be the same and are both computed.

    Args:
        names: [c] of the tree that each chunk is a part of, ascending in the order of trees.
    """
    found, times = np.unique(names[speaks], return_counts=True)
    tree_of, figures = np.searchsorted(found, names), np.zeros((len(found), 4), np.int64)
    is_alone = times[tree_of] == 1
    chunks = np.flatnonzero(speaks)
    chunks = chunks[np.argsort(tree_of[chunks], kind="stable")]

    def united(keys: Keys, *columns: NDArray) -> tuple[NDArray, ...]:
        """Return a node for each key: the key, the tree, the node, whether any counts, whether all are context."""
        tree, node, counts, is_context = columns
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        firsts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
        one = order[firsts]
        counts = np.logical_or.reduceat(counts[order], firsts)
        return keys[firsts], tree[one], node[one], counts, np.logical_and.reduceat(is_context[order], firsts)

    def of_share(share: int) -> Iterator[tuple[NDArray, ...]]:
        for at, chunk_of in nodes.blocks(chunks):
            is_here = nodes.of_share(at, share)
            at, chunk_of = at[is_here], chunk_of[is_here]
            keys = mixed(nodes.columns["chain"][at] + mixed(names[chunk_of].astype(np.uint64)))  # of tree and turn
            keys = np.where(is_alone[chunk_of], mixed(keys + at.astype(np.uint64)), keys)
            yield united(keys, tree_of[chunk_of], at, nodes.counts_here(at), nodes.columns["is_context"][at])

    for share in range(nodes.shares):
        _, tree, at, is_supervised, is_repeated = united(*map(np.concatenate, zip(*of_share(share), strict=True)))
        chains, lengths = nodes.columns["chain"][at], nodes.columns["length"][at]
        order = np.lexsort((tree, chains))
        is_repeated[order[1:]] |= chains[order[1:]] == chains[order[:-1]]
        values = (lengths, (lengths - 1) * is_supervised, is_supervised, lengths * is_repeated)
        figures += np.stack([np.bincount(tree, value, len(found)).astype(np.int64) for value in values], axis=1)
    return found, figures[:, :3], figures[:, 3]
