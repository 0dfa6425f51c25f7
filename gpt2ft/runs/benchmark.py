"""launch/benchmark.py: speed and memory of a shape on this machine, beside the usual way where one is asked for."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpt2ft.benchmark import decoding, figures, machine
from gpt2ft.benchmark.training import Training, graphs_compiled
from gpt2ft.benchmark.usual import usual_way
from gpt2ft.benchmark.work import Amounts, Work, amounts_of, make_work
from gpt2ft.distributed import watchdog
from gpt2ft.distributed.accelerator import dtype_of, precision_name, start_accelerator
from gpt2ft.errors import SettingsError
from gpt2ft.model.gpt2 import GPT2Config
from gpt2ft.model.pretrained import published_config
from gpt2ft.settings.measuring import BenchmarkSettings
from gpt2ft.text.display import fit
from gpt2ft.training.memory_probe import peak_memory

ROWS = 50304  # of GPT-2's table with the chat tokens


@watchdog.announce_end()
def run(settings: BenchmarkSettings) -> None:
    """Measure, print the figures, and write them to `json` as one object.

    Raises:
        SettingsError: if what is asked for cannot be measured here.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_against(settings, num_processes)
    if settings.json:
        Path(settings.json).parent.mkdir(parents=True, exist_ok=True)
    accelerator = start_accelerator(settings.precision, settings.micro_batches * num_processes)
    config = replace(published_config(settings.model), vocab_size=ROWS)
    if settings.what == "generate":
        found = measure_decoding(settings, config, accelerator)
    else:
        found = measure_training(settings, config, accelerator, make_work(settings, num_processes))
    if accelerator.is_main_process:
        for line in figures.lines(found):
            print(fit(line, 2))
        if settings.json:
            Path(settings.json).write_text(json.dumps(found, indent=2) + "\n")


def check_against(settings: BenchmarkSettings, num_processes: int) -> None:
    """Raise SettingsError, before anything is loaded, if the usual way cannot run here."""
    if settings.against and find_spec(settings.against) is None:
        raise SettingsError(f"`--against {settings.against}` needs it: `pip install {settings.against}`")
    if settings.against and num_processes > 1:
        raise SettingsError(f"`against` is measured in one process, but there are {num_processes}")


def measure_decoding(settings: BenchmarkSettings, config: GPT2Config, accelerator: Any) -> dict[str, Any]:
    ours, usual = decoding.measure(settings, config, accelerator.device, dtype_of(accelerator))
    return compared_with(ours, usual)


def measure_training(settings: BenchmarkSettings, config: GPT2Config, accelerator: Any, work: Work) -> dict[str, Any]:
    """Take the steps of both ways in turn; the first of each, which compiles and allocates, is not counted."""
    device, dtype = accelerator.device, dtype_of(accelerator)
    already = graphs_compiled()
    training = Training(settings, config, accelerator, work)
    if accelerator.is_main_process:
        print(fit(headline(settings, training), 2), flush=True)
    seconds, theirs, done, rates = 0.0, 0.0, Amounts(), []
    with usual_way(settings, config, device, dtype) if settings.against else nullcontext() as usual:
        for step in range(settings.steps + 1):
            watchdog.mark_progress("step", step)
            own = training.step()
            other = usual.step() if usual else 0.0
            if step:
                seconds, theirs, done = seconds + own, theirs + other, done + amounts_of(work, step)
                rates.append(machine.matmul_flops(device, dtype))
        peak_of_usual = usual.peak_memory() if usual else 0
    ours = {"tokens_per_second": done.tokens / seconds} | figures.rates(done, seconds, peak_memory(device))
    ours |= shares(settings, training, config, done, seconds, max(rates))
    ours |= {"copied_bytes_per_second": machine.copied_bytes(device)} | training.profile()
    ours["graphs_compiled"] = graphs_compiled() - already
    return compared_with(ours, figures.rates(done, theirs, peak_of_usual) if settings.against else None)


def shares(
    settings: BenchmarkSettings, training: Training, config: GPT2Config, done: Amounts, seconds: float, matmul: float
) -> dict[str, float]:
    """Return the FLOP/s by both counts, their share of the matmul rate measured between the steps, and the MFU."""
    accelerator = training.inputs.accelerator
    device, processes = accelerator.device, accelerator.num_processes
    of_parameters, with_attention = (count / seconds / processes for count in figures.flops(training, config, done))
    found = {
        "flops_6n": of_parameters,
        "flops_6n_and_attention": with_attention,
        "matmul_flops": matmul,
        "share_of_matmul_6n": of_parameters / matmul,
        "share_of_matmul_6n_and_attention": with_attention / matmul,
    }
    peak = settings.peak_tflops * 1e12 if settings.peak_tflops else machine.peak_flops(device, dtype_of(accelerator))
    return found | ({"peak_flops": peak, "mfu": of_parameters / peak} if peak else {})


def compared_with(ours: dict[str, Any], usual: dict[str, Any] | None) -> dict[str, Any]:
    return {"ours": ours} | ({"usual": usual, "ratio": figures.ratio(ours, usual)} if usual else {})


def headline(settings: BenchmarkSettings, training: Training) -> str:
    """Return what is measured: model, processes, precision, attention, size of a step."""
    accelerator = training.inputs.accelerator
    rank = settings.lora.rank
    lora = f", {training.trained:,} of them trained (LoRA, rank {rank})" if rank else ""
    return (
        f"{settings.what}, {settings.model}, {training.parameters / 1e6:.0f}M parameters{lora}, "
        f"{accelerator.num_processes} x {accelerator.device.type}, {precision_name(accelerator)}, "
        f"{training.backend} attention, blocks {'compiled' if training.compiles else 'as they are'}, "
        f"{settings.micro_batches} x {settings.tokens_per_micro_batch:,} tokens a step"
    )
