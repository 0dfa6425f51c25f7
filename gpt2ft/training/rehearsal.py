"""The largest stream once forward, backward and through the optimizer, before the first step: does it fit?

It leaves no trace: its loss is multiplied by zero and the learning rate is zero. And it has DDP settle how it groups
gradients, which it does after its first backward pass: a run that goes on from a checkpoint then adds up in the same
order as one that was never stopped.
"""

import math
from typing import Any

import torch

from gpt2ft.settings import TrainingSettings
from gpt2ft.stream import TokenStream
from gpt2ft.training import watch
from gpt2ft.training.optimizer import set_learning_rate
from gpt2ft.training.preflight import PreflightError
from gpt2ft.training.strategy import Strategy


class DoesNotFit(RuntimeError):
    """The largest stream needs more memory than there is."""


def rehearse(strategy: Strategy, accelerator: Any, stream: TokenStream, advice: str) -> int:
    """All processes come here together, before any moments are loaded.

    Args:
        stream: the largest.
        advice: what to do if it does not fit.

    Returns:
        Peak memory so far, in bytes: of the device; on a CPU of this process. The largest of all processes.

    Raises:
        DoesNotFit: on the process that has run out.
        PreflightError: if the model is broken.
    """
    watch.at("rehearsing the largest stream", is_long=True)
    strategy.model.train()
    set_learning_rate(strategy.optimizer, 0.0)
    try:
        accelerator.backward(strategy.model(stream.to(accelerator.device)).sum() * 0.0)
        norm = strategy.update()
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise DoesNotFit(f"a step does not fit into memory ({first}): {advice}") from error
    if not math.isfinite(norm):
        raise PreflightError("the model gives log-probs that are not finite, before any training: look at its weights")
    peak = torch.tensor(peak_memory(accelerator.device), dtype=torch.float64, device=accelerator.device)
    return int(accelerator.gather(peak).max())


def advice(training: TrainingSettings, longest: int, adapts: bool, shards: bool) -> str:
    """How to need less memory, the step kept as it is if possible.

    Args:
        longest: tokens of the longest conversation: a stream cannot be smaller.
        adapts: whether LoRA is on.
        shards: whether the processes share the optimizer's memory.
    """
    tokens, micro_batches = training.tokens_per_micro_batch, training.micro_batches_per_step
    ways = []
    if tokens % 2 == 0 and tokens // 2 >= longest:
        ways.append(
            f"--training.tokens_per_micro_batch {tokens // 2} --training.micro_batches_per_step {2 * micro_batches} "
            "(a step keeps its size)"
        )
    if not training.activation_checkpointing:
        ways.append("--training.activation_checkpointing")
    if not adapts:
        ways.append("--lora.rank 16")
    if not shards:
        ways.append("several GPUs with accelerate_configs/fsdp2.yaml")
    return "try " + ", or ".join(ways) if ways else "take a smaller model, or a GPU with more memory"


def peak_memory(device: torch.device) -> int:
    """Bytes on the device; of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
