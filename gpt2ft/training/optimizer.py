"""AdamW and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from gpt2ft.settings.sections import OptimizerSettings


def adamw(model: nn.Module, settings: OptimizerSettings, fused: bool) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters. Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".

    Matrices and embeddings decay; biases and norms do not.

    Args:
        fused: one kernel for the whole update, on CUDA.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
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
        group["lr"] = value
