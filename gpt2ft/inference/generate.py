"""Generation with a key-value cache: several prompts of different lengths are continued together.

Shape letters: B prompts, T cached tokens, H heads, D head width, V rows of the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpt2ft.model.attention import Attention
from gpt2ft.model.gpt2 import GPT2

Choose = Callable[[Tensor], Tensor]  # logits [B, V] -> ids [B]


@dataclass(frozen=True)
class Reply:
    """What a model said: `ids` without the stop token, `stopped` if it ended by itself."""

    ids: list[int]
    stopped: bool


class KeyValueCache:
    """Keys and values of every layer for B sequences that grow at their own pace."""

    def __init__(self, model: GPT2, num_sequences: int, capacity: int) -> None:
        config, like = model.config, model.wte.weight
        shape = (config.n_layer, num_sequences, config.n_head, capacity, config.n_embd // config.n_head)
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.lengths = torch.zeros(num_sequences, dtype=torch.long, device=like.device)

    def prefill(self, sequence: int) -> Attention:
        """Plain causal attention over a whole prompt, kept as the cache of `sequence`."""

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H, N, D]
            self.keys[layer, sequence, :, : k.shape[1]] = k
            self.values[layer, sequence, :, : v.shape[1]] = v
            self.lengths[sequence] = k.shape[1]
            return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0].transpose(0, 1)

        return attend

    def step(self) -> Attention:
        """One new token for each sequence: q, k, v are [B, H, D]. `lengths` must already count it."""
        index = torch.arange(len(self.lengths), device=self.lengths.device)
        seen = torch.arange(self.keys.shape[3], device=index.device) < self.lengths[:, None]  # [B, T]

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            self.keys[layer, index, :, self.lengths - 1] = k
            self.values[layer, index, :, self.lengths - 1] = v
            keys, values = self.keys[layer], self.values[layer]  # [B, H, T, D]
            return scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen[:, None, None])[:, :, 0]

        return attend


@torch.no_grad()
def generate(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    forbidden: Tensor,
    choose: Choose,
) -> list[Reply]:
    """Continues each prompt until a stop token, `max_new_tokens` or the end of the context.

    Args:
        forbidden: bool [V], ids that must never be said (control tokens, padding rows).
        choose: picks the next ids, e.g. `sampling.greedy`.
    """
    was_training = model.training
    model.eval()
    device = model.wte.weight.device
    limits = [min(max_new_tokens, model.config.n_positions - len(prompt)) for prompt in prompts]
    cache = KeyValueCache(model, len(prompts), min(model.config.n_positions, max(map(len, prompts)) + max_new_tokens))
    last = []
    for sequence, prompt in enumerate(prompts):
        tokens = torch.tensor(prompt, device=device)
        hidden = model(tokens, torch.arange(len(prompt), device=device), cache.prefill(sequence))
        last.append(hidden[-1])
    hidden = torch.stack(last)  # [B, E]
    said: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    open_ = [limit > 0 for limit in limits]
    while any(open_):
        logits = model.logits(hidden).float().masked_fill(forbidden, -torch.inf)
        chosen = choose(logits)
        for sequence, id in enumerate(chosen.tolist()):
            if not open_[sequence]:
                continue
            if id in stop_ids:
                open_[sequence], stopped[sequence] = False, True
            else:
                said[sequence].append(id)
                open_[sequence] = len(said[sequence]) < limits[sequence]
        if any(open_):
            # Sequences that are done idle on their last place, so that shapes and the others stay as they are.
            cache.lengths += torch.tensor(open_, device=device)
            hidden = model(chosen, cache.lengths - 1, cache.step())
    model.train(was_training)
    return [Reply(ids, end) for ids, end in zip(said, stopped, strict=True)]
