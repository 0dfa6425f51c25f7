"""From stored trees to chunks: trees, or parts of them, that fit the context and a stream.

kind of data     chunking rule                        a tree that does not fit is
conversations    ConversationTrees                    covered by windows that overlap, split at its branches
preferences      PreferencePairs (see pairs.py)       shortened at its prompt or its replies, split by its pairs
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt2ft.data.kinds import CONVERSATIONS, DataKind
from gpt2ft.data.reading import DataError, listed
from gpt2ft.data.store import TokenStore
from gpt2ft.data.token_tree import TEXT, TokenTree, counts, fit_context, merge, split, text_part, weigh
from gpt2ft.settings.training import MessageWeight

if TYPE_CHECKING:
    from gpt2ft.data.prefixes import Together

Rows = NDArray[np.int64]  # [n, 2]: number of the store, row in it
Contents = NDArray[np.int32]  # [k] all that a chunking rule needs to know of a part to make it again


class ChunkingRule(Protocol):
    """A way to make chunks of the trees of a store: `count` all at once, then `cut` those that do not fit.

    Cutting tells what all parts are, and takes as long as there are parts; later each is made alone, by `part`.
    """

    kind: DataKind
    max_length: int  # tokens of context
    capacity: int  # tokens of a stream
    merges: bool  # whole trees of one conversation are one chunk, as far as that fits

    @property
    def replies_cut_at(self) -> int | None:
        """Length of a path at which a supervised turn may be cut, without its end; None if none ever is."""

    @property
    def counts_once(self) -> bool:
        """True if a turn that several chunks share counts in one of them alone."""

    def count(self, store: TokenStore) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return [rows, 5] `counts` of each whole tree, and [rows] true where the tree fits as it is."""

    def whole(self, store: TokenStore, row: int, group: int) -> TokenTree:
        """Return the tree of a row, supervised and uncut."""

    def cut(self, tree: TokenTree, left_out: Counter[str]) -> list[TokenTree]:
        """Return the parts of a tree that fit; what is in none of them is counted, by reason.

        Raises:
            ValueError: if it cannot be cut to fit.
        """

    def contents(self, tree: TokenTree, part: TokenTree) -> Contents:
        """Return what a part of a tree holds."""

    def part(self, tree: TokenTree, number: int, contents: Contents) -> TokenTree:
        """Return part `number` of a tree, the same that `cut` has returned."""


@dataclass(frozen=True)
class ConversationTrees:
    """Trees whose replies are supervised: in windows where a path exceeds the context, split at branches.

    `kind` tells which of the replies: all, or the last ones.
    """

    weight: MessageWeight
    max_length: int
    capacity: int
    kind: DataKind = CONVERSATIONS
    replies_cut_at: ClassVar[None] = None
    merges: ClassVar[bool] = False

    @property
    def counts_once(self) -> bool:
        return self.weight == "once"

    def count(self, store: TokenStore) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        tokens, supervised = store.sizes()
        none = np.zeros_like(tokens)
        return np.stack([tokens, supervised, none, none, none], axis=1), tokens <= min(self.max_length, self.capacity)

    def whole(self, store: TokenStore, row: int, group: int) -> TokenTree:
        return weigh(store.tree(row, group), self.weight)

    def cut(self, tree: TokenTree, left_out: Counter[str]) -> list[TokenTree]:
        fitting, _ = fit_context(tree, self.max_length)
        parts = [part for tree in fitting for part in split(tree, self.capacity)]
        shown = {message for part in parts for message in part.messages.tolist()}
        left_out["messages that do not fit the context"] += len(tree.lengths) - len(shown)
        return parts

    def contents(self, tree: TokenTree, part: TokenTree) -> Contents:
        """Return the nodes, ~node where one is not supervised; nothing of a text, whose parts follow each other."""
        if tree.roles[0] == TEXT:
            return np.zeros(0, np.int32)
        nodes = np.searchsorted(tree.messages, part.messages).astype(np.int32)
        return np.where(part.weights > 0, nodes, ~nodes)

    def part(self, tree: TokenTree, number: int, contents: Contents) -> TokenTree:
        if tree.roles[0] == TEXT:
            return text_part(tree, self.max_length, number)
        weights = np.zeros_like(tree.weights)
        supervised = contents[contents >= 0]
        weights[supervised] = tree.weights[supervised]
        return tree.select(np.where(contents < 0, ~contents, contents).tolist(), weights)


