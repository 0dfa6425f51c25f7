"""Keys and values of the tokens that sequences hold, and the attention over them.

Nothing here waits for the device: what is computed on is known on the CPU, from the lengths.

Shape letters: B sequences, N new tokens, T cached tokens, H heads, D head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from gpt2ft.device import to_device
from gpt2ft.model.attention import Attention
from gpt2ft.model.gpt2 import GPT2

GROWTH = 128  # tokens by which the cache grows


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
        """Grow, if needed, so that every slot can hold `num_tokens`."""
        capacity = self.keys[0].shape[2]
        if num_tokens > capacity:
            more = min(-(-num_tokens // GROWTH) * GROWTH, self.n_positions) - capacity
            for tensors in (self.keys, self.values):
                for layer, tensor in enumerate(tensors):
                    tensors[layer] = pad(tensor, (0, 0, 0, more))

    def prefill(self, slot: int, start: int, end: int) -> Attention:
        """Attention of one sequence's tokens `start` to `end` to the cached ones before and, causally, each other."""
        device = self.keys[0].device
        mask = torch.ones(end - start, end, dtype=torch.bool, device=device).tril(start) if start else None

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            self.keys[layer][slot, :, start:end] = k.transpose(0, 1)
            self.values[layer][slot, :, start:end] = v.transpose(0, 1)
            keys, values = self.keys[layer][slot, :, :end], self.values[layer][slot, :, :end]  # [H, T, D]
            mixed = scaled_dot_product_attention(
                q.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None
            )
            return mixed[0].transpose(0, 1)

        return attend

    def step(self, slots: Sequence[int], lengths: Sequence[int]) -> Attention:
        """Attention of one new token in each of `slots` (ascending) to itself and `lengths` cached ones; N is B."""
        device, most = self.keys[0].device, max(lengths) + 1
        index, ends = to_device([slots, lengths], device)
        # Without a mask where all see all: CUDA then has a faster kernel.
        seen = None if min(lengths) == max(lengths) else torch.arange(most, device=device) <= ends[:, None, None, None]
        is_run = len(slots) == slots[-1] - slots[0] + 1
        rows = slice(slots[0], slots[-1] + 1) if is_run else index  # a run of slots is read in place, others are copied

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            self.keys[layer][index, :, ends] = k
            self.values[layer][index, :, ends] = v
            keys, values = self.keys[layer][rows, :, :most], self.values[layer][rows, :, :most]  # [B, H, T, D]
            return scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen)[:, :, 0]

        return attend

    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        """Have a slot begin with the keys and values of another's first tokens."""
        self.make_room(num_tokens)
        for tensor in (*self.keys, *self.values):
            tensor[slot, :, :num_tokens] = tensor[source, :, :num_tokens]

    def forget(self, slot: int) -> None:
        """Fill a slot with zeros: values that are masked must be finite all the same, as 0 times NaN is NaN."""
        for tensor in (*self.keys, *self.values):
            tensor[slot] = 0


def side_by_side(attentions: Sequence[Attention], sizes: Sequence[int]) -> Attention:
    """Apply each attention to its own run of the stream, of `sizes` tokens."""
    if len(attentions) == 1:
        return attentions[0]

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        runs = zip(attentions, *(x.split(list(sizes)) for x in (q, k, v)), strict=True)
        return torch.cat([attention(*run, layer) for attention, *run in runs])

    return attend
