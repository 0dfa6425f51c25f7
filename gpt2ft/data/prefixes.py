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
thousand conversations stands in as many trees as they fill. All that is held here of a conversation are digests of its
turns. c chunks that begin like another, m nodes in them.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gpt2ft.conversation import ROLES
from gpt2ft.data.chunks import Chunks
from gpt2ft.data.mixing import Keys, mixed
from gpt2ft.data.packing import level, pack
from gpt2ft.data.store import TokenStore
from gpt2ft.data.token_tree import TEXT, TokenTree, merge
from gpt2ft.random import generator

BLOCK = 1 << 16  # chunks whose nodes are looked up at once: what that takes is many times what is kept of them

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Together:
    """Chunks put together: the chunks alone that each is made of."""

    alone: Chunks
    members: Numbers  # of all chunks, one after the other: numbers in `alone`
    members_from: Numbers  # [n + 1] where those of each begin
    silent: Numbers  # nodes of the chunks alone that are supervised there and count in another, one after the other
    silent_from: Numbers  # [chunks alone + 1]
    tokens_alone: Numbers  # [n] of its chunks alone, those included that add nothing to it

    def members_of(self, number: int) -> list[int]:
        return self.members[slice(*self.members_from[number : number + 2])].tolist()

    def tree(self, number: int) -> TokenTree:
        return merge([self._counting(member) for member in self.members_of(number)])

    def _counting(self, member: int) -> TokenTree:
        """Return a chunk alone, supervised where it counts."""
        tree, silent = self.alone.tree(member), self.silent[slice(*self.silent_from[member : member + 2])]
        if not len(silent):
            return tree
        weights = tree.weights.copy()
        weights[silent] = 0
        return replace(tree, weights=weights)

    @cached_property
    def keys(self) -> Keys:
        """[n] digest of what the chunks of each are."""
        of_alone = self.alone.pieces[self.members]
        return np.add.reduceat(mixed(of_alone[:, 0] + mixed(of_alone[:, 1])), self.members_from[:-1])


def openings(store: TokenStore) -> Keys:
    """[rows] digest of the first turn that is no system turn: what rows that are held out together have in common."""
    (digests, firsts), (roles, _) = store.nodes("digests"), store.nodes("roles")
    first, counts = firsts[:-1], np.diff(firsts)
    return digests[first + ((roles[first] == ROLES.index("system")) & (counts > 1))]


def share_prefixes(chunks: Chunks) -> Chunks:
    """Return the chunks with those that begin alike put together, as far as they fit a stream.

    Where none do, they are the same chunks. Else each stands where the first of its chunks has stood.
    """
    roots = _roots(chunks)
    _, inverse, times = np.unique(roots, return_inverse=True, return_counts=True)
    if times.max() == 1:
        return chunks
    nodes = _nodes_of(chunks, np.flatnonzero(times[inverse] > 1), roots)
    order, common = _sorted(nodes)
    slots = np.argsort(order)
    silent = _repeats(nodes, slots) if chunks.chunking.counts_once else np.zeros(len(nodes.chains), bool)
    speaks = np.logical_or.reduceat((nodes.weights > 0) & ~silent, nodes.firsts[:-1])
    tree_of = _trees(nodes, chunks, order, common, speaks)
    first_member = np.full(tree_of.max() + 1, len(chunks))
    np.minimum.at(first_member, tree_of[speaks], nodes.numbers[speaks])
    # From here on a tree is called by the first of its chunks, and other chunks by themselves.
    name, is_member, slot = np.arange(len(chunks)), np.ones(len(chunks), bool), np.zeros(len(chunks), np.int64)
    name[nodes.numbers], is_member[nodes.numbers], slot[nodes.numbers] = first_member[tree_of], speaks, slots
    members = np.flatnonzero(is_member)
    members = members[np.lexsort((slot[members], name[members]))]
    names, members_from = np.unique(name[members], return_index=True)
    counts, repeated = chunks.counts[names], chunks.repeated[names]
    counts[:, 3:] = np.add.reduceat(chunks.counts[members, 3:], members_from)
    put_together, figures, repeated_there = _counted(nodes, silent, name[nodes.numbers], speaks)
    here, columns = np.searchsorted(names, put_together), 3 if chunks.chunking.kind.rows_share_conversations else 2
    counts[here, :columns], repeated[here] = figures[:, :columns], repeated_there
    silent_nodes = np.flatnonzero(silent)
    silent_in = np.bincount(nodes.numbers[nodes.chunk_of[silent_nodes]], minlength=len(chunks))
    together = Together(
        alone=chunks,
        members=members,
        members_from=np.append(members_from, len(members)),
        silent=silent_nodes - nodes.firsts[nodes.chunk_of[silent_nodes]],
        silent_from=np.append(0, np.cumsum(silent_in)),
        tokens_alone=np.bincount(np.searchsorted(names, name), chunks.sizes).astype(np.int64),
    )
    parts = np.maximum.reduceat(chunks.parts[members], members_from)
    return replace(chunks, rows=chunks.rows[names], counts=counts, parts=parts, repeated=repeated, together=together)


