"""Start the Accelerator, and add up over processes.

- `start_accelerator` checks the launch and makes its Accelerator;
- `loss_scale` is the one place that knows by what Accelerate and DDP divide a gradient;
- `global_sum` adds numbers up over all processes; `device_sum` and `sum_and_any` do so without reading them back;
- `scaler_state` and `load_scaler` are of fp16, whose losses Accelerate multiplies by a scale, so that small gradients
  do not vanish: torch.amp.GradScaler halves it after a step that overflows, and doubles it after 2000 that do not.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from gpt2ft.device import DTYPES, PrecisionName, available_cores, choose_precision, device_type, on_cuda, to_device
from gpt2ft.distributed import cpu, launch_checks, rendezvous, watchdog
from gpt2ft.distributed.launch_checks import LaunchError, StrategyName
from gpt2ft.distributed.launcher_arguments import is_launched
from gpt2ft.errors import Gpt2ftError
from gpt2ft.system import end_with_parent, keep_freed_memory

Result = TypeVar("Result")
AcceleratePrecision = Literal["no", "bf16", "fp16"]


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
    strategy = launch_checks.strategy()
    rendezvous.install()
    with rendezvous.joining():
        accelerator = _accelerator(strategy, _precision(precision, strategy), accumulation)
        launch_checks.check_given(accelerator, world_size)
        watchdog.start(accelerator)
    if world_size == 1 and is_launched():
        end_with_parent()  # accelerate launch does not pass SIGTERM on to a single process
    torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return accelerator


def _accelerator(strategy: StrategyName, precision: AcceleratePrecision, accumulation: int) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    if precision == "fp16" and strategy in ("zero2", "zero3"):
        raise LaunchError(
            "DeepSpeed cannot train in fp16 here, as it clips gradients before it divides them by the scale of the "
            "loss: use `--training.precision bf16` or fp32, or DDP or FSDP2"
        )
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
        # Without it several processes would not know of each other where there is no GPU. FSDP and DeepSpeed are
        # prepared above.
        cpu=device_type() == "cpu" and strategy == "ddp",
        **plugins,
    )
    if precision == "fp16" and accelerator.scaler is None:
        cpu.prepare_for_fp16(accelerator)
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


def precision_of(accelerator: Any) -> AcceleratePrecision:
    """Return the precision of matrix products; "no" is float32, in Accelerate's words, which misses DeepSpeed's."""
    if is_deepspeed(accelerator):
        casts = accelerator.state.deepspeed_plugin.deepspeed_config.get("torch_autocast", {}).get("enabled", False)
        return "bf16" if casts else "no"
    return accelerator.mixed_precision


def precision_name(accelerator: Any) -> PrecisionName:
    """Return the precision of matrix products in the words of the settings."""
    precision = precision_of(accelerator)
    return "fp32" if precision == "no" else precision


def dtype_of(accelerator: Any) -> torch.dtype:
    """Return the type in which matrices are multiplied."""
    return DTYPES[precision_name(accelerator)]


def autocast(accelerator: Any) -> torch.autocast:
    """Return mixed precision as in training, for a model that is not wrapped: a context, or a decorator."""
    dtype = dtype_of(accelerator)
    is_mixed = dtype != torch.float32
    return torch.autocast(accelerator.device.type, dtype if is_mixed else None, enabled=is_mixed)


def scaler_state(accelerator: Any) -> dict[str, float]:
    """Return the scale of fp16's losses and the steps since it changed; nothing in other precisions."""
    if accelerator.scaler is None:
        return {}
    state = accelerator.scaler.state_dict()
    return {"loss_scale": state["scale"], "steps_at_loss_scale": float(state["_growth_tracker"])}


def load_scaler(accelerator: Any, saved: Mapping[str, float]) -> None:
    """Set the scale of fp16's losses to what `scaler_state` returned; to that of a first step where it is empty."""
    if accelerator.scaler is None:
        return
    state = torch.amp.GradScaler(accelerator.device.type).state_dict()
    if saved:
        state |= {"scale": saved["loss_scale"], "_growth_tracker": int(saved["steps_at_loss_scale"])}
    accelerator.scaler.load_state_dict(state)


def loss_scale(accelerator: Any, normalizer: Tensor) -> Tensor:
    """Return the factor of a micro-batch's sum of losses that makes the step's gradient that of sum / normalizer.

    `Accelerator.backward` divides by the accumulation steps and the gradient all-reduce by the number of
    processes. Both are multiplied back here, and nowhere else. Without anything to count the factor is zero.

    Args:
        normalizer: a float64 scalar; it stays on its device.
    """
    divided_by = torch.full_like(normalizer, accelerator.gradient_accumulation_steps * accelerator.num_processes)
    return torch.where(normalizer > 0, divided_by / normalizer, 0.0).float()


def set_accumulation(accelerator: Any, micro_batches_per_step: int) -> None:
    """Have a step take other numbers of micro-batches than it was started with; before anything is prepared.

    Raises:
        LaunchError: if the processes cannot share them equally.
    """
    launch_checks.check_accumulation(micro_batches_per_step, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = micro_batches_per_step // accelerator.num_processes
    if is_deepspeed(accelerator):
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps


def count_as_done(accelerator: Any, micro_batches: int) -> None:
    """Have Accelerate count micro-batches that no process computes: it updates after a fixed number of them."""
    if micro_batches:
        accelerator.step += micro_batches


def device_of_sums(accelerator: Any) -> torch.device:
    """Return where sums in float64 lie: on the device, but beside Apple's GPUs, which have no float64, on the CPU."""
    return accelerator.device if accelerator.device.type != "mps" else torch.device("cpu")


def as_sums(accelerator: Any, *values: Tensor) -> Tensor:
    """Return vectors end to end in float64, where sums lie."""
    device = device_of_sums(accelerator)
    return torch.cat([value.to(device).double() for value in values])


def on_device(accelerator: Any, *numbers: float) -> Tensor:
    """Return numbers as float64 where sums lie, without waiting for the device."""
    return to_device(numbers, device_of_sums(accelerator), torch.float64)


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


def _precision(setting: str, strategy: StrategyName) -> AcceleratePrecision:
    """Return the precision in the words of Accelerate; where the setting is auto the launcher may ask for one."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    asked = launcher if setting == "auto" and launcher != "no" else setting
    chosen = choose_precision(asked, without_bf16="fp32" if strategy in ("zero2", "zero3") else "fp16")
    return "no" if chosen == "fp32" else chosen