@dataclass(frozen=True)
class Chunks:
    """All chunks of some stored trees, in the order of the data.

    Trees are not held here, only their rows, and of trees that are cut what each part holds. They are read when a
    stream is built; a part is made without the others.
    """

    stores: Sequence[TokenStore]
    chunking: ChunkingRule
    rows: Rows
    counts: NDArray[np.int64]  # [n, 5] see token_tree.counts
    parts: NDArray[np.int64]  # [n] number of the chunk among the parts of its tree, -1 for the whole tree
    contents: Contents  # of all parts, one after the other
    contents_from: NDArray[np.int64]  # [n + 1] where those of each chunk begin
    repeated: NDArray[np.int64]  # [n] tokens that an earlier part holds too: the context of later turns
    left_out: Counter[str]  # what is in no chunk, by reason
    merged: Mapping[int, list[int]] = field(default_factory=dict)  # chunk -> rows whose trees are merged into its own
    together: "Together | None" = None  # where chunks that begin alike are put together; `rows` are those of the first

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[n] tokens."""
        return self.counts[:, 0]

    @property
    def supervised(self) -> NDArray[np.int64]:
        """[n] supervised targets."""
        return self.counts[:, 1]

    @property
    def replies(self) -> NDArray[np.int64]:
        """[n] replies compared, of preferences."""
        return self.counts[:, 2]

    @property
    def pairs(self) -> NDArray[np.int64]:
        """[n] pairs of them."""
        return self.counts[:, 3]

    @property
    def tokens_if_unpacked(self) -> NDArray[np.int64]:
        """[n] tokens if each pair were two sequences of its own."""
        return self.counts[:, 4]

    @property
    def is_cut(self) -> NDArray[np.bool_]:
        """[n] true where a chunk is a part of its tree."""
        return self.parts >= 0

    @property
    def all_rows(self) -> Rows:
        """Rows of all trees, those that are merged into another's chunk and the copies of a mixing weight included."""
        if self.together:
            return self.together.alone.all_rows
        merged = [(self.rows[number, 0], row) for number, rows in self.merged.items() for row in rows]
        return np.concatenate([self.rows, np.array(merged, np.int64).reshape(-1, 2)])

    @property
    def tokens_alone(self) -> NDArray[np.int64]:
        """[n] tokens if no conversations were put together."""
        return self.together.tokens_alone if self.together else self.sizes

    @cached_property
    def pieces(self) -> NDArray[np.uint64]:
        """[n, 4] what each chunk is, wherever the same data are read: keys of its trees, part, tokens, targets."""
        keys = self.together.keys if self.together else self._keys()
        return np.stack([keys, *(values.astype(np.uint64) for values in (self.parts, *self.counts[:, :2].T))], axis=1)

    def _keys(self) -> NDArray[np.uint64]:
        of_rows = self.all_rows
        keys = np.zeros(len(of_rows), np.uint64)
        for number, store in enumerate(self.stores):
            here = of_rows[:, 0] == number
            keys[here] = store.keys()[of_rows[here, 1]]
        keys, merged = np.split(keys, [len(self)])
        np.add.at(keys, [number for number, rows in self.merged.items() for _ in rows], merged)
        return keys

    def tree(self, number: int) -> TokenTree:
        """Return the tree of a chunk; the groups of its nodes are the number of its store."""
        if self.together:
            return self.together.tree(number)
        store, row = self.rows[number].tolist()
        tree = self.chunking.whole(self.stores[store], row, group=store)
        part = int(self.parts[number])
        if part < 0:
            others = self.merged.get(number, ())
            return merge([tree, *(self.chunking.whole(self.stores[store], row, group=store) for row in others)])
        return self.chunking.part(tree, part, self.contents[slice(*self.contents_from[number : number + 2])])


