"""Start the Accelerator, and add up over processes.

- `start_accelerator` checks the launch and makes its Accelerator;
- `loss_scale` is the one place that knows by what Accelerate and DDP divide a gradient;
- `global_sum` adds numbers up over all processes; `device_sum` and `sum_and_any` do so without reading them back.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from gpt2ft.device import available_cores, choose_precision, on_cuda
from gpt2ft.distributed import cpu, launch_checks, rendezvous, watchdog
from gpt2ft.distributed.launch_checks import LaunchError, StrategyName
from gpt2ft.distributed.launcher_arguments import is_launched
from gpt2ft.distributed.signals import end_with_parent
from gpt2ft.errors import Gpt2ftError

Result = TypeVar("Result")


def start_accelerator(precision: str, micro_batches_per_step: int | None = None, deterministic: bool = False) -> Any:
    """Make the Accelerator of this run, with the watchdog of each process.

    Args:
        precision: as in the settings.
        micro_batches_per_step: over all processes; None where nothing is accumulated.

    Raises:
        LaunchError: if what was launched is not what would train, or cannot share a step's micro-batches equally.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batches_per_step = micro_batches_per_step or world_size
    launch_checks.check(micro_batches_per_step, world_size)  # before Accelerate and DeepSpeed are loaded
    accumulation = micro_batches_per_step // world_size

    # Torch and Accelerate warn of each other, and a user can do nothing about that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|accelerate)\b")
    rendezvous.install()
    with rendezvous.joining():
        accelerator = _accelerator(launch_checks.strategy(), _precision(precision), accumulation)
        launch_checks.check_given(accelerator, world_size)
        watchdog.start(accelerator)
    if world_size == 1 and is_launched():
        end_with_parent()  # accelerate launch does not pass SIGTERM on to a single process
    torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return accelerator


def _accelerator(strategy: StrategyName, precision: Literal["no", "bf16"], accumulation: int) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    on_cpu = not on_cuda()
    if on_cpu and torch.cuda.is_available() and strategy != "ddp":
        raise LaunchError("FSDP and DeepSpeed train on the GPUs where there are some: leave ACCELERATE_USE_CPU out")
    # Without buffers a forward pass alone need not wait; and gradients, once added up, lie in DDP's buckets alone.
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    plugins = {}
    if strategy == "fsdp2":
        if on_cpu:
            cpu.prepare_for_fsdp()
        plugins["fsdp_plugin"] = _fsdp_plugin()
    elif strategy in ("zero2", "zero3"):
        if on_cpu:
            handlers.append(cpu.prepare_for_deepspeed())
        plugins["deepspeed_plugin"] = _deepspeed_plugin(accumulation)
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=accumulation,
            sync_with_dataloader=False,
            sync_each_batch=strategy == "fsdp2",  # sums of gradients lie in shards between micro-batches
        ),
        kwargs_handlers=handlers,
        # Without it several processes would not know of each other where there is no GPU, and Apple's would be used,
        # which have no float64. FSDP and DeepSpeed are prepared above.
        cpu=on_cpu and strategy == "ddp",
        **plugins,
    )
    if plugins.get("deepspeed_plugin") and precision == "bf16":  # like the others: see strategy.py
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return accelerator


