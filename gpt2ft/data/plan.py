"""The plan: which trees are in which micro-batch of which step, a pure function of data, settings and seed.

It does not know how many processes there are: a step is a list of micro-batches, and rank r of R computes
those numbered r, r + R, r + 2R ... So the global steps, and therefore the training run, are the same on
1, 2 or 8 GPUs. A position in the plan is one integer, so resuming is a seek.

Trees are packed into streams once per run. Epochs, each of which visits all streams in an order of its own, follow
each other in one row, and every step takes the next streams of it: an epoch may end in the middle of a step. Only the
last step of the last epoch is short. Micro-batches missing there are empty streams, never repeated data.

    row      2 0 1 4 3 | 0 4 2 3 1 | 3 1 ...      5 streams, an epoch up to each bar
    steps    0 0 0 1 1   1 2 2 2 3   3 3 ...      3 micro-batches to a step

A step never takes more than an epoch: where all data make up fewer streams than a step has micro-batches, the others
are empty.

Empty micro-batches come last in a step, so that all processes can leave them out together (training/prefetch.py).

The loop uses four members of it: `micro_batches_per_step`, `ends_epoch`, `training_stream` and `position`.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2ft.data.chunks import Chunks
from gpt2ft.data.packing import build_pairs, build_stream, level, number_replies, pack
from gpt2ft.random import generator
from gpt2ft.stream import TokenStream


class Plan:
    """Streams by step and micro-batch, all of the same shapes: N and S, and of preferences P and R (see stream.py).

    N is what the fullest stream needs, so small data are not mostly empty computation.
    """

    def __init__(
        self,
        chunks: Chunks,
        capacity: int,
        micro_batches_per_step: int,
        seed: int,
        epochs: int | None = None,
        min_steps: int = 0,
    ) -> None:
        """Pack the chunks into streams.

        Args:
            capacity: most tokens in a stream.
            epochs: after which the row of streams ends; without an end unless given.
            min_steps: where the epochs are fewer steps than this, have a step take fewer streams; where that is not
                enough, add as many epochs as make up this many.
        """
        self.chunks = chunks
        self.micro_batches_per_step = micro_batches_per_step
        self.seed = seed
        bins = level(pack(chunks.sizes, capacity, generator(seed, "packing")), chunks.sizes)
        self.streams = sorted(bins, key=lambda bin: -chunks.sizes[bin].sum())  # fullest first
        self.capacity = min(capacity, self._most(chunks.sizes, 128))
        self.target_capacity = self._most(chunks.supervised, 64)
        self.pair_capacity, self.reply_capacity = self._most(chunks.pairs, 8), self._most(chunks.replies, 8)
        self.reference = np.full(int(chunks.replies.sum()), np.nan)  # log-prob of each reply, once it is known
        self.reference_tails: NDArray[np.float64] | None = None  # [pairs, 2] see stream.Pairs
        self._until = {"replies": np.cumsum(chunks.replies), "pairs": np.cumsum(chunks.pairs)}  # [n] each chunk's end
        self.streams_per_step = min(micro_batches_per_step, len(self.streams))
        self.epochs = epochs
        if epochs is not None and min_steps:
            at_most = max(1, epochs * len(self.streams) // min_steps)
            self.streams_per_step = min(self.streams_per_step, at_most)
            self.epochs = max(epochs, math.ceil(min_steps / self.steps_per_epoch))
        self._digested = 0, hashlib.sha256()  # steps, and the pieces of all of them
        self._order = lru_cache(2)(self._drawn_order)  # a step and the next may stand in two epochs

    @property
    def steps_per_epoch(self) -> float:
        return len(self.streams) / self.streams_per_step

    def _most(self, numbers: NDArray[np.int64], multiple: int) -> int:
        """Return the largest sum over the chunks of a stream, rounded up."""
        return -(-max(int(numbers[bin].sum()) for bin in self.streams) // multiple) * multiple

    @property
    def steps(self) -> int | None:
        """Steps until the row of epochs ends; None without an end."""
        return None if self.epochs is None else math.ceil(self.epochs * len(self.streams) / self.streams_per_step)

    def ends_epoch(self, step: int) -> bool:
        """Return True if the last stream of an epoch is in the step before `step`."""
        before, until = ((steps * self.streams_per_step) // len(self.streams) for steps in (step - 1, step))
        return before < until

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the micro-batches of a step as lists of chunks; empty ones have an empty list."""
        return [self._micro_batch(step, number) for number in range(self.micro_batches_per_step)]

    def _micro_batch(self, step: int, number: int) -> list[int]:
        epoch, place = divmod(step * self.streams_per_step + number, len(self.streams))
        is_missing = number >= self.streams_per_step or (self.epochs is not None and epoch >= self.epochs)
        return [] if is_missing else self.streams[self._order(epoch)[place]]

    def stream(self, micro_batch: Sequence[int]) -> TokenStream:
        """Build the stream of some chunks."""
        trees = [self.chunks.tree(chunk) for chunk in micro_batch]
        if self.pair_capacity:
            trees = number_replies(trees)
        stream = build_stream(trees, self.capacity, self.target_capacity)
        stream = replace(stream, num_repeated=int(self.chunks.repeated[list(micro_batch)].sum()))
        if not self.pair_capacity:
            return stream
        reference = self.reference[self.replies_of(micro_batch)]
        pairs = build_pairs(trees, reference, self.pair_capacity, self.reply_capacity)
        if self.reference_tails is not None:
            tails = np.zeros((self.pair_capacity, 2))
            tails[: pairs.num_pairs] = self.reference_tails[self._places("pairs", micro_batch)]
            pairs = replace(pairs, reference_tails=torch.from_numpy(tails))
        return replace(stream, pairs=pairs)

    def training_stream(self, step: int, number: int) -> TokenStream:
        """Build micro-batch `number` of a step."""
        return self.stream(self._micro_batch(step, number))

    def digest(self, steps: int) -> str:
        """Return a digest of all that the first `steps` steps train on: which pieces, in which streams and order."""
        done, digest = self._digested if self._digested[0] <= steps else (0, hashlib.sha256())
        for step in range(done, steps):
            for micro_batch in self.micro_batches(step):
                digest.update(len(micro_batch).to_bytes(8, "little"))
                digest.update(self.chunks.pieces[micro_batch].astype("<u8").tobytes())
        self._digested = steps, digest
        return digest.hexdigest()[:16]

    def position(self, steps: int) -> dict[str, float | str]:
        """Return how far the first `steps` steps go: epochs, tokens (repeated context left out), the `digest`.

        Where conversations that begin alike are put together, also the tokens computed until then, divided by those of
        the conversations alone, and the share of them that are repeated.
        """
        streams = steps * self.streams_per_step
        if self.epochs is not None:
            streams = min(streams, self.epochs * len(self.streams))  # the last step may be short
        epoch, place = divmod(streams, len(self.streams))
        begun = [chunk for stream in self._order(epoch)[:place] for chunk in self.streams[stream]]
        figures = np.stack([self.chunks.sizes, self.chunks.repeated, self.chunks.tokens_alone])
        tokens, repeated, alone = (epoch * figures.sum(axis=1) + figures[:, begun].sum(axis=1)).tolist()
        found = {"epoch": streams / len(self.streams), "tokens_seen": tokens - repeated, "data": self.digest(steps)}
        if self.chunks.together and steps:
            found |= {"tree_to_path_tokens": tokens / alone, "repeated_share": repeated / tokens}
        return found

    def replies_of(self, micro_batch: Sequence[int]) -> NDArray[np.int64]:
        """Return the places of the replies of a micro-batch in `reference`, in the order of its stream."""
        return self._places("replies", micro_batch)

    def _places(self, what: str, micro_batch: Sequence[int]) -> NDArray[np.int64]:
        """Return the places of the replies or pairs of a micro-batch among those of all chunks, in its order."""
        counts, until = getattr(self.chunks, what), self._until[what]
        places = (np.arange(until[chunk] - counts[chunk], until[chunk]) for chunk in micro_batch)
        return np.concatenate([np.zeros(0, np.int64), *places])

    def _drawn_order(self, epoch: int) -> list[int]:
        return generator(self.seed, "order", epoch).permutation(len(self.streams)).tolist()

    @property
    def tokens(self) -> int:
        """Tokens in an epoch, repeated context included."""
        return int(self.chunks.sizes.sum())

    @property
    def tokens_alone(self) -> int:
        """Tokens in an epoch if no conversations were put together."""
        return int(self.chunks.tokens_alone.sum())

    @property
    def repeated(self) -> int:
        """Tokens of them that stand there a second time, as context."""
        return int(self.chunks.repeated.sum())

    @property
    def supervised(self) -> int:
        """Targets in an epoch."""
        return int(self.chunks.supervised.sum())

    @property
    def fill(self) -> float:
        """Unique tokens / capacity over all streams."""
        return (self.tokens - self.repeated) / (self.capacity * len(self.streams))
