"""The plan: which trees are in which micro-batch of which step, a pure function of data, settings and seed.

It does not know how many processes there are: a step is a list of micro-batches, and rank r of R computes
those numbered r, r + R, r + 2R ... So the global steps, and therefore the training run, are the same on
1, 2 or 8 GPUs. A position in the plan is one integer, so resuming is a seek.

Trees are packed into streams once per run; each epoch visits the streams in an order of its own. The
emptiest streams make up the last, short step of every epoch. Micro-batches missing there are empty
streams, never repeated data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpt2ft.data.augmentation import Augmentation, augment
from gpt2ft.data.packing import build_stream, pack
from gpt2ft.data.reading import DataError
from gpt2ft.data.store import TokenStore
from gpt2ft.data.token_tree import TEXT, MessageWeight, TokenTree, fit_context, split, weigh
from gpt2ft.random import generator
from gpt2ft.stream import TokenStream

Rows = NDArray[np.int64]  # [n, 2]: which store, which of its trees


@dataclass(frozen=True)
class Pieces:
    """Trees cut to fit context and streams, in the order of the data.

    Trees are not held here, only their rows: they are read, and cut again, when a stream is built.
    """

    stores: Sequence[TokenStore]
    weight: MessageWeight
    rows: Rows
    sizes: NDArray[np.int64]  # [n] tokens
    scored: NDArray[np.int64]  # [n] supervised targets
    parts: NDArray[np.int64]  # [n] which part of its tree a piece is, -1 for the whole
    max_length: int
    capacity: int
    left_out: int  # messages that are in no piece
    repeated: int  # tokens that stand in a stream a second time, to give a later turn its context

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_cut(self) -> NDArray[np.bool_]:
        """[n] whether a piece is a part of its tree."""
        return self.parts >= 0

    def tree(self, piece: int) -> TokenTree:
        tree = whole_tree(self.stores, self.rows[piece], self.weight)
        part = int(self.parts[piece])
        return tree if part < 0 else _cut(tree, self.max_length, self.capacity)[part]


def whole_tree(stores: Sequence[TokenStore], row: NDArray[np.int64], weight: MessageWeight) -> TokenTree:
    """The tree of a row, uncut, in the group of its store."""
    store, index = row.tolist()
    return weigh(stores[store].tree(index, group=store), weight)


def cut_to_fit(
    stores: Sequence[TokenStore], rows: Rows, weight: MessageWeight, max_length: int, capacity: int
) -> Pieces:
    """Every tree in `rows`, re-rooted where a path exceeds `max_length` and split where it exceeds `capacity`."""
    sizes, scored = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for number, store in enumerate(stores):
        here = rows[:, 0] == number
        sizes[here], scored[here] = (values[rows[here, 1]] for values in store.sizes())
    cuts: dict[int, list[tuple[int, int]]] = {}  # (tokens, targets) of the parts of a tree
    left_out = repeated = 0
    for index in np.flatnonzero(sizes > min(max_length, capacity)).tolist():
        tree = whole_tree(stores, rows[index], weight)
        parts = _cut(tree, max_length, capacity)
        if len(parts) == 1 and parts[0] is tree:
            continue  # large, but no path is too long
        cuts[index] = [(len(part.tokens), part.num_supervised) for part in parts]
        left_out += len(tree.lengths) - len({message for part in parts for message in part.messages.tolist()})
        repeated += _repeated(parts)
    counts = np.ones(len(rows), np.int64)
    counts[list(cuts)] = [len(parts) for parts in cuts.values()]
    firsts = np.cumsum(counts) - counts
    rows, sizes, scored = (np.repeat(values, counts, axis=0) for values in (rows, sizes, scored))
    part_numbers = np.full(len(rows), -1)
    for index, parts in cuts.items():
        here = slice(firsts[index], firsts[index] + len(parts))
        part_numbers[here] = np.arange(len(parts))
        sizes[here], scored[here] = np.array(parts, np.int64).reshape(-1, 2).T
    if not len(rows):
        raise DataError(
            f"no message fits `data.max_length` = {max_length} tokens together with the turn before it: "
            f"all {left_out} are left out"
        )
    return Pieces(stores, weight, rows, sizes, scored, part_numbers, max_length, capacity, left_out, repeated)


def _cut(tree: TokenTree, max_length: int, capacity: int) -> list[TokenTree]:
    fitting, _ = fit_context(tree, max_length)
    return [part for tree in fitting for part in split(tree, capacity)]


def _repeated(parts: Sequence[TokenTree]) -> int:
    """Tokens of the parts of one tree beyond the first of each message; of a text, the openings of its later pieces."""
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
        pieces: Pieces,
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
        self.pieces = pieces
        self.capacity = capacity
        self.micro_batches_per_step = micro_batches_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.augmentation = augmentation or Augmentation()
        bins = pack(pieces.sizes, capacity, generator(seed, "packing"))
        self.streams = sorted(bins, key=lambda bin: -pieces.sizes[bin].sum())  # fullest first
        most = max(int(pieces.scored[bin].sum()) for bin in self.streams)
        self.target_capacity = -(-most // 64) * 64
        self.steps_per_epoch = -(-len(self.streams) // micro_batches_per_step)

    def micro_batches(self, step: int) -> list[list[int]]:
        """The micro-batches of a step as lists of pieces; the last step of an epoch ends in empty ones."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.micro_batches_per_step
        chosen = self._order(epoch)[first : first + self.micro_batches_per_step]
        missing = self.micro_batches_per_step - len(chosen)
        return [self.streams[index] for index in chosen] + [[]] * missing

    def stream(self, micro_batch: Sequence[int]) -> TokenStream:
        """The trees of a micro-batch, each starting at position 0."""
        trees = [self.pieces.tree(piece) for piece in micro_batch]
        return build_stream(trees, self.capacity, self.target_capacity)

    def training_stream(self, step: int, number: int) -> TokenStream:
        """Micro-batch `number` of a step, augmented by what is drawn anew for each step."""
        micro_batch = self.micro_batches(step)[number]
        if not micro_batch or self.augmentation == Augmentation():
            return self.stream(micro_batch)
        trees = [self.pieces.tree(piece) for piece in micro_batch]
        random = generator(self.seed, "augmentation", step, number)
        trees, first_positions = augment(trees, self.augmentation, random)
        return build_stream(trees, self.capacity, self.target_capacity, first_positions)

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.streams)))
        full = len(self.streams) // self.micro_batches_per_step * self.micro_batches_per_step
        random = generator(self.seed, "order", epoch)
        return [*random.permutation(full).tolist(), *range(full, len(self.streams))]

    @property
    def tokens(self) -> int:
        """Tokens in an epoch, repeated context included."""
        return int(self.pieces.sizes.sum())

    @property
    def supervised(self) -> int:
        """Targets in an epoch."""
        return int(self.pieces.scored.sum())

    @property
    def fill(self) -> float:
        """Unique tokens / capacity over all streams but the emptiest, which ends the epoch."""
        counted = self.streams[:-1] or self.streams
        used = sum(int(self.pieces.sizes[bin].sum()) for bin in counted)
        return (used - self.pieces.repeated) / (self.capacity * len(counted))
