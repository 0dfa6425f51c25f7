"""The plan: which trees are in which micro-batch of which step, a pure function of data, settings and seed.

It does not know how many processes there are: a step is a list of micro-batches, and rank r of R computes
those numbered r, r + R, r + 2R ... So the global steps, and therefore the training run, are the same on
1, 2 or 8 GPUs. A position in the plan is one integer, so resuming is a seek.

Trees are packed into streams once per run; each epoch visits the streams in an order of its own. The
emptiest streams make up the last, short step of every epoch. Micro-batches missing there are empty
streams, never repeated data.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gpt2ft.data.augmentation import Augmentation, augment
from gpt2ft.data.packing import build_pairs, build_stream, number_replies, pack
from gpt2ft.data.reading import DataError
from gpt2ft.data.store import TokenStore
from gpt2ft.data.token_tree import TEXT, MessageWeight, TokenTree, counts, fit_context, split, weigh
from gpt2ft.random import generator
from gpt2ft.stream import TokenStream

Rows = NDArray[np.int64]  # [n, 2]: which store, which of its trees


class ChunkingRule(Protocol):
    """How the trees of a store become chunks that fit context and streams."""

    max_length: int
    capacity: int

    def count(self, store: TokenStore) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """[rows, 5] the counts of each whole tree, and [rows] whether they hold: the tree is a chunk as it is."""

    def whole(self, store: TokenStore, row: int, group: int) -> TokenTree:
        """The tree of a row, supervised and uncut."""

    def cut(self, tree: TokenTree, left_out: Counter[str]) -> list[TokenTree]:
        """Its parts. What is in none of them is counted, by reason.

        Raises:
            ValueError: if it cannot be cut to fit.
        """


@dataclass(frozen=True)
class Conversations:
    """Trees in which every reply is learnt: re-rooted where a path exceeds the context, split at branches."""

    weight: MessageWeight
    max_length: int
    capacity: int

    def count(self, store: TokenStore) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        tokens, scored = store.sizes()
        none = np.zeros_like(tokens)
        return np.stack([tokens, scored, none, none, none], axis=1), tokens <= min(self.max_length, self.capacity)

    def whole(self, store: TokenStore, row: int, group: int) -> TokenTree:
        return weigh(store.tree(row, group), self.weight)

    def cut(self, tree: TokenTree, left_out: Counter[str]) -> list[TokenTree]:
        fitting, _ = fit_context(tree, self.max_length)
        parts = [part for tree in fitting for part in split(tree, self.capacity)]
        shown = {message for part in parts for message in part.messages.tolist()}
        left_out["messages that do not fit the context"] += len(tree.lengths) - len(shown)
        return parts


@dataclass(frozen=True)
class Chunks:
    """Trees cut to fit context and streams, in the order of the data.

    Trees are not held here, only their rows: they are read, and cut again, when a stream is built.
    """

    stores: Sequence[TokenStore]
    chunking: ChunkingRule
    rows: Rows
    counts: NDArray[np.int64]  # [n, 5] see token_tree.counts
    parts: NDArray[np.int64]  # [n] which part of its tree a chunk is, -1 for the whole
    left_out: Counter[str]  # what is in no chunk, by reason
    repeated: int  # tokens that stand in a stream a second time, to give a later turn its context

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
        """[n] replies compared, of preference data."""
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
        """[n] whether a chunk is a part of its tree."""
        return self.parts >= 0

    def tree(self, number: int) -> TokenTree:
        store, row = self.rows[number].tolist()
        tree = self.chunking.whole(self.stores[store], row, group=store)
        part = int(self.parts[number])
        return tree if part < 0 else self.chunking.cut(tree, Counter())[part]


def chunk(stores: Sequence[TokenStore], rows: Rows, chunking: ChunkingRule) -> Chunks:
    """Every tree in `rows`, in chunks.

    Raises:
        DataError: if a tree cannot be cut to fit, or nothing fits.
    """
    counted, is_whole = np.zeros((len(rows), 5), np.int64), np.zeros(len(rows), bool)
    for number, store in enumerate(stores):
        here = rows[:, 0] == number
        counted[here], is_whole[here] = (values[rows[here, 1]] for values in chunking.count(store))
    cuts: dict[int, list[tuple[int, ...]]] = {}  # the counts of the parts of a tree
    left_out: Counter[str] = Counter()
    repeated = 0
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
        cuts[index] = [counts(part) for part in parts]
        repeated += _repeated(parts)
    times = np.ones(len(rows), np.int64)
    times[list(cuts)] = [len(parts) for parts in cuts.values()]
    firsts = np.cumsum(times) - times
    rows, counted = (np.repeat(values, times, axis=0) for values in (rows, counted))
    part_numbers = np.full(len(rows), -1)
    for index, parts in cuts.items():
        here = slice(firsts[index], firsts[index] + len(parts))
        part_numbers[here] = np.arange(len(parts))
        counted[here] = np.array(parts, np.int64).reshape(-1, 5)
    if not len(rows):
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in left_out.items())
        raise DataError(f"nothing fits `data.max_length` = {chunking.max_length} tokens: left out are {reasons}")
    return Chunks(stores, chunking, rows, counted, part_numbers, +left_out, repeated)


def _repeated(parts: Sequence[TokenTree]) -> int:
    """Tokens of the parts of one tree beyond the first of each message; of a text, the openings of its later chunks."""
    if parts and parts[0].roles[0] == TEXT:
        return len(parts) - 1
    lengths: dict[int, int] = {}
    for part in parts:
        lengths.update(zip(part.messages.tolist(), part.lengths.tolist(), strict=True))
    return sum(len(part.tokens) for part in parts) - sum(lengths.values())


class Plan:
    """Streams by step and micro-batch. All streams of a plan have the same shapes."""

    def __init__(
        self,
        chunks: Chunks,
        capacity: int,
        micro_batches_per_step: int,
        seed: int,
        shuffle: bool = True,
        augmentation: Augmentation | None = None,
    ) -> None:
        """
        Args:
            capacity: tokens in a stream (N).
            shuffle: whether epochs visit the streams in an order of their own (evaluation does not care).
            augmentation: what training does to the trees; nothing unless given.
        """
        self.chunks = chunks
        self.capacity = capacity
        self.micro_batches_per_step = micro_batches_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.augmentation = augmentation or Augmentation()
        bins = pack(chunks.sizes, capacity, generator(seed, "packing"))
        self.streams = sorted(bins, key=lambda bin: -chunks.sizes[bin].sum())  # fullest first
        most = max(int(chunks.supervised[bin].sum()) for bin in self.streams)
        self.target_capacity = -(-most // 64) * 64
        self.pair_capacity, self.reply_capacity = (
            -(-max(int(number[bin].sum()) for bin in self.streams) // 8) * 8
            for number in (chunks.pairs, chunks.replies)
        )
        self._first_replies = np.cumsum(chunks.replies) - chunks.replies  # [n] of each chunk, among all
        self.reference = np.full(int(chunks.replies.sum()), np.nan)  # log-prob of each reply, once it is known
        self.steps_per_epoch = -(-len(self.streams) // micro_batches_per_step)

    def micro_batches(self, step: int) -> list[list[int]]:
        """The micro-batches of a step as lists of chunks; the last step of an epoch ends in empty ones."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.micro_batches_per_step
        chosen = self._order(epoch)[first : first + self.micro_batches_per_step]
        missing = self.micro_batches_per_step - len(chosen)
        return [self.streams[index] for index in chosen] + [[]] * missing

    def stream(self, micro_batch: Sequence[int]) -> TokenStream:
        """The trees of a micro-batch, each starting at position 0."""
        return self._laid_out(micro_batch, [self.chunks.tree(number) for number in micro_batch])

    def training_stream(self, step: int, number: int) -> TokenStream:
        """Micro-batch `number` of a step, augmented by what is drawn anew for each step."""
        micro_batch = self.micro_batches(step)[number]
        if not micro_batch or self.augmentation == Augmentation():
            return self.stream(micro_batch)
        trees = [self.chunks.tree(number) for number in micro_batch]
        random = generator(self.seed, "augmentation", step, number)
        trees, first_positions = augment(trees, self.augmentation, random)
        return self._laid_out(micro_batch, trees, first_positions)

    def _laid_out(
        self, micro_batch: Sequence[int], trees: Sequence[TokenTree], first_positions: Sequence[int] | None = None
    ) -> TokenStream:
        if not self.pair_capacity:
            return build_stream(trees, self.capacity, self.target_capacity, first_positions)
        trees = number_replies(trees)
        stream = build_stream(trees, self.capacity, self.target_capacity, first_positions)
        reference = self.reference[self.replies_of(micro_batch)]
        return replace(stream, pairs=build_pairs(trees, reference, self.pair_capacity, self.reply_capacity))

    def replies_of(self, micro_batch: Sequence[int]) -> NDArray[np.int64]:
        """Where the replies of a micro-batch stand among all replies of the plan, in the order of its stream."""
        firsts, numbers = self._first_replies, self.chunks.replies
        return np.concatenate([np.zeros(0, np.int64), *(firsts[p] + np.arange(numbers[p]) for p in micro_batch)])

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.streams)))
        full = len(self.streams) // self.micro_batches_per_step * self.micro_batches_per_step
        random = generator(self.seed, "order", epoch)
        return [*random.permutation(full).tolist(), *range(full, len(self.streams))]

    @property
    def tokens(self) -> int:
        """Tokens in an epoch, repeated context included."""
        return int(self.chunks.sizes.sum())

    @property
    def supervised(self) -> int:
        """Targets in an epoch."""
        return int(self.chunks.supervised.sum())

    @property
    def fill(self) -> float:
        """Unique tokens / capacity over all streams but the emptiest, which ends the epoch."""
        counted = self.streams[:-1] or self.streams
        used = sum(int(self.chunks.sizes[bin].sum()) for bin in counted)
        return (used - self.chunks.repeated) / (self.capacity * len(counted))
