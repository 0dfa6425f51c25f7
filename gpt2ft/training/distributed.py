"""Everything that depends on how many processes there are.

- `start` makes the Accelerator of a launch that is what it looks like;
- `loss_scale` is the one place that knows what is multiplied and divided behind `backward`;
- `global_sum` adds numbers up over all processes.
"""

import hashlib
import os
from typing import Any, Literal

import torch

from gpt2ft.training import topology
from gpt2ft.training.interruption import end_with_parent
from gpt2ft.training.launcher import is_launched
from gpt2ft.training.topology import LaunchError


def start(precision: str, micro_batches_per_step: int | None = None, deterministic: bool = False) -> Any:
    """The Accelerator of this run.

    Args:
        precision: as in the settings.
        micro_batches_per_step: over all processes; None where nothing is accumulated.

    Raises:
        LaunchError: if what was launched is not what would train, or cannot share a step's micro-batches equally.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batches_per_step = micro_batches_per_step or world_size
    topology.check(micro_batches_per_step, world_size)  # before Accelerate and DeepSpeed are loaded
    accumulation = micro_batches_per_step // world_size

    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(
        mixed_precision=_precision(precision),
        gradient_accumulation_plugin=plugin,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # a forward pass alone must not wait
        cpu=torch.backends.mps.is_available(),  # Apple's GPUs have no float64, in which losses are added up
    )
    topology.check_given(accelerator, world_size)
    if world_size == 1 and is_launched():
        end_with_parent()  # accelerate launch does not pass SIGTERM on to a single process
    torch.set_num_threads(max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return accelerator


def loss_scale(accelerator: Any, count: float) -> float:
    """What to multiply a micro-batch's sum of losses by, so that the step's gradient is that of sum / count.

    `Accelerator.backward` divides by the accumulation steps and the gradient all-reduce by the number of
    processes. Both are multiplied back here, and nowhere else.
    """
    return accelerator.gradient_accumulation_steps * accelerator.num_processes / count if count else 0.0


def global_sum(accelerator: Any, *numbers: float) -> list[float]:
    """Each number added up over all processes, in float64."""
    if accelerator.num_processes == 1:
        return list(numbers)
    local = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(local, reduction="sum").tolist()


def check_agreement(accelerator: Any, step: int, *data: str) -> None:
    """Raises LaunchError unless all processes go on from the same step with the same data.

    Args:
        data: digests of all tokenised data.
    """
    if accelerator.num_processes == 1:
        return
    digest = int(hashlib.sha256("".join(data).encode()).hexdigest()[:12], 16)
    mine = torch.tensor([step, digest], dtype=torch.float64, device=accelerator.device)
    same_step, same_data = (accelerator.gather(mine).view(-1, 2) == mine).all(0).tolist()
    if not same_step:
        raise LaunchError(
            f"the processes do not find the same checkpoints (this one would go on from step {step}): "
            "`output` must be on a folder that all machines share"
        )
    if not same_data:
        raise LaunchError(
            "the machines do not have the same data: the files that `data.train` and `data.eval` name must be the "
            "same on each"
        )


def _precision(setting: str) -> Literal["no", "bf16"] | None:
    """What to tell Accelerate; None leaves it to the launcher."""
    if setting != "auto":
        return {"fp32": "no", "bf16": "bf16"}[setting]
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return "bf16" if launcher == "bf16" or topology.on_cuda() else "no"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
