"""Blocks compiled: one graph for all layers and streams of a size, with FlexAttention inlined.

The graph takes the weights of a block and the tensors of a stream's attention, so neither a layer nor a stream has one
of its own. What is compiled is what a block computes and not its call, so that whatever wraps blocks (FSDP2, activation
checkpointing) stays around the graph.
"""

from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2ft.device import compiler_problem, cpp_compiler_problem
from gpt2ft.errors import Gpt2ftError, SettingsError
from gpt2ft.model.attention import Attention, Backend, compiled

if TYPE_CHECKING:
    from gpt2ft.model.gpt2 import Block


class Recompiled(Gpt2ftError):
    """A graph was compiled anew for work that has one: shapes are not what they seem."""

    exit_code = 1


def choose_compiling(asked: str, device: torch.device, backend: Backend, strategy: str, setting: str) -> bool:
    """Return True if blocks are to be compiled: as asked, or by `auto` on CUDA wherever they can be.

    Args:
        strategy: ddp, fsdp2, zero2 or zero3.
        setting: name of the setting, for the error.

    Raises:
        SettingsError: if they cannot be, but were to be.
    """
    if asked == "false" or (asked == "auto" and device.type != "cuda"):
        return False
    problem = compiling_problem(device, backend, strategy)
    if asked == "true" and problem:
        raise SettingsError(f"blocks cannot be compiled here: {problem}; or pass `--{setting} false`")
    return problem is None


def compiling_problem(device: torch.device, backend: Backend, strategy: str) -> str | None:
    """Return why blocks cannot be compiled, and what to do; None if they can."""
    if strategy == "zero3":
        return "ZeRO-3 gathers the weights of each projection from within its block; train with fsdp2"
    if backend == "segments":
        return "the segments of each stream have lengths of their own; set the attention to dense, or flex on CUDA"
    if device.type == "mps":
        return "on Apple's GPUs it has not been tried"
    return compiler_problem() if device.type == "cuda" else cpp_compiler_problem()


class CompiledBlocks:
    """Computes blocks by a graph that is compiled at the first call of each kind: with gradients or without, in each
    precision; without gradients also of each length, as held-out streams may be shorter."""

    def __init__(self) -> None:
        self.kinds: set[tuple] = set()  # for which there is a graph

    def __call__(self, block: "Block", x: Tensor, attend: Attention) -> Tensor:
        """Return the output of a block, x [N, E] -> [N, E].

        Raises:
            Recompiled: if the graph of this kind does not serve.
        """
        device = x.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        needs_gradients = torch.is_grad_enabled()
        # FSDP2 makes blocks of a class of its own.
        kind = (type(block), block.training, needs_gradients, precision, None if needs_gradients else len(x))
        is_known = kind in self.kinds
        try:
            with torch.compiler.set_stance("fail_on_recompile") if is_known else nullcontext():
                output = _compute()(block, x, attend)
        except RuntimeError as error:
            if is_known and "fail_on_recompile" in str(error):
                raise Recompiled(f"a block would be compiled anew, after the first: {error}") from error
            raise
        self.kinds.add(kind)
        return output


@cache
def _compute():
    from gpt2ft.model.gpt2 import Block

    return compiled(Block.compute)
