"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"), put onto a plain GPT-2 from outside.

    x W + b  +  scaling * dropout(x) A^T B^T          A [r, in] random, B [out, r] zero at first

DoRA (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5) trains the norm of each column too:

    W' = (|W| + change) * (W + scaling A^T B^T) / |W + scaling A^T B^T|

in which the divisor counts as a constant of the gradient (section 4.3). What is trained is the change of |W| and not
its value: so W' is W at first, to the bit, in any precision and on any device.

GPT-2 computes q, k and v in one matrix; here each has an A and a B of its own, in its third of the columns. The
matrices themselves are frozen and get no gradient. The rows of the chat tokens are trained along, or the model
would never learn to stop: they are parameters of their own, [n, E], written into the frozen table before each use,
so that embedding and head stay one. Where `embeddings` is set, the table is trained as it is without LoRA instead.
Names of the base's parameters stay what they are.

Shape letters as in gpt2.py; r rank, n trained rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding, linear

from gpt2ft.model.gpt2 import GPT2, Projection
from gpt2ft.model.logprobs import write_trained_rows
from gpt2ft.settings.choices import LORA_TARGETS
from gpt2ft.settings.sections import LoRASettings


def columns_of(target: str, width: int) -> slice:
    """Return the columns of a target in its matrix of `width` columns."""
    _, part, num_parts = LORA_TARGETS[target]
    return slice(part * width // num_parts, (part + 1) * width // num_parts)


def scaling_of(settings: LoRASettings, target: str) -> float:
    """Return alpha / rank; with `rslora` alpha / sqrt(rank) (Kalajdzievski 2023, "A Rank Stabilization Scaling
    Factor")."""
    rank = settings.rank_of(target)
    return settings.alpha_of(target) / (math.sqrt(rank) if settings.rslora else rank)


class Adapter(nn.Module):
    """Low-rank matrices A and B of one target, and with DoRA the change of the norms of its columns."""

    def __init__(self, size_in: int, size_out: int, settings: LoRASettings, target: str) -> None:
        super().__init__()
        self.rank, self.scaling = settings.rank_of(target), scaling_of(settings, target)
        self.A = nn.Parameter(torch.empty(self.rank, size_in))
        self.B = nn.Parameter(torch.zeros(size_out, self.rank))
        self.magnitude_change = nn.Parameter(torch.zeros(size_out)) if settings.dora else None

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw A as in a linear layer, U(-1/sqrt(in), 1/sqrt(in)), and set B to zero, so that nothing changes yet."""
        bound = 1 / math.sqrt(self.A.shape[1])
        self.A.uniform_(-bound, bound, generator=generator)
        self.B.zero_()


class AdaptedProjection(Projection):
    """A frozen projection, and adapters by target."""

    def __init__(self, base: Projection, settings: LoRASettings, targets: Sequence[str]) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = base.weight, base.bias
        self.dropout = settings.dropout
        size_in, size_out = base.weight.shape
        sizes = {target: size_out // LORA_TARGETS[target].num_parts for target in targets}
        self.adapters = nn.ModuleDict({target: Adapter(size_in, sizes[target], settings, target) for target in targets})

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x = dropout(x, self.dropout, self.training)
        low = linear(x, torch.cat([adapter.A for adapter in self.adapters.values()]))  # [N, r] for each target
        parts = low.split([adapter.rank for adapter in self.adapters.values()], dim=-1)
        for part, (target, adapter) in zip(parts, self.adapters.items(), strict=True):
            columns = columns_of(target, y.shape[-1])
            added = adapter.scaling * linear(part, adapter.B)
            if adapter.magnitude_change is not None:
                # Written as what is added to y, so that nothing is rounded again while nothing has changed.
                without_bias = y[..., columns] - self.bias[columns]
                added = added + (self.magnitude_factor(target) - 1) * (without_bias + added)
            y[..., columns] += added
        return y

    def magnitude_factor(self, target: str) -> Tensor:
        """Return what DoRA multiplies the columns of a target by, [out] in float32. See the head of this file.

        One copy of the columns is made. The norms of W are taken of it too, by the same sums, so that the factor is 1
        while nothing has changed.
        """
        adapter = self.adapters[target]
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            columns = self.weight[:, columns_of(target, self.weight.shape[1])].to(adapter.A.dtype, copy=True)
            before = columns.norm(dim=0)
            after = columns.addmm_(adapter.A.t(), adapter.B.t(), alpha=adapter.scaling).norm(dim=0)
        return (before + adapter.magnitude_change) / after

    @torch.no_grad()
    def magnitudes(self) -> Tensor:
        """Return the norms that DoRA gives the columns, [out] in float32: those of W where no target is."""
        norms = self.weight.float().norm(dim=0)
        for target, adapter in self.adapters.items():
            norms[columns_of(target, len(norms))] += adapter.magnitude_change
        return norms

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return W with the adapters added, [in, out] in float32."""
        weight = self.weight.float().clone()
        for target, adapter in self.adapters.items():
            columns = columns_of(target, weight.shape[1])
            weight[:, columns] += adapter.scaling * (adapter.B.float() @ adapter.A.float()).t()
            if adapter.magnitude_change is not None:
                weight[:, columns] *= self.magnitude_factor(target)
        return weight


class AdaptedEmbedding(nn.Module):
    """A frozen table of which some rows are trained."""

    def __init__(self, base: nn.Embedding, row_ids: Sequence[int]) -> None:
        super().__init__()
        self.weight = base.weight
        self.register_buffer("row_ids", torch.tensor(row_ids, device=base.weight.device), persistent=False)
        self.rows = nn.Parameter(base.weight.detach()[self.row_ids].float())  # [n, E]

    def refresh(self) -> Tensor:
        """Return the table [V, E] with the rows as they are now."""
        return write_trained_rows(self.weight, self.rows, self.row_ids)

    def forward(self, tokens: Tensor) -> Tensor:
        return _Embedded.apply(self.rows, self.refresh(), self.row_ids, tokens)


class _Embedded(torch.autograd.Function):
    """Table lookup with a gradient for the trained rows alone."""

    @staticmethod
    def forward(ctx, rows: Tensor, table: Tensor, row_ids: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(row_ids, tokens)
        return embedding(tokens, table).to(rows.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        row_ids, tokens = ctx.saved_tensors
        is_row = tokens[None, :] == row_ids[:, None]  # [n, N]
        return is_row.to(gradient.dtype) @ gradient, None, None, None  # [n, E]


def apply_lora(gpt2: GPT2, settings: LoRASettings, row_ids: Sequence[int], generator: torch.Generator) -> None:
    """Freeze a model and put adapters on it, in place; they and the rows `row_ids` of the table, or all, are trained.

    Outputs are the same as before.
    """
    gpt2.requires_grad_(False)
    targets = [target for target in LORA_TARGETS if target in settings.targets]  # in one order, however they are given
    assert targets, "`lora.targets` must name a target"
    for block in gpt2.h:
        for module in dict.fromkeys(LORA_TARGETS[target].module for target in targets):
            owner, name = block.get_submodule(module.rpartition(".")[0]), module.rpartition(".")[2]
            here = [target for target in targets if LORA_TARGETS[target].module == module]
            adapted = AdaptedProjection(getattr(owner, name), settings, here)
            for adapter in adapted.adapters.values():
                adapter.initialize(generator)
            setattr(owner, name, adapted)
    if settings.embeddings:
        gpt2.wte.requires_grad_(True)
    else:
        gpt2.wte = AdaptedEmbedding(gpt2.wte, sorted(row_ids))


@torch.no_grad()
def cast_frozen_matrices(gpt2: GPT2, dtype: torch.dtype) -> None:
    """Cast frozen matrices to the type they are multiplied in. Norms, biases and positions stay in float32."""
    for name, parameter in gpt2.named_parameters():
        if not parameter.requires_grad and parameter.ndim == 2 and name != "wpe.weight":
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def load_trainable_parameters(gpt2: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load values that `trainable_parameters` returned.

    Raises:
        ValueError: if other parameters are trained here, or of other shapes.
    """
    trained = trainable_parameters(gpt2)
    if trained.keys() != weights.keys():
        odd = sorted(trained.keys() ^ weights.keys())[0]
        raise ValueError(f"`{odd}` is trained either here or there, but not in both")
    for name, parameter in trained.items():
        if parameter.shape != weights[name].shape:  # copying would broadcast
            shapes = tuple(parameter.shape), tuple(weights[name].shape)
            raise ValueError(f"`{name}` must have shape {shapes[0]}, but has {shapes[1]}")
    for name, parameter in trained.items():
        parameter.copy_(weights[name])


def trainable_parameters(gpt2: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name: all of a plain model, adapters and rows of an adapted one."""
    return {name: parameter for name, parameter in gpt2.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def merged_weights(gpt2: GPT2) -> dict[str, Tensor]:
    """Return the weights, in float32 and by name, of the plain GPT-2 that computes the same as an adapted one."""
    merged = {f"{name}.weight": module.merged() for name, module in adapted_projections(gpt2)}
    if isinstance(gpt2.wte, AdaptedEmbedding):
        merged["wte.weight"] = gpt2.wte.refresh().float()
    own = (".adapters.", "wte.rows")
    plain = {name: p.float() for name, p in gpt2.named_parameters() if not any(part in name for part in own)}
    return plain | merged


def output_matrices(gpt2: nn.Module) -> set[nn.Parameter]:
    """Return the matrices B of all adapters, which LoRA+ gives a learning rate of their own."""
    return {adapter.B for _, module in adapted_projections(gpt2) for adapter in module.adapters.values()}


def adapted_projections(gpt2: nn.Module) -> Iterator[tuple[str, AdaptedProjection]]:
    return ((name, module) for name, module in gpt2.named_modules() if isinstance(module, AdaptedProjection))


def is_adapted(gpt2: GPT2) -> bool:
    return next(adapted_projections(gpt2), None) is not None