def chunk(stores: Sequence[TokenStore], rows: Rows, chunking: ChunkingRule) -> Chunks:
    """Cut every tree in `rows` into chunks.

    Most trees fit, and are counted from the columns of their store; only the others are built and cut here.

    Raises:
        DataError: if a tree cannot be cut to fit, or nothing fits.
    """
    counted, is_whole = np.zeros((len(rows), 5), np.int64), np.zeros(len(rows), bool)
    for number, store in enumerate(stores):
        here = rows[:, 0] == number
        counted[here], is_whole[here] = (values[rows[here, 1]] for values in chunking.count(store))
    cuts: dict[int, list[tuple[int, ...]]] = {}  # index in `rows` -> of each part of that tree: counts, repeated, k
    contents: list[Contents] = [np.zeros(0, np.int32)]
    left_out: Counter[str] = Counter()
    for index in np.flatnonzero(~is_whole).tolist():
        store, row = rows[index].tolist()
        tree = chunking.whole(stores[store], row, group=store)
        try:
            parts = chunking.cut(tree, left_out)
        except ValueError as error:
            raise DataError(f"{stores[store].source}, conversation {stores[store].id(row)}: {error}") from error
        if len(parts) == 1 and parts[0] is tree:
            counted[index] = counts(tree)
            continue
        of_parts = [chunking.contents(tree, part) for part in parts]
        contents += of_parts
        figures = zip(map(counts, parts), _repeated(parts), map(len, of_parts), strict=True)
        cuts[index] = [(*counted_part, *others) for counted_part, *others in figures]
    times = np.ones(len(rows), np.int64)
    times[list(cuts)] = [len(parts) for parts in cuts.values()]
    firsts = np.cumsum(times) - times
    rows, counted = (np.repeat(values, times, axis=0) for values in (rows, counted))
    part_numbers = np.full(len(rows), -1)
    repeated, contents_from = np.zeros(len(rows), np.int64), np.zeros(len(rows) + 1, np.int64)
    for index, parts in cuts.items():
        here = slice(firsts[index], firsts[index] + len(parts))
        part_numbers[here] = np.arange(len(parts))
        figures = np.array(parts, np.int64).reshape(-1, 7)
        counted[here], repeated[here], contents_from[1:][here] = figures[:, :5], figures[:, 5], figures[:, 6]
    if not len(rows):
        found = f"left out are {listed(left_out)}"
        raise DataError(f"nothing fits `data.max_length` = {chunking.max_length} tokens: {found}")
    contents_from = np.cumsum(contents_from)
    found = Chunks(
        stores, chunking, rows, counted, part_numbers, np.concatenate(contents), contents_from, repeated, +left_out
    )
    return _merged(found) if chunking.merges else found


def _merged(chunks: Chunks) -> Chunks:
    """Return the chunks with whole trees of one conversation merged, in their order, as far as they fit a stream."""
    counted, absorbed = chunks.counts.copy(), np.zeros(len(chunks), bool)
    merged: dict[int, list[int]] = {}  # number of a chunk -> the rows merged into its tree
    for numbers in _of_one_conversation(chunks):
        first, tree = numbers[0], chunks.tree(numbers[0])
        for number in numbers[1:]:
            both = merge([tree, chunks.tree(number)])
            if both is not None and len(both.tokens) <= chunks.chunking.capacity:
                tree, absorbed[number], counted[first] = both, True, counts(both)
                merged.setdefault(first, []).append(int(chunks.rows[number, 1]))
            else:
                first, tree = number, chunks.tree(number)
    left = np.flatnonzero(~absorbed)
    return replace(
        chunks,
        **{name: getattr(chunks, name)[left] for name in ("rows", "parts", "repeated")},
        counts=counted[left],
        contents_from=chunks.contents_from[[*left, -1]],  # a whole tree has no contents
        merged={new: merged[old] for new, old in enumerate(left.tolist()) if old in merged},
    )


def _of_one_conversation(chunks: Chunks) -> Iterator[list[int]]:
    """Yield the numbers of whole trees of the same conversation; copies that a mixing weight makes stay apart."""
    for number, store in enumerate(chunks.stores):
        whole = np.flatnonzero((chunks.rows[:, 0] == number) & ~chunks.is_cut)
        whole = whole[np.argsort(chunks.rows[whole, 1], kind="stable")]
        rows = chunks.rows[whole, 1]
        copies = np.arange(len(rows)) - np.searchsorted(rows, rows)
        keys = store.conversations()[rows] + copies.astype(np.uint64)
        _, conversations, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        by_conversation = whole[np.argsort(conversations, kind="stable")]
        for found in np.split(by_conversation, np.cumsum(sizes)[:-1]):
            if len(found) > 1:
                yield found.tolist()


def _repeated(parts: Sequence[TokenTree]) -> list[int]:
    """Return for each part of a tree the tokens that an earlier one holds: of a cut text, its opening."""
    if parts and parts[0].roles[0] == TEXT:
        return [0] + [1] * (len(parts) - 1)
    repeated, seen = [], set[int]()
    for part in parts:
        messages = part.messages.tolist()
        repeated.append(sum(n for m, n in zip(messages, part.lengths.tolist(), strict=True) if m in seen))
        seen.update(messages)
    return repeated
