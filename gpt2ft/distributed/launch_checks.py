"""Refuse a launch that would train less than it was told to, or something else.

Launchers start fewer processes than asked, or processes that do not know of each other, without a word; Accelerate
trains by DDP where it was asked for FSDP; and what it does not know in a section of its config it ignores. `check`
reads what the launcher has set and was told, before anything is loaded; `check_given` looks at the Accelerator, and
`check_wrapped` at the model that it has prepared.
"""

import difflib
import importlib.util
import os
from typing import Any, Literal

import torch
from torch import nn

from gpt2ft.command_line import running_script
from gpt2ft.distributed.launcher_arguments import Launch, find_launch, known_keys
from gpt2ft.errors import Gpt2ftError

STARTED_WITHOUT_TORCHRUN = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3"}
SECTIONS = {"fsdp_config": "FSDP", "deepspeed_config": "DEEPSPEED", "dynamo_config": None}  # distributed_type needed
_PREFIXES = {"fsdp_config": "fsdp_", "deepspeed_config": "", "dynamo_config": "dynamo_"}  # which Accelerate completes

StrategyName = Literal["ddp", "fsdp2", "zero2", "zero3"]


class LaunchError(Gpt2ftError):
    """The processes that were started are not the processes that train together."""


def strategy() -> StrategyName:
    """Return the strategy that the launcher asked for.

    Raises:
        LaunchError: if that is FSDP in another version than 2, or ZeRO in another stage than 2 or 3.
    """
    fsdp, deepspeed = _is_set("ACCELERATE_USE_FSDP"), _is_set("ACCELERATE_USE_DEEPSPEED")
    if fsdp and deepspeed:
        raise LaunchError("the launcher must ask for FSDP or for DeepSpeed, but asks for both: leave one out")
    if fsdp:
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise LaunchError(
                f"fsdp_version must be 2, but is {version}, the launcher's default being 1: set `fsdp_version: 2` in "
                "`fsdp_config`, or pass `--fsdp_version 2`, or FSDP_VERSION=2 to torchrun"
            )
        return "fsdp2"
    if deepspeed:
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("2", "3"):
            raise LaunchError(
                f"zero_stage must be 2 or 3, but is {stage}: set it in `deepspeed_config`, or pass `--zero_stage 2`"
            )
        return "zero2" if stage == "2" else "zero3"
    return "ddp"


