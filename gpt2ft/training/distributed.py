"""Everything that depends on how many processes there are.

- `start` makes the Accelerator and refuses a launch that is not what it looks like;
- `loss_scale` is the one place that knows what is multiplied and divided behind `backward`;
- `global_sum` adds numbers up over all processes.
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch

from gpt2ft.training.interruption import end_with_parent

STARTED_WITHOUT_TORCHRUN = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


class LaunchError(RuntimeError):
    """The processes that were started are not the processes that train together."""


def start(precision: str, micro_batches_per_step: int | None = None, deterministic: bool = False) -> Any:
    """The Accelerator of this run.

    Args:
        precision: as in the settings.
        micro_batches_per_step: over all processes; None where nothing is accumulated.

    Raises:
        LaunchError: if the launch runs fewer processes than it was told to, runs them side by side instead of
            together, or cannot share a step's micro-batches equally.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    _check_strategy()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batches_per_step = micro_batches_per_step or world_size
    _check_accumulation(micro_batches_per_step, world_size)
    accumulation = micro_batches_per_step // world_size
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(
        mixed_precision=_precision(precision),
        gradient_accumulation_plugin=plugin,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # a forward pass alone must not wait
        cpu=torch.backends.mps.is_available(),  # Apple's GPUs have no float64, in which losses are added up
    )
    _check_topology(accelerator, world_size, accumulation)
    if world_size == 1 and _is_launched():
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
    if launcher not in ("no", "bf16"):
        raise LaunchError(f"the launcher's mixed_precision must be no or bf16, but is {launcher}")
    return "bf16" if launcher == "bf16" or _on_cuda() else "no"


def _on_cuda() -> bool:
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in (
        "true",
        "1",
        "yes",
    )


def _check_accumulation(micro_batches_per_step: int, world_size: int) -> None:
    if micro_batches_per_step % world_size:
        below = micro_batches_per_step // world_size * world_size
        nearest = [str(value) for value in (below, below + world_size) if value]
        raise LaunchError(
            f"`training.micro_batches_per_step` must be a multiple of the {world_size} processes, "
            f"but is {micro_batches_per_step}: use {' or '.join(nearest)}"
        )


def _check_strategy() -> None:
    """Processes know of each other and each has the whole model: anything else could train, but on other terms."""
    for strategy in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{strategy}", "false").lower() == "true":
            raise LaunchError(f"the launcher must not ask for {strategy}, which is not supported: use MULTI_GPU")
    started = max(int(os.environ.get(name, "1")) for name in STARTED_WITHOUT_TORCHRUN)
    if started > 1 and "WORLD_SIZE" not in os.environ:
        raise LaunchError(
            f"{started} processes were started by mpirun or srun, but each would train alone: "
            f"start torchrun once on each machine, as in {_command(started)}"
        )


def _check_topology(accelerator: Any, world_size: int, accumulation: int) -> None:
    if accelerator.num_processes != world_size:
        raise LaunchError(
            f"{world_size} processes were started, but each would train alone as 1 of "
            f"{accelerator.num_processes}: use {_command(world_size)}"
        )
    if world_size > 1 and accelerator.distributed_type == "NO":
        raise LaunchError(
            f"{world_size} processes were started, but their models would not be kept equal: use {_command(world_size)}"
        )
    asked = _processes_asked_for()
    if asked is not None and asked != world_size:
        raise LaunchError(
            f"accelerate launch was told to start {asked} processes, but started {world_size}: use {_command(asked)}"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(accumulation)):  # 1 is also what a launcher says that was told nothing
        raise LaunchError(
            f"the launcher's gradient_accumulation_steps must be left out, but is {steps}: "
            f"{accumulation} follow from `training.micro_batches_per_step`"
        )


def _command(processes: int) -> str:
    """What starts that many processes of this script on one machine of this kind."""
    cpu = "" if _on_cuda() else "ACCELERATE_USE_CPU=true "
    return f"`{cpu}torchrun --standalone --nproc_per_node {processes} {sys.argv[0]}`"


def _is_launched() -> bool:
    """Whether this process's parent is `accelerate launch`."""
    import psutil

    try:
        parent = psutil.Process().parent()
        return _launch_arguments(parent.cmdline() if parent else []) is not None
    except psutil.Error:
        return False


def _processes_asked_for() -> int | None:
    """How many processes `accelerate launch` was told to start, if it is this process's parent.

    With --cpu it starts one, whatever --num_processes says, and tells the script nothing of it: only its
    command line and its config file know.
    """
    import psutil

    try:
        parent = psutil.Process().parent()
        arguments = _launch_arguments(parent.cmdline() if parent else [])
    except psutil.Error:
        return None
    if arguments is None:
        return None
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    told, _ = launch_command_parser().parse_known_args(arguments)
    if told.num_processes is not None:
        return told.num_processes
    if told.config_file or (os.path.isfile(default_config_file) and not told.cpu):
        return getattr(load_config_from_file(told.config_file), "num_processes", None)
    return None


def _launch_arguments(words: Sequence[str]) -> Sequence[str] | None:
    """What follows `accelerate launch` in a command line, however it is spelled; None if it is another command."""
    names = [os.path.basename(word) for word in words]
    for number, name in enumerate(names):
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return words[number + 1 :]
        command = names[number + 1 : number + 2]
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and command == ["launch"]:
            return words[number + 2 :]
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
