"""Size of a micro-batch where `training.tokens_per_micro_batch` is auto: the largest that memory holds.

A step keeps its tokens: of streams that are twice as long it takes half as many. The size is looked for once, before
anything is trained; the run is then the one that has these two numbers in its settings, and goes on with them anywhere.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import torch

from gpt2ft.data.plan import Plan
from gpt2ft.data.reading import DataError
from gpt2ft.distributed.accelerator import global_sum, set_accumulation
from gpt2ft.errors import SettingsError
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.runs.describe import Hardware, memory_estimate, optimizer_bytes, parameter_counts
from gpt2ft.runs.loaded_model import read_run_settings
from gpt2ft.settings.scripts import RunSettings
from gpt2ft.settings.sections import STREAM_BLOCK
from gpt2ft.settings.training import TrainingSettings
from gpt2ft.text.display import print_row
from gpt2ft.training.memory_probe import fits

if TYPE_CHECKING:
    from gpt2ft.runs.output import Output

MARGIN = 0.1  # of the memory, for gaps between tensors and what is not PyTorch's


def sizes(training: TrainingSettings, longest: int, processes: int) -> list[tuple[int, int]]:
    """Return each size that makes up a step, as tokens and micro-batches, the largest first.

    Args:
        longest: tokens that a stream must hold at least.
    """
    blocks = training.auto_from * training.micro_batches_per_step // STREAM_BLOCK
    counts = [count for count in range(processes, blocks + 1, processes) if blocks % count == 0]
    found = [(blocks // count * STREAM_BLOCK, count) for count in counts]
    return [(tokens, count) for tokens, count in found if tokens >= longest]


def find_size(
    settings: RunSettings,
    model: TargetLogProbs,
    accelerator: Any,
    hardware: Hardware,
    plan_of: Callable[[RunSettings], Plan],
) -> RunSettings:
    """Return the settings with the largest size that fits on all processes, which call it together.

    Larger than the recipe's it is on CUDA alone, and only where a step is full: else it would hold more tokens.

    Raises:
        DataError: if the data do not fit streams of the recipe's size.
    """
    training = settings.training
    usual = training.auto_from, training.micro_batches_per_step
    is_full = plan_of(with_size(settings, *usual)).streams_per_step == training.micro_batches_per_step
    most = None if accelerator.device.type == "cuda" and is_full else training.auto_from
    all_sizes = sizes(training, settings.data.max_length, accelerator.num_processes)
    sized = with_size(settings, *usual)
    for tokens, count in (size for size in all_sizes if most is None or size[0] <= most):
        try:
            plan = plan_of(with_size(settings, tokens, count))
        except DataError:  # a prompt with its replies is longer: the last size that holds it is left to the probe
            break
        sized = with_size(settings, tokens, count)
        if not any(global_sum(accelerator, float(not _fits(model, accelerator, hardware, plan)))):
            break
    set_accumulation(accelerator, sized.training.micro_batches_per_step)
    if accelerator.is_main_process:
        tokens, count = sized.training.tokens_per_micro_batch, sized.training.micro_batches_per_step
        print_row("auto", f"micro-batches of {tokens:,} tokens, {count} to a step")
    return sized


def _fits(model: TargetLogProbs, accelerator: Any, hardware: Hardware, plan: Plan) -> bool:
    if accelerator.device.type != "cuda":
        free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return memory_estimate(model.gpt2, plan.capacity, hardware) <= (1 - MARGIN) * free
    _, total = torch.cuda.mem_get_info()
    gradients = 4 * parameter_counts(model.gpt2)[0]  # which the model has here, in full
    reserved = int(max(0, optimizer_bytes(model.gpt2, hardware) - gradients) + MARGIN * total)
    try:
        return fits(model, accelerator, plan.stream(plan.streams[0]), reserved)
    finally:
        torch.cuda.empty_cache()
        torch.compiler.reset()  # each length is compiled anew, and only so many may be
        if model.compiled:
            model.compiled.kinds.clear()


def keep_size(settings: RunSettings, output: "Output", accelerator: Any) -> RunSettings:
    """Return the settings with the size that was found at first, where the run in a folder is gone on with."""
    if settings.training.tokens_per_micro_batch != "auto" or not output.continues(settings):
        return settings
    try:
        settings = with_size_of(settings, read_run_settings(output.folder))
    except SettingsError:  # nothing lies there
        return settings
    set_accumulation(accelerator, settings.training.micro_batches_per_step)
    return settings


def with_size_of(settings: RunSettings, earlier: RunSettings) -> RunSettings:
    """Return the settings with the size of an earlier run, where theirs is auto and makes up the same step."""
    asked, found = settings.training, earlier.training
    tokens, count = found.tokens_per_micro_batch, found.micro_batches_per_step
    is_same = asked.tokens_per_micro_batch == "auto" and tokens != "auto"
    is_same = is_same and tokens * count == asked.auto_from * asked.micro_batches_per_step
    return with_size(settings, tokens, count) if is_same else settings


def with_size(settings: RunSettings, tokens: int, count: int) -> RunSettings:
    """Return the settings with micro-batches of so many tokens, and so many to a step."""
    usual = TrainingSettings.model_fields["auto_from"].default
    size = {"tokens_per_micro_batch": tokens, "micro_batches_per_step": count, "auto_from": usual}
    return settings.model_copy(update={"training": settings.training.model_copy(update=size)})
