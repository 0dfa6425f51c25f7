"""What the card is, and how fast the loop and the decoder are on it: launch/benchmark.py's figures."""

import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from exactness import training_of
from sizes import Sizes
from torch.profiler import ProfilerActivity, profile

from gpt2ft.benchmark import machine
from gpt2ft.model.attention import choose_backend
from gpt2ft.runs import benchmark as script
from gpt2ft.settings.measuring import BenchmarkSettings

PACKAGES = ("torch", "triton", "accelerate", "transformers")
KERNELS_TOLD = 25


def card(device: torch.device, sizes: Sizes, folder: Path) -> Iterator[dict[str, Any]]:
    """Versions, the card, what it reaches, and that FlexAttention can be compiled for it."""
    figures: dict[str, Any] = {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        figures |= {"card": card.name, "memory_bytes": card.total_memory, "capability": [card.major, card.minor]}
    copied, matmul = machine.copied_bytes(device), machine.matmul_flops(device, torch.bfloat16)
    yield figures | {"matmul_flops": matmul, "copied_bytes_per_second": copied}
    yield {"attention": choose_backend("auto", device, "attention")}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def benchmark(device: torch.device, sizes: Sizes, folder: Path, **settings: Any) -> Iterator[dict[str, Any]]:
    """What launch/benchmark.py measures, which fails if a step after the first has anything compiled."""
    file = folder / "figures.json"
    script.run(BenchmarkSettings(json=str(file), **(sizes.benchmark | settings)))
    yield settings | json.loads(file.read_text())


def kernels(device: torch.device, sizes: Sizes, folder: Path) -> Iterator[dict[str, Any]]:
    """Time and number of the kernels of one step of SFT, then those that take longest."""
    training = training_of(sizes, "sft")
    training.step()  # compiles
    seconds = training.step()
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        training.step()
    unit = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [(getattr(event, unit) / 1e6, event.count, event.key) for event in profiler.key_averages()]
    events = sorted((event for event in events if event[0] > 0), reverse=True)
    assert events
    yield {
        "step_seconds": seconds,
        "seconds_in_kernels": sum(event[0] for event in events),
        "kernels": sum(event[1] for event in events),
    }
    for spent, count, name in events[:KERNELS_TOLD]:
        yield {"kernel": name[:120], "seconds": spent, "times": count}
