"""The rule `visible(q, k) = k <= q < horizons[k]`, computed by whatever is fastest on the device.

An attention is made once per stream and called once per layer:

    attend = attention_for(stream.horizons, stream.num_tokens, backend)
    out = attend(q, k, v, layer)

Three backends give the same numbers (tests/model/test_attention.py):
- `flex`      CUDA: FlexAttention with a block mask built straight from the horizons.
- `segments`  CPU: one SDPA call per unbranched run of the tree over its root path.
- `dense`     any device: SDPA with the N x N mask. The reference for the other two.

Shape letters: N tokens, H heads, D head width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpt2ft.device import compiler_problem
from gpt2ft.errors import SettingsError
from gpt2ft.stream import Segment, block_kinds, segments, visible

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Backend = Literal["flex", "segments", "dense"]
Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # q, k, v [N, H, D] and the layer -> [N, H, D]

FLEX_BLOCK = 128


def choose_backend(asked: str, device: torch.device, setting: str) -> Backend:
    """Return the backend asked for; `auto` is the fastest: FlexAttention on CUDA, else segments.

    Args:
        setting: name of the setting, for the error.

    Raises:
        SettingsError: if FlexAttention, asked for or the fastest, cannot be compiled here.
    """
    fastest = "flex" if device.type == "cuda" else "segments"
    backend = fastest if asked == "auto" else asked
    problem = None
    if backend == "flex":
        problem = compiler_problem() if device.type == "cuda" else "on a CPU or an Apple GPU it has no backward pass"
    if problem:
        other = "dense" if device.type == "cuda" else "segments"
        raise SettingsError(f"FlexAttention cannot be used here: {problem}; or pass `--{setting} {other}`")
    return backend


def sdpa_of_varying_shapes() -> AbstractContextManager:
    """Have SDPA choose among kernels that take new shapes as they come.

    cuDNN's, which PyTorch prefers on an H100, is planned anew for each length and keeps every plan.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def attention_for(horizons: Tensor, num_tokens: int, backend: Backend) -> Attention:
    """Return the attention of one stream.

    Args:
        horizons: [N], on the device of the model.
        num_tokens: real tokens among N; each token of the tail sees only itself.
    """
    if backend == "flex":
        return flex_attention(horizons)
    if backend == "segments":
        return segment_attention(horizons, num_tokens)
    if backend == "dense":
        return dense_attention(horizons)
    raise ValueError(f"`backend` must be flex, segments or dense, but is {backend!r}")


@dataclass(frozen=True)
class DenseAttention:
    """Attention with the N x N mask."""

    mask: Tensor  # bool [N, N]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, N, D]
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask)[0].transpose(0, 1)


def dense_attention(horizons: Tensor) -> DenseAttention:
    """Return the reference for all others."""
    return DenseAttention(visible(horizons))


def segment_attention(horizons: Tensor, num_tokens: int) -> Attention:
    """Each segment attends to its ancestors and, causally, to itself. Nothing masked out is computed."""
    in_order = segments(horizons.tolist(), num_tokens)
    lengths = [segment.length for segment in in_order]
    tail = len(horizons) - num_tokens

    def mask_for(segment: Segment) -> Tensor | None:
        if not segment.ancestors:
            return None  # plainly causal
        above = sum(lengths[number] for number in segment.ancestors)
        return horizons.new_ones(segment.length, above + segment.length, dtype=torch.bool).tril(above)

    masks = [mask_for(segment) for segment in in_order]

    @sdpa_of_varying_shapes()
    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        queries, keys, values = (x.transpose(0, 1).split([*lengths, tail], dim=1) for x in (q, k, v))  # [H, n, D] each
        outputs = []
        for number, (segment, mask) in enumerate(zip(in_order, masks, strict=True)):
            path = [*segment.ancestors, number]
            path_keys, path_values = (torch.cat([x[i] for i in path], dim=1) for x in (keys, values))
            outputs.append(
                scaled_dot_product_attention(
                    queries[number][None],
                    path_keys[None],
                    path_values[None],
                    attn_mask=mask,
                    is_causal=mask is None,
                )[0]
            )
        outputs.append(values[-1])  # a token that sees only itself attends to its own value
        return torch.cat(outputs, dim=1).transpose(0, 1)

    return attend


@dataclass(frozen=True)
class FlexAttention:
    """FlexAttention with a block mask: unseen blocks are skipped, wholly seen ones need no mask.

    Lists of blocks are the number in each row [1, 1, N / block] and their columns, which come first.
    """

    horizons: Tensor  # [N]
    keys: tuple[Tensor, ...]  # by query block: the lists of partly seen key blocks, and of wholly seen ones
    queries: tuple[Tensor, ...]  # by key block: those of the query blocks that see it, for the backward pass

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention as inlined

        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, N, D]
        kernel = inlined if torch.compiler.is_compiling() else _flex_kernel(q.device.type)
        return kernel(q, k, v, block_mask=self.block_mask())[0].transpose(0, 1)

    def block_mask(self) -> "BlockMask":
        """Return the mask as FlexAttention takes it, made of the tensors where it is used: in a graph, as its part."""
        from torch.nn.attention.flex_attention import BlockMask

        horizons, size = self.horizons, len(self.horizons)

        def rule(batch, head, query, key):
            return (key <= query) & (query < horizons[key])

        return BlockMask((size, size), *self.keys, *self.queries, BLOCK_SIZE=(FLEX_BLOCK, FLEX_BLOCK), mask_mod=rule)


def flex_attention(horizons: Tensor) -> FlexAttention:
    """Return FlexAttention with the blocks found straight from the horizons."""
    some, full = block_kinds(horizons, FLEX_BLOCK)
    partial = some & ~full
    keys = (*_counts_and_columns(partial), *_counts_and_columns(full))
    return FlexAttention(horizons, keys, (*_counts_and_columns(partial.t()), *_counts_and_columns(full.t())))


def _counts_and_columns(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return a bool matrix as FlexAttention takes it: the number of true ones per row, and the columns, these first."""
    counts = blocks.sum(-1, dtype=torch.int32)
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].contiguous(), columns[None, None].contiguous()


@cache
def _flex_kernel(device_type: str):
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention) if device_type == "cuda" else flex_attention


def compiled(function: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    """Compile for fixed shapes, or one graph for all, as one graph or not at all: past the limit of recompilations,
    attention would be computed N x N without a word."""
    from torch._dynamo import config

    config.optimize_ddp = False  # which cuts the graph of a block where DDP's buckets end
    return torch.compile(function, dynamic=dynamic, fullgraph=True)