def check(micro_batches_per_step: int, world_size: int) -> None:
    """Check what the launcher has set and was told, without making or loading anything.

    Args:
        micro_batches_per_step: over all processes.
        world_size: processes that know of each other, as the launcher says.

    Raises:
        LaunchError: if it would start fewer processes than it was told to, or processes that do not know of each
            other; if it asks for what is not supported, or sets what is not its to set; if it ignores a part of its
            own config; or if a step's micro-batches cannot be shared equally.
    """
    _check_started(world_size)
    launch = find_launch()
    if launch is not None:
        _check_config(launch)
    _check_settings(strategy())
    check_accumulation(micro_batches_per_step, world_size)
    _check_accumulation_of_launcher(micro_batches_per_step // world_size)
    asked = launch.processes if launch is not None else None
    if asked is not None and asked != world_size:
        raise LaunchError(
            f"accelerate launch was told to start {asked} processes, but started {world_size}: use {_command(asked)}"
        )


def check_given(accelerator: Any, world_size: int) -> None:
    """Check that Accelerate has understood what the launcher asked for.

    Raises:
        LaunchError: if the processes do not know of each other, or would train by something else.
    """
    if accelerator.num_processes != world_size:
        raise LaunchError(
            f"{world_size} processes were started, but each would train alone as 1 of "
            f"{accelerator.num_processes}: use {_command(world_size)}"
        )
    kind, chosen = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type)), strategy()
    if world_size > 1 and kind == "NO":
        raise LaunchError(
            f"{world_size} processes were started, but their models would not be kept equal: use {_command(world_size)}"
        )
    expected = {"fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}.get(chosen)
    if expected is not None and kind != expected:
        raise LaunchError(
            f"the launcher asked for {NAMES[chosen]}, but Accelerate would train by {kind}: leave that out and use "
            f"{_command(world_size)}"
        )
    if expected is None and kind in ("FSDP", "DEEPSPEED", "XLA", "MEGATRON_LM"):
        raise LaunchError(
            f"distributed_type must be NO, MULTI_GPU, FSDP or DEEPSPEED, but Accelerate would train by {kind}: use "
            f"{_command(world_size)}"
        )


def check_wrapped(strategy: StrategyName, model: nn.Module, processes: int) -> None:
    """Check that a prepared model is kept equal, or in shards, as the launcher asked.

    Args:
        model: what the Accelerator has made of the model; compiled or not.

    Raises:
        LaunchError: if it is wrapped in something else, or in nothing.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    inner = getattr(model, "_orig_mod", model)
    given = "nothing"
    if isinstance(inner, DistributedDataParallel):
        given = "ddp"
    elif isinstance(inner, FSDPModule):
        given = "fsdp2"
    elif any(kind.__name__ == "DeepSpeedEngine" for kind in type(inner).__mro__):
        given = f"zero{inner.zero_optimization_stage()}"
    alone = strategy == "ddp" and processes == 1  # torchrun has DDP wrap one process too
    expected = "nothing" if alone else strategy
    if given != expected and not (alone and given == "ddp"):
        count = f"{processes} process{'es' if processes > 1 else ''}"
        raise LaunchError(
            f"the model must be wrapped in {NAMES.get(expected, expected)} on {count}, but is in "
            f"{NAMES.get(given, given)}: use {_command(processes)}"
        )


def check_accumulation(micro_batches_per_step: int, world_size: int) -> None:
    if micro_batches_per_step % world_size:
        below = micro_batches_per_step // world_size * world_size
        nearest = [str(value) for value in (below, below + world_size) if value]
        raise LaunchError(
            f"`training.micro_batches_per_step` must be a multiple of the {world_size} processes, "
            f"but is {micro_batches_per_step}: use {' or '.join(nearest)}"
        )


def on_cuda() -> bool:
    return torch.cuda.is_available() and not _is_set("ACCELERATE_USE_CPU")


# --- what the launcher has set --------------------------------------------------------------------------------------


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def _check_started(world_size: int) -> None:
    """Raise LaunchError if processes, or launchers, were started side by side and do not know of each other."""
    started = max(int(os.environ.get(name, "1")) for name in STARTED_WITHOUT_TORCHRUN)
    if started > 1 and "WORLD_SIZE" not in os.environ:
        raise LaunchError(
            f"{started} processes were started by mpirun or srun, but each would train alone: "
            f"start torchrun once on each machine, as in {_command(started)}"
        )
    is_first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # later, machines may be fewer
    if started > 1 and is_first_start and os.environ.get("GROUP_WORLD_SIZE") == "1":
        raise LaunchError(
            f"{started} launchers were started by mpirun or srun, but each trains its own {world_size} processes: "
            f"start one on each machine, `torchrun --nnodes {started} --rdzv_backend c10d --rdzv_endpoint "
            f"FIRST_MACHINE:29500 --nproc_per_node {world_size} {running_script()}`"
        )


def _check_settings(chosen: StrategyName) -> None:
    """Raise LaunchError if the launcher sets what the recipe decides, or asks for what is not supported."""
    value = os.environ.get
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise LaunchError("the launcher must not ask for MEGATRON_LM, which is not supported: use MULTI_GPU or FSDP")
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise LaunchError("the launcher's `parallelism_config` is not supported: leave it out")
    if value("PJRT_DEVICE", "").upper() == "TPU":
        raise LaunchError("TPUs are not supported: use GPUs, or PJRT_DEVICE=CPU")
    precision = value("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise LaunchError(f"the launcher's mixed_precision must be no or bf16, but is {precision}")
    if chosen == "fsdp2":
        policy = value("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP").upper()
        wrapped = value("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block")
        if policy != "TRANSFORMER_BASED_WRAP" or wrapped != "Block":
            raise LaunchError(
                f"fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP of Block, but is {policy} of {wrapped}: leave "
                "`fsdp_auto_wrap_policy` and `fsdp_transformer_layer_cls_to_wrap` out"
            )
        if _is_set("FSDP_ACTIVATION_CHECKPOINTING") or _is_set("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
            raise LaunchError(
                "fsdp_activation_checkpointing must be false, but is true: use `--training.activation_checkpointing`"
            )
        if value("FSDP_IGNORED_MODULES"):
            raise LaunchError("`fsdp_ignored_modules` must be left out: their gradients would not be added up")
    if chosen in ("zero2", "zero3"):
        if importlib.util.find_spec("deepspeed") is None:
            raise LaunchError(
                "the launcher asks for DeepSpeed, which is not installed: `pip install deepspeed`, or use FSDP"
            )
        file = value("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if file != "none":
            raise LaunchError(
                f"deepspeed_config_file must be left out, but is {file}: the recipe decides what is in it, "
                "`deepspeed_config` its stage and offloading"
            )
        if value("ACCELERATE_GRADIENT_CLIPPING", "none") not in ("none", "auto"):
            raise LaunchError(
                f"the launcher's gradient_clipping must be left out, but is {value('ACCELERATE_GRADIENT_CLIPPING')}: "
                "use `--training.max_grad_norm`"
            )


def _check_accumulation_of_launcher(accumulation: int) -> None:
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if steps not in ("auto", str(accumulation)):
        raise LaunchError(
            f"the launcher's gradient_accumulation_steps must be left out, but is {steps}: "
            f"{accumulation} follow from `training.micro_batches_per_step`"
        )


def _check_config(launch: Launch) -> None:
    """Raise LaunchError for keys that Accelerate ignores: it refuses unknown ones at the top of its config only."""
    known = known_keys()
    for section, needed in SECTIONS.items():
        keys = launch.config.get(section) or {}
        for key in keys:
            prefix = _PREFIXES[section]
            full = key if key.startswith(prefix.rstrip("_")) else prefix + key
            if full not in known:
                nearest = difflib.get_close_matches(full, known, n=1)
                instead = f"did you mean {nearest[0]}?" if nearest else "leave it out"
                raise LaunchError(
                    f"{launch.file}: accelerate ignores `{section}.{key}`, which it does not know: {instead}"
                )
        if keys and needed is not None and not _is_set(f"ACCELERATE_USE_{needed}"):
            raise LaunchError(
                f"{launch.file}: accelerate ignores `{section}`, as `distributed_type` is "
                f"{launch.config.get('distributed_type')}: set that to {needed}, or leave the section out"
            )


def _command(processes: int) -> str:
    """Return the command that starts so many processes of this script on one machine of this kind."""
    cpu = "" if on_cuda() else "ACCELERATE_USE_CPU=true "
    return f"`{cpu}torchrun --standalone --nproc_per_node {processes} {running_script()}`"
