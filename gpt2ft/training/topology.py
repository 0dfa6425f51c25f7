"""What was launched is what trains: a launch that would do less, or something else, is refused.

Launchers start fewer processes than asked, or processes that do not know of each other, without a word.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

STARTED_WITHOUT_TORCHRUN = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


class LaunchError(RuntimeError):
    """The processes that were started are not the processes that train together."""


def check_accumulation(micro_batches_per_step: int, world_size: int) -> None:
    if micro_batches_per_step % world_size:
        below = micro_batches_per_step // world_size * world_size
        nearest = [str(value) for value in (below, below + world_size) if value]
        raise LaunchError(
            f"`training.micro_batches_per_step` must be a multiple of the {world_size} processes, "
            f"but is {micro_batches_per_step}: use {' or '.join(nearest)}"
        )


def check_strategy() -> None:
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


def check_topology(accelerator: Any, world_size: int, accumulation: int) -> None:
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
    cpu = "" if on_cuda() else "ACCELERATE_USE_CPU=true "
    return f"`{cpu}torchrun --standalone --nproc_per_node {processes} {sys.argv[0]}`"


def is_launched() -> bool:
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


def on_cuda() -> bool:
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in (
        "true",
        "1",
        "yes",
    )
