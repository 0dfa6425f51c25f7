"""Generation with a key-value cache: sequences of different lengths are continued together, and join and leave
between tokens.

    slot 0   What is tea?     A hot drink.   (stop)   | And cold? ...        the next turn, behind what is cached
    slot 1          Name a colour.   Blue is a colour that ...
             --------------------------------------------------> steps, one token of every open sequence each

A step is one pass of the model over one stream: the new token of every sequence that is being said, and as much of the
prompts that have just joined as fits. So no long prompt holds up the others.

Shape letters: B sequences, N new tokens, E embedding width, V rows of the vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gpt2ft.inference.cache import KeyValueCache, side_by_side
from gpt2ft.inference.sampling import GREEDY, Sampler, Sampling, next_ids
from gpt2ft.model.attention import Attention
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.logprobs import head_logits
from gpt2ft.text.tokenizer import ChatTokenizer

MOST_TOGETHER = 16  # sequences that `generate` decodes together
PREFILL_CHUNK = 4096  # tokens of prompts: what a pass takes in memory is bounded

NOT_FINITE = (
    "the model's logits must be finite, but are not: its weights are damaged, or too large for {dtype}; try float32"
)


Finish = Literal["stop", "length", "broken"]


class Step(NamedTuple):
    """What one step brought a sequence: an id unless it ended by a stop token or broke, and how it ended if it did.

    It breaks where the model's logits are not finite.
    """

    slot: int
    id: int | None
    finish: Finish | None


@dataclass
class _Sequence:
    sampler: Sampler
    stop_ids: frozenset[int]
    unread: list[int]  # ids that are known, but that the model has not read yet: of the prompt, or the last one said
    remaining: int  # tokens that may still be said
    arrival: int
    is_open: bool = True
    is_sound: bool = True  # all that its slot holds has led to finite logits


class Decoder:
    """Continues up to `num_sequences` sequences together.

    A sequence takes a slot with `join` and keeps it until `leave`, also when it has ended. What it was stays cached:
    one that joins later, and begins in the same way, has only the rest read. Each sequence gets the tokens that it
    would get alone, up to the rounding of the model's dtype.

    The weights must stay as and where they are while a decoder lives. Training mode is left as it is found.

    Args:
        stop_ids: end a sequence, and are not part of it.
        forbidden: bool [V], ids that must never be said (`suppressed_token_mask`).
        prefill_chunk: how many tokens of prompts one step reads; those that joined first come first.
    Raises:
        ValueError: if `forbidden` does not fit the model, or leaves nothing to say.
    """

    def __init__(
        self,
        model: GPT2,
        stop_ids: Sequence[int],
        forbidden: Tensor,
        num_sequences: int,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        rows = len(model.wte.weight)
        if forbidden.dtype != torch.bool or forbidden.shape != (rows,):
            found = f"{forbidden.dtype} {list(forbidden.shape)}"
            raise ValueError(f"`forbidden` must be bool [{rows}], one for each row of the table, but is {found}")
        if forbidden.all():
            raise ValueError("`forbidden` must leave an id that can be said, but leaves none")
        for name, number in (("num_sequences", num_sequences), ("prefill_chunk", prefill_chunk)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {number}")
        self.model = model
        self._stop_ids = frozenset(stop_ids)
        self._forbidden = forbidden.to(model.wte.weight.device)
        self._controls = self._stop_ids | set(forbidden.nonzero()[:, 0].tolist())  # all that is not content
        self._read_per_step = prefill_chunk
        self._cache = KeyValueCache(model, num_sequences)
        self._cached: list[list[int]] = [[] for _ in range(num_sequences)]  # the ids whose keys and values a slot holds
        self._sequences: list[_Sequence | None] = [None] * num_sequences
        self._num_joined = 0

    @property
    def num_free(self) -> int:
        """How many sequences can still join."""
        return self._sequences.count(None)

    def check(self, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        """Raises ValueError if a prompt is empty, leaves no room for one token or holds an id that does not exist."""
        rows, most = len(self._forbidden), self.model.config.n_positions - 1
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
        sampling: Sampling,
        max_new_tokens: int,
        stop_ids: Sequence[int] | None = None,
    ) -> int:
        """A new sequence; the next steps read its prompt.

        Args:
            stop_ids: which of the decoder's end this one, default all. The others it never says.
        Returns:
            The slot. Of the free ones it is the one that already holds most of the prompt.
        Raises:
            ValueError: as `check` does, and if no slot is free.
        """
        self.check(prompt_ids, max_new_tokens)
        own_stop_ids = self._stop_ids if stop_ids is None else frozenset(stop_ids)
        assert own_stop_ids <= self._stop_ids, f"{stop_ids} must be among {self._stop_ids}"
        context = list(prompt_ids[:-1])  # at least the last id is read again: the model's answer to it is wanted
        slot = self._free_slot(context)
        start = _num_shared(self._cached[slot], context)
        del self._cached[slot][start:]
        content_ids = [id for id in prompt_ids if id not in self._controls]
        remaining = min(max_new_tokens, self.model.config.n_positions - len(prompt_ids))
        sampler, unread = Sampler(sampling, content_ids), list(prompt_ids[start:])
        self._sequences[slot] = _Sequence(sampler, own_stop_ids, unread, remaining, self._num_joined)
        self._num_joined += 1
        return slot

    @torch.no_grad()
    def step(self) -> list[Step]:
        """One new token for every open sequence whose prompt is read to its end, by slot."""
        portions = self._portions()
        if not portions:
            return []
        hidden = self._read_portions(portions)
        ready = sorted((slot, row) for row, slot in enumerate(portions) if not self._at(slot).unread)
        if not ready:
            return []
        slots, rows = zip(*ready, strict=True)
        return list(self._say_next(slots, hidden[list(rows)]))

    def leave(self, slot: int) -> None:
        """Frees a slot, whether its sequence has ended or not."""
        if not self._at(slot).is_sound:
            self._cached[slot].clear()
            self._cache.forget(slot)
        self._sequences[slot] = None

    def _at(self, slot: int) -> _Sequence:
        sequence = self._sequences[slot]
        assert sequence is not None, f"slot {slot} is free"
        return sequence

    def _free_slot(self, context: list[int]) -> int:
        """The one that shares most with `context`; of equals the one that holds least of use to others."""
        free = [slot for slot, sequence in enumerate(self._sequences) if sequence is None]
        if not free:
            raise ValueError(
                f"all {len(self._sequences)} slots are taken: one sequence must leave before another joins"
            )
        return max(free, key=lambda slot: (_num_shared(self._cached[slot], context), -len(self._cached[slot])))

    def _portions(self) -> dict[int, list[int]]:
        """What the next pass reads, by slot: first as much of the prompts as it may, then single ids, slots ascending.

        A single id is always read: it is what a sequence has said last, or all that is left of its prompt.
        """
        open_ = [(slot, sequence) for slot, sequence in enumerate(self._sequences) if sequence and sequence.is_open]
        portions, single = {}, {}
        room = self._read_per_step
        for slot, sequence in sorted(open_, key=lambda pair: pair[1].arrival):
            portion = sequence.unread[: max(room, 0)] if len(sequence.unread) > 1 else sequence.unread[:1]
            if len(portion) > 1:
                portions[slot] = portion
                room -= len(portion)
            elif portion:
                single[slot] = portion
        return portions | dict(sorted(single.items()))

    def _read_portions(self, portions: dict[int, list[int]]) -> Tensor:
        """One pass. The hidden state after the last id of each portion, [B, E]."""
        starts = {slot: len(self._cached[slot]) for slot in portions}
        self._cache.make_room(max(starts[slot] + len(ids) for slot, ids in portions.items()))
        prompts = [slot for slot, ids in portions.items() if len(ids) > 1]
        singles = [slot for slot, ids in portions.items() if len(ids) == 1]
        attentions = [self._cache.prefill(slot, starts[slot]) for slot in prompts]
        sizes = [len(portions[slot]) for slot in prompts]
        if singles:
            attentions.append(self._cache.step(singles, [starts[slot] for slot in singles]))
            sizes.append(len(singles))
        ids = [id for portion in portions.values() for id in portion]
        positions = [starts[slot] + i for slot, portion in portions.items() for i in range(len(portion))]
        hidden = self._read(ids, positions, side_by_side(attentions, sizes))
        for slot, portion in portions.items():
            self._cached[slot] += portion
            self._at(slot).is_sound = False  # until the logits that follow are finite
            del self._at(slot).unread[: len(portion)]
        lasts = torch.tensor([len(portion) for portion in portions.values()], device=hidden.device).cumsum(0) - 1
        return hidden[lasts]

    def _say_next(self, slots: Sequence[int], hidden: Tensor) -> Iterator[Step]:
        """Args: hidden: [B, E], the states that the next ids follow from."""
        sequences = [self._at(slot) for slot in slots]
        logits = head_logits(hidden, self.model.wte.weight, len(self._forbidden))
        are_finite = logits.masked_fill(self._forbidden, 0.0).isfinite().all(-1)
        logits = logits.masked_fill(~are_finite[:, None], 0.0).masked_fill(self._forbidden, -torch.inf)
        for row, sequence in zip(logits, sequences, strict=True):
            if others := self._stop_ids - sequence.stop_ids:
                row[list(others)] = -torch.inf
        ids = next_ids(logits, [sequence.sampler for sequence in sequences])
        for slot, sequence, id, is_finite in zip(slots, sequences, ids.tolist(), are_finite.tolist(), strict=True):
            sequence.is_sound = is_finite
            yield self._say(slot, sequence, id) if is_finite else self._break(slot, sequence)

    def _read(self, ids: Sequence[int], positions: Sequence[int], attend: Attention) -> Tensor:
        tokens, positions_ = torch.tensor([ids, positions], device=self._forbidden.device)
        with _evaluating(self.model):
            return self.model(tokens, positions_, attend)

    def _say(self, slot: int, sequence: _Sequence, id: int) -> Step:
        if id in sequence.stop_ids:
            sequence.is_open = False
            return Step(slot, None, "stop")
        sequence.unread.append(id)
        sequence.sampler.content_ids.append(id)
        sequence.remaining -= 1
        sequence.is_open = sequence.remaining > 0
        return Step(slot, id, None if sequence.is_open else "length")

    def _break(self, slot: int, sequence: _Sequence) -> Step:
        sequence.is_open = False
        return Step(slot, None, "broken")


@contextmanager
def _evaluating(model: GPT2) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


@dataclass(frozen=True)
class Reply:
    """What a model said: `ids` without the stop token, `stopped` if it ended by itself."""

    ids: list[int]
    stopped: bool


def generate(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    forbidden: Tensor,
    sampling: Sampling = GREEDY,
) -> list[Reply]:
    """Continues each prompt until a stop token, `max_new_tokens` or the end of the context.

    Raises:
        ValueError: as `Decoder` does; a prompt that cannot be continued before anything is computed; and if the
            model's logits are not finite.
    """
    if not prompts:
        return []
    decoder = Decoder(model, stop_ids, forbidden, min(len(prompts), MOST_TOGETHER))
    for prompt in prompts:
        decoder.check(prompt, max_new_tokens)
    replies = [Reply([], stopped=False) for _ in prompts]
    waiting = deque(range(len(prompts)))
    decoded: dict[int, int] = {}  # slot -> number of the prompt
    while waiting or decoded:
        while waiting and decoder.num_free:
            number = waiting.popleft()
            decoded[decoder.join(prompts[number], sampling, max_new_tokens)] = number
        for slot, id, finish in decoder.step():
            number = decoded[slot]
            refuse_broken(finish, model)
            if id is not None:
                replies[number].ids.append(id)
            if finish:
                replies[number] = Reply(replies[number].ids, finish == "stop")
                decoder.leave(slot)
                del decoded[slot]
    return replies


def refuse_broken(finish: Finish | None, model: GPT2) -> None:
    """Raises ValueError if a sequence broke, for those who have no other to go on with."""
    if finish == "broken":
        raise ValueError(
            "the model's logits must be finite, but are not: its weights are damaged, or too large for "
            f"{model.wte.weight.dtype}; try float32"
        )


def suppressed_token_mask(tokenizer: ChatTokenizer, table: Tensor, stop_ids: Sequence[int] | None = None) -> Tensor:
    """bool [V], for the rows of the embedding `table`: padding, and control tokens other than the stops.

    Args:
        stop_ids: default those that end a turn, `<|end|>` and `<|endoftext|>`.
    """
    stop_ids = [tokenizer.end_id, tokenizer.end_of_text_id] if stop_ids is None else list(stop_ids)
    forbidden = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    forbidden[len(tokenizer) :] = True
    forbidden[sorted(tokenizer.control_ids)] = True
    forbidden[stop_ids] = False
    return forbidden
