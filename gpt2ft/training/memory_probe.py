"""Memory probe: run the largest stream forward, backward and through the optimizer before the first step.

It changes no weight, as its loss is multiplied by zero and the learning rate is zero; the moments are loaded after it.
DDP settles how it groups gradients after its first backward pass, which the probe makes at every start: so a run that
resumes adds up gradients in the same order as one that was never stopped.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpt2ft import system
from gpt2ft.distributed.accelerator import autocast, on_device
from gpt2ft.errors import Gpt2ftError
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.settings.training import TrainingSettings
from gpt2ft.stream import TokenStream
from gpt2ft.training.optimizer import set_learning_rate
from gpt2ft.training.preflight import PreflightError
from gpt2ft.training.strategy import Strategy


class DoesNotFit(Gpt2ftError):
    """The largest stream needs more memory than there is."""

    exit_code = 1
    on_every_rank = True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return True if PyTorch could not allocate; on CPUs and Apple's GPUs it has no class of its own for that."""
    said = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error within the block into one that says what to do.

    Args:
        advice: what to do, see `memory_advice`.

    Raises:
        DoesNotFit: on the process that has run out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0].rstrip(".")
        raise DoesNotFit(f"a step does not fit into memory ({first}): {advice}") from error


def probe_memory(strategy: Strategy, accelerator: Any, stream: TokenStream) -> int:
    """Run a step on the largest stream and return the peak memory in bytes, the highest of all processes.

    All processes call it together, before any moments are loaded. On a GPU the peak is that of this step, on a CPU that
    of the process so far.

    Args:
        stream: the largest of the plan.

    Raises:
        PreflightError: if the model gives values that are not finite.
    """
    strategy.model.train()
    set_learning_rate(strategy.optimizer, 0.0)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    accelerator.backward(strategy.model(stream.to(accelerator.device)).sum() * 0.0)
    norm = strategy.update()
    if not math.isfinite(norm):
        raise PreflightError("the model gives log-probs that are not finite, before any training: look at its weights")
    peak = on_device(accelerator, peak_memory(accelerator.device))
    return int(accelerator.gather(peak).max())


def fits(model: TargetLogProbs, accelerator: Any, stream: TokenStream, reserved: int) -> bool:
    """Run a stream forward and backward beside so many bytes that are taken; return False if memory is out.

    The model is not wrapped, so no process waits for another. It is left as it was.
    """
    was_training = model.training
    try:
        taken = torch.empty(reserved, dtype=torch.uint8, device=accelerator.device)
        with autocast(accelerator):
            log_probs = model.train()(stream.to(accelerator.device))
        (log_probs.sum() * 0.0).backward()
        return len(taken) == reserved
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def memory_advice(training: TrainingSettings, longest: int, uses_lora: bool, is_sharded: bool) -> str:
    """Return how to need less memory, with the step kept as it is where possible.

    Args:
        longest: tokens of the longest conversation or pair of replies: a stream cannot be smaller.
        is_sharded: the processes share the optimizer's memory already.
    """
    tokens, micro_batches = training.tokens_per_micro_batch, training.micro_batches_per_step
    ways = []
    if tokens % 256 == 0 and tokens // 2 >= longest:
        ways.append(
            f"--training.tokens_per_micro_batch {tokens // 2} --training.micro_batches_per_step {2 * micro_batches} "
            "(a step keeps its size)"
        )
    if not training.activation_checkpointing:
        ways.append("--training.activation_checkpointing")
    if not uses_lora:
        ways.append("--lora.rank 16")
    if not is_sharded:
        ways.append("several GPUs with accelerate_configs/fsdp2.yaml")
    return "try " + ", or ".join(ways) if ways else "take a smaller model, or a GPU with more memory"


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of PyTorch's tensors on a GPU, of the whole process on a CPU.

    Of Apple's GPUs it is what PyTorch holds of their memory now, which it does not give back by itself.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return torch.mps.driver_allocated_memory() if device.type == "mps" else system.peak_memory()
