"""Generation with a key-value cache: sequences of different lengths are continued together, and join and leave
between tokens.

    slot 0   What is tea?     A hot drink.   (stop)   | And cold? ...        the next turn, behind what is cached
    slot 1          Name a colour.   Blue is a colour that ...
             --------------------------------------------------> steps, one token of every open sequence each

Shape letters: B sequences, N new tokens, T cached tokens, H heads, D head width, V rows of the vocabulary.
"""

import codecs
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from gpt2ft.inference.sampling import GREEDY, Sampler, Sampling, next_ids
from gpt2ft.model.attention import Attention
from gpt2ft.model.gpt2 import GPT2
from gpt2ft.model.logprobs import head_logits
from gpt2ft.text.tokenizer import ChatTokenizer

GROWTH = 128  # tokens by which the cache grows
MOST_TOGETHER = 16  # sequences that `generate` decodes together


class KeyValueCache:
    """Keys and values of every layer for a number of slots, each of its own length; room is made as it is needed."""

    def __init__(self, model: GPT2, num_slots: int) -> None:
        config, like = model.config, model.wte.weight
        self.n_positions = config.n_positions
        kind = like.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        empty = like.new_zeros(num_slots, config.n_head, 0, config.n_embd // config.n_head, dtype=dtype)
        self.keys, self.values = [empty] * config.n_layer, [empty] * config.n_layer  # [slots, H, T, D] for each layer

    def make_room(self, num_tokens: int) -> None:
        capacity = self.keys[0].shape[2]
        if num_tokens > capacity:
            more = min(-(-num_tokens // GROWTH) * GROWTH, self.n_positions) - capacity
            for tensors in (self.keys, self.values):
                for layer, tensor in enumerate(tensors):
                    tensors[layer] = pad(tensor, (0, 0, 0, more))

    def prefill(self, slot: int, start: int) -> Attention:
        """The tokens of one sequence from `start` on: they see what is cached before it and, causally, each other."""

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            end = start + len(k)
            self.keys[layer][slot, :, start:end] = k.transpose(0, 1)
            self.values[layer][slot, :, start:end] = v.transpose(0, 1)
            keys, values = self.keys[layer][slot, :, :end], self.values[layer][slot, :, :end]  # [H, T, D]
            mask = torch.ones(len(q), end, dtype=torch.bool, device=q.device).tril(start) if start else None
            mixed = scaled_dot_product_attention(
                q.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None
            )
            return mixed[0].transpose(0, 1)

        return attend

    def step(self, slots: Sequence[int], lengths: Sequence[int]) -> Attention:
        """One new token in each of `slots` (ascending), behind the `lengths` tokens that are cached: N is B."""
        device, most = self.keys[0].device, max(lengths) + 1
        index, ends = torch.tensor([slots, lengths], device=device)
        seen = torch.arange(most, device=device) <= ends[:, None]  # [B, T]
        is_run = len(slots) == slots[-1] - slots[0] + 1
        rows = slice(slots[0], slots[-1] + 1) if is_run else index  # a run of slots is read in place, others are copied

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            self.keys[layer][index, :, ends] = k
            self.values[layer][index, :, ends] = v
            keys, values = self.keys[layer][rows, :, :most], self.values[layer][rows, :, :most]  # [B, H, T, D]
            return scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen[:, None, None])[:, :, 0]

        return attend


Finish = Literal["stop", "length"]


class Step(NamedTuple):
    """What one step brought a sequence: an id unless it ended by a stop token, and how it ended if it did."""

    slot: int
    id: int | None
    finish: Finish | None


@dataclass
class _Sequence:
    sampler: Sampler
    pending: int  # the last id: it is known, but the model has not read it yet
    remaining: int  # tokens that may still be said
    is_open: bool = True


class Decoder:
    """Continues up to `num_sequences` sequences together.

    A sequence takes a slot with `join` and keeps it until `leave`, also when it has ended. What it was stays cached:
    one that joins later, and begins in the same way, has only the rest read. Each sequence gets the tokens that it
    would get alone, up to the rounding of the model's dtype.

    The weights must stay as and where they are while a decoder lives. Training mode is left as it is found.

    Args:
        stop_ids: end a sequence, and are not part of it.
        forbidden: bool [V], ids that must never be said (`unsayable`).
    Raises:
        ValueError: if `forbidden` does not fit the model, or leaves nothing to say.
    """

    def __init__(self, model: GPT2, stop_ids: Sequence[int], forbidden: Tensor, num_sequences: int) -> None:
        rows = len(model.wte.weight)
        if forbidden.dtype != torch.bool or forbidden.shape != (rows,):
            found = f"{forbidden.dtype} {list(forbidden.shape)}"
            raise ValueError(f"`forbidden` must be bool [{rows}], one for each row of the table, but is {found}")
        if forbidden.all():
            raise ValueError("`forbidden` must leave an id that can be said, but leaves none")
        if num_sequences < 1:
            raise ValueError(f"`num_sequences` must be at least 1, but is {num_sequences}")
        self.model = model
        self._stop_ids = frozenset(stop_ids)
        self._forbidden = forbidden.to(model.wte.weight.device)
        self._controls = self._stop_ids | set(forbidden.nonzero()[:, 0].tolist())  # all that is not content
        self._cache = KeyValueCache(model, num_sequences)
        self._cached: list[list[int]] = [[] for _ in range(num_sequences)]  # the ids whose keys and values a slot holds
        self._sequences: list[_Sequence | None] = [None] * num_sequences

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

    @torch.no_grad()
    def join(self, prompt_ids: Sequence[int], sampling: Sampling, max_new_tokens: int) -> int:
        """Reads all of a prompt but its last id, which goes with the next step.

        Returns:
            The slot. Of the free ones it is the one that already holds most of the prompt.
        Raises:
            ValueError: as `check` does, and if no slot is free.
        """
        self.check(prompt_ids, max_new_tokens)
        *context, pending = prompt_ids
        slot = self._free_slot(context)
        start = _num_shared(self._cached[slot], context)
        del self._cached[slot][start:]
        if new := context[start:]:
            self._cache.make_room(len(context))
            self._read(new, list(range(start, len(context))), self._cache.prefill(slot, start))
            self._cached[slot] += new
        content_ids = [id for id in prompt_ids if id not in self._controls]
        remaining = min(max_new_tokens, self.model.config.n_positions - len(prompt_ids))
        self._sequences[slot] = _Sequence(Sampler(sampling, content_ids), pending, remaining)
        return slot

    @torch.no_grad()
    def step(self) -> list[Step]:
        """One new token for every open sequence, by slot.

        Raises:
            ValueError: if the model's logits are not finite. The decoder is then of no further use.
        """
        open_ = [(slot, sequence) for slot, sequence in enumerate(self._sequences) if sequence and sequence.is_open]
        if not open_:
            return []
        slots, sequences = zip(*open_, strict=True)
        logits = self._next_logits(slots, [sequence.pending for sequence in sequences])
        ids = next_ids(logits, [sequence.sampler for sequence in sequences]).tolist()
        return [self._say(slot, sequence, id) for (slot, sequence), id in zip(open_, ids, strict=True)]

    def leave(self, slot: int) -> None:
        """Frees a slot, whether its sequence has ended or not."""
        assert self._sequences[slot] is not None, f"slot {slot} is free"
        self._sequences[slot] = None

    def _free_slot(self, context: list[int]) -> int:
        """The one that shares most with `context`; of equals the one that holds least of use to others."""
        free = [slot for slot, sequence in enumerate(self._sequences) if sequence is None]
        if not free:
            raise ValueError(
                f"all {len(self._sequences)} slots are taken: one sequence must leave before another joins"
            )
        return max(free, key=lambda slot: (_num_shared(self._cached[slot], context), -len(self._cached[slot])))

    def _next_logits(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        """Reads one id behind what is cached in each slot. Logits [B, V], minus infinity where forbidden."""
        lengths = [len(self._cached[slot]) for slot in slots]
        self._cache.make_room(max(lengths) + 1)
        hidden = self._read(ids, lengths, self._cache.step(slots, lengths))
        for slot, id in zip(slots, ids, strict=True):
            self._cached[slot].append(id)
        logits = head_logits(hidden, self.model.wte.weight, len(self._forbidden))
        if not logits.masked_fill(self._forbidden, 0.0).isfinite().all():
            raise ValueError(
                "the model's logits must be finite, but are not: its weights are damaged, or too large for "
                f"{self.model.wte.weight.dtype}; try float32"
            )
        return logits.masked_fill(self._forbidden, -torch.inf)

    def _read(self, ids: Sequence[int], positions: Sequence[int], attend: Attention) -> Tensor:
        tokens, positions_ = torch.tensor([ids, positions], device=self._forbidden.device)
        with _evaluating(self.model):
            return self.model(tokens, positions_, attend)

    def _say(self, slot: int, sequence: _Sequence, id: int) -> Step:
        if id in self._stop_ids:
            sequence.is_open = False
            return Step(slot, None, "stop")
        sequence.pending = id
        sequence.sampler.content_ids.append(id)
        sequence.remaining -= 1
        sequence.is_open = sequence.remaining > 0
        return Step(slot, id, None if sequence.is_open else "length")


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
        ValueError: as `Decoder` does; a prompt that cannot be continued before anything is computed.
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
            if id is not None:
                replies[number].ids.append(id)
            if finish:
                replies[number] = Reply(replies[number].ids, finish == "stop")
                decoder.leave(slot)
                del decoded[slot]
    return replies


def unsayable(tokenizer: ChatTokenizer, table: Tensor, stop_ids: Sequence[int] | None = None) -> Tensor:
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


class TextStream:
    """Ids in, text out: what is pushed and finished together equals `tokenizer.decode` of all ids.

    A character whose bytes are spread over several tokens comes with the last of them.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that is certain now.

        Raises:
            ValueError: if the id is not in use.
        """
        name_or_bytes = self._tokenizer.token_bytes(id) or self._tokenizer.decode([id]).encode()
        return self._decoder.decode(name_or_bytes)

    def finish(self) -> str:
        """The rest: U+FFFD where a character is incomplete."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Lets text pass up to the first stop string, however text and stop string are cut into pieces.

    The first is the one that is complete first. Text that may be the beginning of one is held back until that is
    decided.

    Attributes:
        found: a stop string has come; it and all that follows is swallowed.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if not all(strings):
            raise ValueError("a stop string must have at least one character, but one is empty")
        self.found = False
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may pass."""
        if self.found:
            return ""
        self._held += text
        starts = [(string, self._held.find(string)) for string in self._strings]
        places = [(start + len(string), start) for string, start in starts if start >= 0]
        if places:
            self.found = True
            return self._release(min(places)[1])
        return self._release(len(self._held) - self._num_undecided())

    def finish(self) -> str:
        """What was held back, if nothing has come that completes it."""
        return "" if self.found else self._release(len(self._held))

    def _num_undecided(self) -> int:
        """How long the longest end of the held text is that begins a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        ends = (length for length in lengths if any(s.startswith(self._held[-length:]) for s in self._strings))
        return next(ends, 0)

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released
