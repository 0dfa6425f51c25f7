"""AdamW and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from gpt2ft.model.lora import output_matrices
from gpt2ft.settings.training import OptimizerSettings


def adamw(
    model: nn.Module, settings: OptimizerSettings, fused: bool, lora_plus_ratio: float = 1.0
) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters. Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".

    Matrices and embeddings decay; biases and norms do not.

    Args:
        fused: one kernel for the whole update, on CUDA.
        lora_plus_ratio: learning rate of the adapters' B over that of all else. Hayou et al. 2024, "LoRA+: Efficient
            Low Rank Adaptation of Large Models".
    """
    faster = output_matrices(model)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            ratio = lora_plus_ratio if parameter in faster else 1.0
            groups.setdefault((parameter.ndim < 2, ratio), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": 0.0 if is_vector else settings.weight_decay, "rate_ratio": ratio}
            for (is_vector, ratio), parameters in sorted(groups.items(), key=lambda group: group[0])
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=fused,
    )


def learning_rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Return the learning rate of step 0, 1, ... steps - 1: a linear warmup, then the schedule.

    The first step already moves (with w steps of warmup, step 0 has the rate peak / w); the last step has
    `final_fraction` of the peak, unless the schedule is constant.
    """
    warmup = round(steps * settings.warmup_fraction)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    remaining = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "constant": 1.0,
    }[settings.schedule]
    final = settings.final_fraction
    return settings.learning_rate * (final + (1 - final) * remaining)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group. It depends on the step alone, so no scheduler is checkpointed."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["rate_ratio"]
