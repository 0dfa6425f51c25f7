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

Turns are looked at where turn_nodes.py keeps them, never all in memory. c chunks that begin like another.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gpt2ft.conversation import ROLES
from gpt2ft.data.chunks import Chunks
from gpt2ft.data.mixing import Keys, mixed
from gpt2ft.data.packing import level, pack
from gpt2ft.data.store import TokenStore
from gpt2ft.data.token_tree import TokenTree, merge
from gpt2ft.data.turn_nodes import Numbers, TurnNodes, first_turns, nodes_of
from gpt2ft.files import failing_as
from gpt2ft.random import generator


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
    roots = first_turns(chunks)
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
        return _together(chunks, nodes_of(chunks, is_shared, roots, file))


def _together(chunks: Chunks, nodes: TurnNodes) -> Chunks:
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


def _sorted(nodes: TurnNodes) -> tuple[Numbers, Numbers]:
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


def _silence_repeats(nodes: TurnNodes, order: Numbers) -> None:
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


def _trees(nodes: TurnNodes, chunks: Chunks, order: Numbers, common: Numbers, speaks: NDArray[np.bool_]) -> Numbers:
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


def _counted(nodes: TurnNodes, names: Numbers, speaks: NDArray[np.bool_]) -> tuple[Numbers, Numbers, Numbers]:
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