@dataclass(frozen=True)
class _Nodes:
    """The nodes of the chunks that begin like another, one chunk after the other."""

    numbers: Numbers  # [c] of these chunks, ascending
    firsts: Numbers  # [c + 1]
    chains: Keys  # [m] digest of the tokens of each node and all above it
    lengths: NDArray[np.int32]  # [m]
    weights: NDArray[np.float32]  # [m]
    is_context: NDArray[np.bool_]  # [m] true for turns that an earlier window of the conversation holds

    @cached_property
    def chunk_of(self) -> NDArray[np.int32]:
        """[m] index in `numbers`."""
        return np.repeat(np.arange(len(self.numbers), dtype=np.int32), np.diff(self.firsts))


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
        (digests, firsts), (roles, _) = store.nodes("digests"), store.nodes("roles")
        nodes = firsts[chunks.rows[here, 1]]
        is_text = roles[nodes] == TEXT  # its parts are no prefixes
        is_cut = chunks.is_cut[here] & ~is_text
        nodes[is_cut] += _first_nodes(chunks, here[is_cut])
        ids = np.where(is_text, 0, _ids(digests[nodes], roles[nodes]))
        apart = np.where(is_text, here, -1 - copies[here]).astype(np.uint64)
        roots[here] = mixed(ids + mixed(apart + mixed(np.array([number], np.uint64))))
    return roots


def _ids(digests: Keys, roles: NDArray[np.int8]) -> Keys:
    """Return digests of turns from those of their texts."""
    return mixed(digests + roles.astype(np.uint64))


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


