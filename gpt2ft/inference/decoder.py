"""Decoding with a key-value cache: sequences of different lengths go on together, and join and leave between tokens.

    slot 0   What is tea?     A hot drink.   (stop)   | And cold? ...        the next turn, behind what is cached
    slot 1          Name a colour.   Blue is a colour that ...
             --------------------------------------------------> steps, one token of every open sequence each

A step is one forward pass over one stream: the last token of every sequence, and a chunk of the prompts that have just
joined. So no long prompt holds up the others. The CPU waits for the device once a step: for the ids.

Shape letters: B sequences, N new tokens, E embedding width, V rows of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gpt2ft.device import to_device
from gpt2ft.inference.cache import KeyValueCache, side_by_side
from gpt2ft.inference.sampling import Sampler, sample
from gpt2ft.model.attention import sdpa_of_varying_shapes
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.logprobs import head_logits, head_table
from gpt2ft.settings.sections import SamplingSettings
from gpt2ft.text.tokenizer import ChatTokenizer

PREFILL_CHUNK = 4096  # tokens of prompts in one pass, which bounds its memory
BROKEN = -1  # in the place of an id: the logits were not finite

FinishReason = Literal["stop", "length"]
Ending = FinishReason | Literal["broken"]


class StepResult(NamedTuple):
    """The outcome of one step for one sequence: a new id, unless it ended by a stop token or broke.

    It breaks where the model's logits are not finite. `finish_reason` is None while it goes on.
    """

    slot: int
    id: int | None
    finish_reason: Ending | None


@dataclass
class _Sequence:
    sampler: Sampler
    stop_ids: frozenset[int]
    unread: list[int]  # ids that the model has not read yet: the rest of the prompt, or the last one sampled
    remaining: int  # tokens that may still be sampled
    arrival: int  # how many have joined before it
    is_open: bool = True
    is_finite: bool = True  # so were all logits that followed from its slot in the cache


class Decoder:
    """Continues up to `num_sequences` sequences together.

    A sequence takes a slot with `join` and keeps it until `leave`, also when it has ended. Its keys and values stay
    cached: of a later one that begins in the same way, in whatever slot, only the rest is read. Each sequence gets the
    tokens that it would get alone, up to the rounding of the model's dtype.

    The weights must stay as and where they are while a decoder lives. Training mode is left as it is found.

    Args:
        stop_ids: end a sequence, and are not part of it.
        suppressed: bool [V], ids that are never sampled (`suppressed_token_mask`).
        prefill_chunk: tokens of prompts that one step reads; those that joined first come first.
    Raises:
        ValueError: if `suppressed` does not fit the model, or leaves nothing to sample.
    """

    def __init__(
        self,
        model: GPT2,
        stop_ids: Sequence[int],
        suppressed: Tensor,
        num_sequences: int,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        rows = len(model.wte.weight)
        if suppressed.dtype != torch.bool or suppressed.shape != (rows,):
            found = f"{suppressed.dtype} {list(suppressed.shape)}"
            raise ValueError(f"`suppressed` must be bool [{rows}], one for each row of the table, but is {found}")
        if suppressed.all():
            raise ValueError("`suppressed` must leave an id that can be sampled, but leaves none")
        for name, number in (("num_sequences", num_sequences), ("prefill_chunk", prefill_chunk)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {number}")
        self.model = model
        self._stop_ids = frozenset(stop_ids)
        self._table = head_table(model.wte.weight.detach())
        self._suppressed_ids = suppressed.to(self._table.device).nonzero()[:, 0]
        self._control_ids = self._stop_ids | set(self._suppressed_ids.tolist())  # all that is not content
        self._prefill_chunk = prefill_chunk
        self._cache = KeyValueCache(model, num_sequences)
        self._cached: list[list[int]] = [[] for _ in range(num_sequences)]  # ids whose keys and values a slot holds
        self._sequences: list[_Sequence | None] = [None] * num_sequences
        self._num_joined = 0

    @property
    def num_free(self) -> int:
        """Sequences that can still join."""
        return self._sequences.count(None)

    def check(self, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        """Raise ValueError if a prompt is empty, leaves no room for one token or holds an id that does not exist."""
        rows, most = len(self._table), self.model.config.n_positions - 1
        if not 1 <= len(prompt_ids) <= most:
            raise ValueError(
                f"a prompt must have from 1 to {most} tokens, so that the context of {most + 1} leaves room for one "
                f"more, but has {len(prompt_ids)}"
            )
        if outside := [id for id in prompt_ids if not 0 <= id < rows]:
            raise ValueError(f"the ids of a prompt must be from 0 to {rows - 1}, but one is {outside[0]}")
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, but is {max_new_tokens}")

    def join(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingSettings,
        max_new_tokens: int,
        stop_ids: Sequence[int] | None = None,
    ) -> int:
        """Begin a sequence; the next steps read its prompt.

        Args:
            stop_ids: those of the decoder's that end this one, default all. The others are never sampled for it.
        Returns:
            The slot. Of the free ones it is the one that already holds most of the prompt.
        Raises:
            ValueError: as `check` does, and if no slot is free.
        """
        self.check(prompt_ids, max_new_tokens)
        own_stop_ids = self._stop_ids if stop_ids is None else frozenset(stop_ids)
        assert own_stop_ids <= self._stop_ids, f"{stop_ids} must be among {self._stop_ids}"
        context = list(prompt_ids[:-1])  # at least the last id is read again: its hidden state is needed
        slot = self._free_slot(context)
        start = self._reuse(slot, context)
        content_ids = [id for id in prompt_ids if id not in self._control_ids]
        remaining = min(max_new_tokens, self.model.config.n_positions - len(prompt_ids))
        sampler, unread = Sampler(sampling, content_ids), list(prompt_ids[start:])
        self._sequences[slot] = _Sequence(sampler, own_stop_ids, unread, remaining, self._num_joined)
        self._num_joined += 1
        return slot

    @torch.no_grad()
    def step(self) -> list[StepResult]:
        """Sample one token for every open sequence whose prompt is read to its end; results by slot."""
        portions = self._portions()
        if not portions:
            return []
        hidden = self._read(portions)
        ends = dict(zip(portions, accumulate(map(len, portions.values())), strict=True))
        slots = sorted(slot for slot in portions if not self._sequence(slot).unread)
        if not slots:
            return []
        return list(self._sample(slots, hidden[to_device([ends[slot] - 1 for slot in slots], hidden.device)]))

    def leave(self, slot: int) -> None:
        """Free a slot, also before its sequence has ended."""
        if not self._sequence(slot).is_finite:
            self._cached[slot].clear()
            self._cache.forget(slot)
        self._sequences[slot] = None

    def _sequence(self, slot: int) -> _Sequence:
        sequence = self._sequences[slot]
        assert sequence is not None, f"slot {slot} is free"
        return sequence

    def _free_slot(self, context: list[int]) -> int:
        """The free slot that shares most with `context`; of equals the one that holds least of use to others."""
        free = [slot for slot, sequence in enumerate(self._sequences) if sequence is None]
        if not free:
            raise ValueError(
                f"all {len(self._sequences)} slots are taken: one sequence must leave before another joins"
            )
        return max(free, key=lambda slot: (_num_shared(self._cached[slot], context), -len(self._cached[slot])))

    def _reuse(self, slot: int, context: list[int]) -> int:
        """Keep as much of `context` as any slot holds; the number of tokens that this slot then need not read."""
        start = _num_shared(self._cached[slot], context)
        fullest = max(range(len(self._cached)), key=lambda other: _num_shared(self._cached[other], context))
        shared = _num_shared(self._cached[fullest], context)
        if shared > start and (holder := self._sequences[fullest]) is not None and not holder.is_finite:
            shared = start  # its logits are not known yet, or were not finite
        if shared > start:
            self._cache.copy(fullest, slot, shared)
            start = shared
        self._cached[slot] = context[:start]
        return start

    def _portions(self) -> dict[int, list[int]]:
        """The ids that the next pass reads, by slot: first a chunk of the prompts, then single ids, slots ascending.

        A single id is always read: it was sampled last, or is all that is left of a prompt.
        """
        open_ = [(slot, sequence) for slot, sequence in enumerate(self._sequences) if sequence and sequence.is_open]
        portions, single = {}, {}
        room = self._prefill_chunk
        for slot, sequence in sorted(open_, key=lambda pair: pair[1].arrival):
            portion = sequence.unread[: max(room, 0)] if len(sequence.unread) > 1 else sequence.unread[:1]
            if len(portion) > 1:
                portions[slot] = portion
                room -= len(portion)
            elif portion:
                single[slot] = portion
        return portions | dict(sorted(single.items()))

    def _read(self, portions: dict[int, list[int]]) -> Tensor:
        """Run the model over all portions, end to end; their hidden states [N, E]."""
        starts = {slot: len(self._cached[slot]) for slot in portions}
        self._cache.make_room(max(starts[slot] + len(ids) for slot, ids in portions.items()))
        prompts = [slot for slot, ids in portions.items() if len(ids) > 1]
        singles = [slot for slot, ids in portions.items() if len(ids) == 1]
        sizes = [len(portions[slot]) for slot in prompts]
        attentions = [
            self._cache.prefill(slot, starts[slot], starts[slot] + size)
            for slot, size in zip(prompts, sizes, strict=True)
        ]
        if singles:
            attentions.append(self._cache.step(singles, [starts[slot] for slot in singles]))
            sizes.append(len(singles))
        ids = [id for portion in portions.values() for id in portion]
        positions = [starts[slot] + i for slot, portion in portions.items() for i in range(len(portion))]
        tokens, positions = to_device([ids, positions], self._table.device)
        with _evaluating(self.model), sdpa_of_varying_shapes():
            hidden = self.model(tokens, positions, side_by_side(attentions, sizes))  # [N, E]
        for slot, portion in portions.items():
            self._cached[slot] += portion
            self._sequence(slot).is_finite = False  # until the logits that follow are finite
            del self._sequence(slot).unread[: len(portion)]
        return hidden

    def _sample(self, slots: Sequence[int], hidden: Tensor) -> Iterator[StepResult]:
        """Sample the id that follows each hidden state, [B, E]."""
        sequences = [self._sequence(slot) for slot in slots]
        logits = head_logits(hidden, self._table)  # [B, V]
        logits.index_fill_(1, self._suppressed_ids, 0.0)  # which may be anything
        are_finite = logits.amax(-1).isfinite() & logits.amin(-1).isfinite()
        logits.masked_fill_(~are_finite[:, None], 0.0).index_fill_(1, self._suppressed_ids, -torch.inf)
        foreign = [(row, id) for row, one in enumerate(sequences) for id in self._stop_ids - one.stop_ids]
        if foreign:
            rows, ids = to_device(foreign, logits.device).unbind(1)
            logits[rows, ids] = -torch.inf
        ids = sample(logits, [sequence.sampler for sequence in sequences])
        ids = ids.masked_fill(~are_finite, BROKEN).tolist()  # the wait
        for slot, sequence, id in zip(slots, sequences, ids, strict=True):
            sequence.is_finite = id != BROKEN
            yield StepResult(slot, *(_extend(sequence, id) if sequence.is_finite else _end(sequence, "broken")))


def _extend(sequence: _Sequence, id: int) -> tuple[int | None, Ending | None]:
    """Append a sampled id; the id, unless it is a stop token, and how the sequence ended, if it did."""
    if id in sequence.stop_ids:
        return _end(sequence, "stop")
    sequence.unread.append(id)
    sequence.sampler.content_ids.append(id)
    sequence.remaining -= 1
    sequence.is_open = sequence.remaining > 0
    return id, None if sequence.is_open else "length"


def _end(sequence: _Sequence, finish_reason: Ending) -> tuple[None, Ending]:
    sequence.is_open = False
    return None, finish_reason


@contextmanager
def _evaluating(model: GPT2) -> Iterator[None]:
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def refuse_broken(finish_reason: Ending | None, model: GPT2) -> None:
    """Raise ValueError if a sequence broke, for callers that have no other to go on with."""
    if finish_reason == "broken":
        raise ValueError(
            "the model's logits must be finite, but are not: its weights are damaged, or too large for "
            f"{model.wte.weight.dtype}; try float32"
        )


def suppressed_token_mask(tokenizer: ChatTokenizer, table: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """bool [V], for the rows of the embedding `table`: padding, and control tokens other than `stop_ids`."""
    suppressed = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    suppressed[len(tokenizer) :] = True
    suppressed[sorted(tokenizer.control_ids)] = True
    suppressed[list(stop_ids)] = False
    return suppressed