def _fsdp_plugin() -> Any:
    """Return the settings of FSDP that every run has; the launcher chooses resharding and offloading."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,  # each process has the weights anyway
    )


def _deepspeed_plugin(accumulation: int) -> Any:
    """Return the settings of DeepSpeed that every run has; the launcher chooses the stage and offloading."""
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(gradient_accumulation_steps=accumulation)
    plugin.deepspeed_config |= {
        "gradient_accumulation_steps": accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "zero_force_ds_cpu_optimizer": False,  # offloaded too, it is PyTorch's AdamW: the same run, and no compiler
    }
    return plugin


def is_deepspeed(accelerator: Any) -> bool:
    return accelerator.state.deepspeed_plugin is not None


def precision_of(accelerator: Any) -> Literal["no", "bf16"]:
    """Return the precision of matrix products; "no" is float32, in Accelerate's words, which misses DeepSpeed's."""
    if is_deepspeed(accelerator):
        casts = accelerator.state.deepspeed_plugin.deepspeed_config.get("torch_autocast", {}).get("enabled", False)
        return "bf16" if casts else "no"
    return accelerator.mixed_precision


def autocast(accelerator: Any) -> torch.autocast:
    """Return mixed precision as in training, for a model that is not wrapped: a context, or a decorator."""
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision_of(accelerator) == "bf16")


def loss_scale(accelerator: Any, normalizer: Tensor) -> Tensor:
    """Return the factor of a micro-batch's sum of losses that makes the step's gradient that of sum / normalizer.

    `Accelerator.backward` divides by the accumulation steps and the gradient all-reduce by the number of
    processes. Both are multiplied back here, and nowhere else. Without anything to count the factor is zero.

    Args:
        normalizer: a float64 scalar; it stays on its device.
    """
    divided_by = torch.full_like(normalizer, accelerator.gradient_accumulation_steps * accelerator.num_processes)
    return torch.where(normalizer > 0, divided_by / normalizer, 0.0).float()


def count_as_done(accelerator: Any, micro_batches: int) -> None:
    """Have Accelerate count micro-batches that no process computes: it updates after a fixed number of them."""
    if micro_batches:
        accelerator.step += micro_batches


def on_device(accelerator: Any, *numbers: float) -> Tensor:
    """Return numbers as float64 on the device, without waiting for it."""
    is_cuda = accelerator.device.type == "cuda"  # a copy of pinned memory does not block
    return torch.tensor(numbers, dtype=torch.float64, pin_memory=is_cuda).to(accelerator.device, non_blocking=True)


def device_sum(accelerator: Any, values: Tensor) -> Tensor:
    """Add a tensor up over all processes; it stays on the device, and nothing waits for it."""
    return accelerator.reduce(values, reduction="sum") if accelerator.num_processes > 1 else values


def global_sum(accelerator: Any, *numbers: float) -> list[float]:
    """Add each number up over all processes, in float64."""
    if accelerator.num_processes == 1:
        return list(numbers)
    return device_sum(accelerator, on_device(accelerator, *numbers)).tolist()


def sum_and_any(accelerator: Any, values: Tensor, *flags: bool) -> tuple[Tensor, list[bool]]:
    """Add a float64 vector up over all processes, and tell of each flag whether it is set on any: in one exchange."""
    if accelerator.num_processes == 1:
        return values, list(flags)
    total = device_sum(accelerator, torch.cat([values, on_device(accelerator, *flags)]))
    return total[: len(values)], [number > 0 for number in total[len(values) :].tolist()]


def once_a_machine(accelerator: Any, work: Callable[[], Result]) -> Result:
    """Return what `work` gives the first process of each machine to those beside it; all processes call it together.

    Each machine sees the disk for itself, but its processes need not all read the same gigabytes.

    Raises:
        Gpt2ftError, OSError: on all processes, if `work` does on any machine.
    """
    if accelerator.num_processes == 1:
        return work()
    from accelerate.utils import gather_object

    found, problem = None, None
    if accelerator.is_local_main_process:
        try:
            found = work()
        except (Gpt2ftError, OSError) as error:
            problem = error
    everywhere = gather_object([(found, problem)])
    for _, problem in everywhere:
        if problem is not None:
            raise problem
    return everywhere[accelerator.process_index - accelerator.local_process_index][0]


def raise_together(accelerator: Any, problem: OSError | None) -> None:
    """Have all processes end where one could not write.

    Raises:
        OSError: on all processes, if `problem` is one on any.
    """
    (failed,) = global_sum(accelerator, float(problem is not None))
    if problem is not None:
        raise problem
    if failed:
        raise OSError("the first process could not save")


def _precision(setting: str) -> Literal["no", "bf16"]:
    """Return the precision in the words of Accelerate; where the setting is auto the launcher may ask for bf16."""
    if setting == "auto" and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        setting = "bf16"
    return "bf16" if choose_precision(setting) == "bf16" else "no"
