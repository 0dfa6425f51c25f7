"""The plan: which trees are in which micro-batch of which step, a pure function of data, settings and seed.

It does not know how many processes there are: a step is a list of micro-batches, and rank r of R computes
those numbered r, r + R, r + 2R ... So the global steps, and therefore the training run, are the same on
1, 2 or 8 GPUs. A position in the plan is one integer, so resuming is a seek.

Trees are packed into streams once per run; each epoch visits the streams in an order of its own. The
emptiest streams make up the last, short step of every epoch. Micro-batches missing there are empty
streams, never repeated data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gpt2ft.data.augmentation import Augmentation, augment
from gpt2ft.data.oasst import DataError
from gpt2ft.data.packing import build_stream, pack
from gpt2ft.data.store import TokenStore
from gpt2ft.data.token_tree import MessageWeight, TokenTree, fit_context, split, weigh
from gpt2ft.random import generator
from gpt2ft.stream import TokenStream

Row = tuple[int, int]  # which store, which of its trees


@dataclass
class Pieces:
    """Trees cut to fit context and streams, in the order of the data.

    A tree that needs no cutting is not held here, only its row: it is read when its stream is built.
    """

    stores: Sequence[TokenStore]
    weight: MessageWeight
    rows: list[Row] = field(default_factory=list)
    cut: dict[int, TokenTree] = field(default_factory=dict)  # by index into `rows`
    sizes: list[int] = field(default_factory=list)  # tokens
    scored: list[int] = field(default_factory=list)  # supervised targets
    too_long: int = 0  # messages dropped
    repeated: int = 0  # tokens that stand in a stream a second time, to give a later turn its context

    def tree(self, piece: int) -> TokenTree:
        return self.cut[piece] if piece in self.cut else self.whole(self.rows[piece])

    def whole(self, row: Row) -> TokenTree:
        store, index = row
        return weigh(self.stores[store].tree(index, group=store), self.weight)


def cut_to_fit(
    stores: Sequence[TokenStore], rows: Sequence[Row], weight: MessageWeight, max_length: int, capacity: int
) -> Pieces:
    """Every tree in `rows`, re-rooted where a path exceeds `max_length` and split where it exceeds `capacity`."""
    pieces = Pieces(stores, weight)
    sizes = [store.sizes() for store in stores]
    for row in rows:
        store, index = row
        tokens, scored = (int(values[index]) for values in sizes[store])
        if tokens <= min(max_length, capacity):
            pieces.rows.append(row)
            pieces.sizes.append(tokens)
            pieces.scored.append(scored)
            continue
        fitting, too_long = fit_context(pieces.whole(row), max_length)
        parts = [part for tree in fitting for part in split(tree, capacity)]
        pieces.too_long += too_long
        pieces.repeated += sum(len(part.tokens) for part in parts) - _unique_tokens(parts)
        for part in parts:
            pieces.cut[len(pieces.rows)] = part
            pieces.rows.append(row)
            pieces.sizes.append(len(part.tokens))
            pieces.scored.append(part.num_supervised)
    if not pieces.rows:
        raise DataError(
            f"no message fits `data.max_length` = {max_length} tokens together with the turn before it: "
            f"all {pieces.too_long} are too long"
        )
    return pieces


def _unique_tokens(parts: Sequence[TokenTree]) -> int:
    lengths = {}
    for part in parts:
        lengths.update(zip(part.messages.tolist(), part.lengths.tolist(), strict=True))
    return sum(lengths.values())


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
        sizes = np.array(pieces.sizes, np.int64)
        bins = pack(sizes, capacity, generator(seed, "packing"))
        self.streams = sorted(bins, key=lambda bin: -sizes[bin].sum())  # fullest first
        scored = np.array(pieces.scored, np.int64)
        most = max(int(scored[bin].sum()) for bin in self.streams)
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
        return sum(self.pieces.sizes)

    @property
    def supervised(self) -> int:
        """Targets in an epoch."""
        return sum(self.pieces.scored)

    @property
    def fill(self) -> float:
        """Unique tokens / capacity over all streams but the emptiest, which ends the epoch."""
        counted = self.streams[:-1] or self.streams
        used = sum(self.pieces.sizes[piece] for bin in counted for piece in bin)
        return (used - self.pieces.repeated) / (self.capacity * len(counted))