def _nodes_of(chunks: Chunks, numbers: Numbers, roots: Keys) -> _Nodes:
    """Return the nodes of the chunks `numbers`, whose first turns are `roots` [n]."""
    of_kind = _built if chunks.chunking.kind.rows_share_conversations else _stored
    in_earlier_window = _in_earlier_window(chunks)
    blocks = []
    for store in np.unique(chunks.rows[numbers, 0]).tolist():
        of_store = np.flatnonzero(chunks.rows[numbers, 0] == store)
        for index in np.array_split(of_store, -(-len(of_store) // BLOCK)):
            chunk_of, *columns = of_kind(chunks, chunks.stores[store], numbers[index], in_earlier_window)
            blocks.append([index[chunk_of].astype(np.int32), *columns])
    columns = list(map(np.concatenate, zip(*blocks, strict=True)))
    del blocks
    if (np.diff(columns[0]) < 0).any():  # several stores
        order = np.argsort(columns[0], kind="stable")
        columns = [column[order] for column in columns]
    chunk_of, parents, ids, lengths, weights, is_context = columns
    counts = np.bincount(chunk_of, minlength=len(numbers))
    firsts = np.append(0, np.cumsum(counts))
    chains, level = ids, 1
    chains[firsts[:-1]] = roots[numbers]
    left = np.flatnonzero(counts > level)
    while len(left):
        at = firsts[left] + level
        chains[at] = mixed(chains[firsts[left] + parents[at]] * np.uint64(3) + ids[at])
        level += 1
        left = left[counts[left] > level]
    return _Nodes(numbers, firsts, chains, lengths, weights, is_context)


def _stored(
    chunks: Chunks, store: TokenStore, numbers: Numbers, in_earlier_window: NDArray[np.bool_]
) -> tuple[NDArray, ...]:
    """Return the nodes of some chunks of conversations of one store, straight from its columns.

    Args:
        in_earlier_window: true for the nodes in `chunks.contents` that an earlier window holds.

    Returns:
        [m] index of the chunk, parent in it, digest of the turn, tokens, weight, and true where an earlier window
        holds it.
    """
    names = ("digests", "roles", "lengths", "parents", "weights")
    digests, roles, lengths, parents, weights = (store.nodes(name)[0] for name in names)
    _, of_rows = store.nodes("lengths")
    rows, is_cut = chunks.rows[numbers, 1], chunks.is_cut[numbers]
    counts = np.where(is_cut, np.diff(chunks.contents_from)[numbers], np.diff(of_rows)[rows])
    chunk_of = np.repeat(np.arange(len(numbers)), counts)
    firsts = np.cumsum(counts) - counts
    nodes = np.arange(len(chunk_of)) - firsts[chunk_of]  # of the row
    is_first, is_context, in_cut = nodes == 0, np.zeros(len(nodes), bool), is_cut[chunk_of]
    content = chunks.contents_from[numbers][chunk_of[in_cut]] + nodes[in_cut]
    nodes[in_cut] = chunks.contents[content]
    is_context[in_cut] = in_earlier_window[content]
    is_silent = nodes < 0
    nodes = np.where(is_silent, ~nodes, nodes)
    at = of_rows[rows][chunk_of] + nodes
    # Of what is cut, the parent may be missing: then the node is the first, or stands below a system turn.
    size = int(nodes.max(initial=0)) + 1
    places = chunk_of * size + nodes  # ascending
    above = np.searchsorted(places, chunk_of * size + np.maximum(parents[at], 0))
    is_there = (parents[at] >= 0) & (places[np.minimum(above, len(places) - 1)] == chunk_of * size + parents[at])
    own_parents = np.where(is_there, above - firsts[chunk_of], np.where(is_first, -1, 0)).astype(np.int32)
    return chunk_of, own_parents, _ids(digests[at], roles[at]), lengths[at], weights[at] * ~is_silent, is_context


def _in_earlier_window(chunks: Chunks) -> NDArray[np.bool_]:
    """Return true for each of the nodes in `chunks.contents` that an earlier part of the same tree holds."""
    tree = np.repeat(np.cumsum(chunks.parts <= 0), np.diff(chunks.contents_from))
    nodes = np.where(chunks.contents < 0, ~chunks.contents, chunks.contents)
    order = np.lexsort((nodes, tree))
    found = np.zeros(len(nodes), bool)
    found[order[1:]] = (np.diff(tree[order]) == 0) & (np.diff(nodes[order]) == 0)
    return found


def _built(chunks: Chunks, store: TokenStore, numbers: Numbers, _: NDArray[np.bool_]) -> tuple[NDArray, ...]:
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
    firsts, counts = nodes.firsts[:-1], np.diff(nodes.firsts)
    order, common = np.arange(len(firsts)), np.zeros(len(firsts), np.int64)
    slots, group, level = order.copy(), np.zeros(len(firsts), np.int64), 0
    while len(slots):
        at = order[slots]
        goes_on = counts[at] > level
        node = firsts[at] + np.minimum(level, counts[at] - 1)
        key = np.where(goes_on, nodes.chains[node], 0)
        if level == 0:
            _, index, inverse = np.unique(key, return_index=True, return_inverse=True)
            key = index[inverse]
        by = np.lexsort((at, key, group))
        at, key, group, goes_on, node = at[by], key[by], group[by], goes_on[by], node[by]
        order[slots] = at
        is_same = (np.diff(group) == 0) & (key[1:] == key[:-1]) & goes_on[1:] & goes_on[:-1]
        common[slots[1:]] += nodes.lengths[node[1:]] * is_same
        group = np.cumsum(np.append(True, ~is_same))
        in_run = np.append(False, is_same) | np.append(is_same, False)
        slots, group, level = slots[in_run], group[in_run], level + 1
    return order, common


def _repeats(nodes: _Nodes, slots: Numbers) -> NDArray[np.bool_]:
    """Return [m] true for supervised nodes that another chunk holds too, by more weight or earlier in their order.

    Args:
        slots: [c] place of each chunk in the order.
    """
    found = np.zeros(len(nodes.chains), bool)
    order = np.flatnonzero(nodes.weights > 0)
    order = order[np.lexsort((slots[nodes.chunk_of[order]], -nodes.weights[order], nodes.chains[order]))]
    found[order[1:]] = nodes.chains[order[1:]] == nodes.chains[order[:-1]]
    return found


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
    random = generator(0, "prefixes")

    def packed(first: int, end: int) -> list[tuple[int, list[range]]]:
        """Return size and chunks of each tree that the chunks from `first` to `end` make up."""
        size = int(tokens[end] - tokens[first] - (shared[end] - shared[first + 1]))
        if size <= capacity:
            return [(size, [range(first, end)])]
        prefix = int(common[first + 1 : end].min())  # of all of them
        opens = first + 1 + np.flatnonzero(common[first + 1 : end] == prefix)
        parts = [part for run in pairwise([first, *opens.tolist(), end]) for part in packed(*run)]
        parts.sort(key=lambda part: part[0] == prefix)  # those of the prefix alone last: they fit anywhere
        own = np.array([size - prefix for size, _ in parts])
        bins = level(pack(own[own > 0], capacity - prefix, random), own)
        bins[0] += range(np.count_nonzero(own), len(own))
        return [(prefix + int(own[bin].sum()), [run for part in bin for run in parts[part][1]]) for bin in bins]

    numbers, number = np.empty(len(sizes), np.int64), 0
    for run in pairwise([*np.flatnonzero(common == 0).tolist(), len(sizes)]):
        for _, runs in packed(*run):
            for chunks in runs:
                numbers[chunks.start : chunks.stop] = number
            number += 1
    return numbers


def _counted(
    nodes: _Nodes, silent: NDArray[np.bool_], names: Numbers, speaks: NDArray[np.bool_]
) -> tuple[Numbers, Numbers, Numbers]:
    """Return [t] the names of the trees, [t, 3] their tokens, targets and supervised nodes, [t] tokens repeated.

    A tree of one chunk is that chunk as it is, in which two replies to a turn may be the same and are both computed.

    Args:
        names: [c] of the tree that each chunk is a part of, ascending in the order of trees.
    """
    held = np.flatnonzero(speaks[nodes.chunk_of])
    keys = mixed(nodes.chains[held] + mixed(names[nodes.chunk_of[held]].astype(np.uint64)))  # of tree and turn
    is_alone = (np.bincount(names[speaks])[names] == 1)[nodes.chunk_of[held]]
    keys[is_alone] = mixed(keys[is_alone] + held[is_alone].astype(np.uint64))
    order = np.argsort(keys, kind="stable")
    held, keys = held[order], keys[order]
    firsts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    del keys, order
    is_supervised = np.logical_or.reduceat((nodes.weights[held] > 0) & ~silent[held], firsts)
    is_repeated = np.logical_and.reduceat(nodes.is_context[held], firsts)
    held = held[firsts]
    name, chain, lengths = names[nodes.chunk_of[held]], nodes.chains[held], nodes.lengths[held]
    order = np.lexsort((name, chain))
    is_repeated[order[1:]] |= chain[order[1:]] == chain[order[:-1]]
    found, tree = np.unique(name, return_inverse=True)
    figures = (lengths, (lengths - 1) * is_supervised, is_supervised, lengths * is_repeated)
    *counts, repeated = (np.bincount(tree, values).astype(np.int64) for values in figures)
    return found, np.stack(counts, axis=1), repeated
