"""Refuse a launch that would train less than it was told to, or something else.

Launchers start fewer processes than asked, or processes that do not know of each other, without a word; Accelerate
trains by DDP where it was asked for FSDP, and ignores keys that it does not know in a section of its config. `check`
reads what the launcher has set and was told, before anything is loaded; `check_given` looks at the Accelerator, and
`check_wrapped` at the model that it has prepared.
"""

import difflib
import importlib.util
import os
import re
from typing import Any, Literal

import torch
from torch import nn

from gpt2ft.command_line import running_command
from gpt2ft.device import check_gpu, on_cuda
from gpt2ft.distributed.launcher_arguments import Launch, find_launch, known_keys
from gpt2ft.errors import Gpt2ftError
from gpt2ft.wording import counted

STARTED_WITHOUT_TORCHRUN = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3"}
SECTIONS = {"fsdp_config": "fsdp_", "deepspeed_config": "", "dynamo_config": "dynamo_"}  # prefixes that may be left out
COMPILED = "blocks are compiled anyway, and the rest would be again and again"
OFF = "(?!(?:true|1|yes)$).*"
# Of a launcher's settings: the variable, a pattern of what it may be, what must hold, and what to do if it does not.
ALWAYS = (
    ("ACCELERATE_USE_MEGATRON_LM", OFF, "MEGATRON_LM must be left out", "use MULTI_GPU or FSDP"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", OFF, "`parallelism_config` must be left out", "it is not supported"),
    ("PJRT_DEVICE", "(?!tpu).*", "PJRT_DEVICE must be no TPU", "use GPUs, or PJRT_DEVICE=CPU"),
    ("ACCELERATE_MIXED_PRECISION", "no|bf16|fp16", "mixed_precision must be no, bf16 or fp16", "use `precision`"),
    ("ACCELERATE_DYNAMO_BACKEND", "no", "dynamo_backend must be no", COMPILED),
)
FSDP = (
    ("FSDP_VERSION", "2", "fsdp_version must be 2", "set it in `fsdp_config`, by `--fsdp_version 2` or FSDP_VERSION=2"),
    ("FSDP_AUTO_WRAP_POLICY", "transformer_based_wrap", "fsdp_auto_wrap_policy must be left out", "Blocks are wrapped"),
    ("FSDP_TRANSFORMER_CLS_TO_WRAP", "(?-i:Block)", "fsdp_transformer_layer_cls_to_wrap must be Block", "leave it out"),
    ("FSDP_IGNORED_MODULES", "", "fsdp_ignored_modules must be left out", "their gradients would not be added up"),
    *(
        (name, OFF, f"{name.lower()} must be false", "use `--training.activation_checkpointing`")
        for name in ("FSDP_ACTIVATION_CHECKPOINTING", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD")
    ),
)
DEEPSPEED = (
    ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2|3", "zero_stage must be 2 or 3", "pass `--zero_stage 2`"),
    ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none", "deepspeed_config_file must be left out", "use `deepspeed_config`"),
    ("ACCELERATE_GRADIENT_CLIPPING", "none|auto", "gradient_clipping must be none", "use `--training.max_grad_norm`"),
)
OF_STRATEGIES = {"ddp": ALWAYS, "fsdp2": ALWAYS + FSDP, "zero2": ALWAYS + DEEPSPEED, "zero3": ALWAYS + DEEPSPEED}
DEFAULTS = {"FSDP_VERSION": "1"}  # of the launcher, where they are refused

StrategyName = Literal["ddp", "fsdp2", "zero2", "zero3"]


class LaunchError(Gpt2ftError):
    """Processes were started that would not train together, or not as they were told."""


def strategy() -> StrategyName:
    """Return the strategy that the launcher asks for; `check` refuses what is none of these."""
    if _is_set("ACCELERATE_USE_FSDP"):
        return "fsdp2"
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        return "zero3" if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else "zero2"
    return "ddp"


def check(micro_batches_per_step: int, world_size: int) -> None:
    """Check what the launcher has set and was told, without making or loading anything.

    Args:
        micro_batches_per_step: over all processes.
        world_size: processes that know of each other, as the launcher says.

    Raises:
        LaunchError: if fewer processes would train together, if a setting would be ignored or must not be set, or if
            the processes cannot share a step's micro-batches equally.
        DeviceError: if there is a GPU that cannot be used.
    """
    _check_started(world_size)
    launch = find_launch()
    if launch is not None:
        _check_config(launch)
    _check_device(launch)
    _check_settings()
    check_accumulation(micro_batches_per_step, world_size)
    if launch is not None and launch.processes not in (None, world_size):
        raise LaunchError(
            f"accelerate launch was told to start {counted(launch.processes, 'process', 'processes')}, "
            f"but started {world_size}: use {_command(launch.processes)}"
        )


def check_accumulation(micro_batches_per_step: int, world_size: int) -> None:
    """Raise LaunchError unless the processes can share a step's micro-batches equally, as the launcher has it."""
    if micro_batches_per_step % world_size:
        below = micro_batches_per_step // world_size * world_size
        nearest = " or ".join(str(value) for value in (below, below + world_size) if value)
        raise LaunchError(
            f"`training.micro_batches_per_step` must be a multiple of the {world_size} processes, "
            f"but is {micro_batches_per_step}: use {nearest}"
        )
    accumulation = micro_batches_per_step // world_size
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if steps not in ("auto", str(accumulation)):
        raise LaunchError(
            f"the launcher's gradient_accumulation_steps must be left out, but is {steps}: "
            f"{accumulation} follow from `training.micro_batches_per_step`"
        )


def check_given(accelerator: Any, world_size: int) -> None:
    """Check that Accelerate has understood what the launcher asked for.

    Raises:
        LaunchError: if the processes do not know of each other, or would train by something else.
    """
    use, known = f"use {_command(world_size)}", accelerator.num_processes
    if known != world_size:
        raise LaunchError(f"{world_size} processes were started, but each would train alone as 1 of {known}: {use}")
    kind, asked = str(accelerator.distributed_type.value), strategy()
    if world_size > 1 and kind == "NO":
        raise LaunchError(f"{world_size} processes were started, but their models would not be kept equal: {use}")
    expected = {"fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}.get(asked)
    is_other = kind in ("FSDP", "DEEPSPEED", "XLA", "MEGATRON_LM") if expected is None else kind != expected
    if is_other:
        raise LaunchError(f"the launcher asks for {NAMES[asked]}, but Accelerate would train by {kind}: {use}")


def check_wrapped(strategy: StrategyName, model: nn.Module, processes: int) -> None:
    """Check that a prepared model is kept equal, or in shards, as the launcher asks.

    Args:
        model: as the Accelerator has prepared it; compiled or not.

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
    is_alone = strategy == "ddp" and processes == 1  # torchrun has DDP wrap one process too
    if given != strategy and not (is_alone and given == "nothing"):
        raise LaunchError(
            f"on {counted(processes, 'process', 'processes')} the model must be wrapped in {NAMES[strategy]}, "
            f"but is in {NAMES.get(given, given)}: use {_command(processes)}"
        )


# --- what the launcher has set --------------------------------------------------------------------------------------


def _is_set(name: str) -> bool:
    return re.fullmatch(OFF, os.environ.get(name, ""), re.IGNORECASE) is None


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
            f"FIRST_MACHINE:29500 --nproc_per_node {world_size} {running_command()}`"
        )


def _check_device(launch: Launch | None) -> None:
    if launch is not None and launch.uses_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # the launcher does so for `--cpu`, but not always for `use_cpu`
    check_gpu()


def _check_settings() -> None:
    """Raise LaunchError if the launcher sets what the recipe decides, or asks for what is not supported."""
    asked = strategy()
    if asked == "fsdp2" and _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise LaunchError("the launcher must ask for FSDP or for DeepSpeed, but asks for both: leave one out")
    if asked in ("zero2", "zero3") and importlib.util.find_spec("deepspeed") is None:
        raise LaunchError("DeepSpeed, for which the launcher asks, is not installed: `pip install deepspeed`")
    for name, pattern, what_must_hold, remedy in OF_STRATEGIES[asked]:
        value = os.environ.get(name, DEFAULTS.get(name))
        if value is not None and not re.fullmatch(pattern, value, re.IGNORECASE):
            raise LaunchError(f"the launcher's {what_must_hold}, but is {value}: {remedy}")


def _check_config(launch: Launch) -> None:
    """Raise LaunchError for keys that Accelerate ignores: it refuses unknown ones at the top of its config only."""
    known = known_keys()
    for section, prefix in SECTIONS.items():
        keys = launch.config.get(section) or {}
        for key in keys:
            full = key if key.startswith(prefix.rstrip("_")) else prefix + key
            if full not in known:
                nearest = difflib.get_close_matches(full, known, n=1)
                remedy = f"did you mean {nearest[0]}?" if nearest else "leave it out"
                raise LaunchError(f"{launch.file}: accelerate ignores `{section}.{key}`, which is unknown: {remedy}")
        kind = section.removesuffix("_config").upper()
        if kind == "DYNAMO":
            if any(str(value).lower() not in ("no", "false") for value in keys.values()):
                raise LaunchError(f"{launch.file}: `{section}` must be left out: {COMPILED}")
        elif keys and not _is_set(f"ACCELERATE_USE_{kind}"):
            raise LaunchError(
                f"{launch.file}: accelerate ignores `{section}`, as `distributed_type` is "
                f"{launch.config['distributed_type'].value}: set that to {kind}, or leave the section out"
            )


def _command(processes: int) -> str:
    """Return the command that starts so many processes of this script on one machine of this kind."""
    cpu = "ACCELERATE_USE_CPU=true " if torch.cuda.is_available() and not on_cuda() else ""
    return f"`{cpu}torchrun --standalone --nproc_per_node {processes} {running_command()}`"
