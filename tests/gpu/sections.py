"""The checks of `pytest -m gpu`, each in a process of its own: one that hangs or breaks the device ends alone.

Each is a function of (device, sizes, folder) that yields its figures as it finds them, and fails after that if they are
not what they must be. `pytest` runs all of them at small sizes on the CPU; this script runs one on the GPU:

    python tests/gpu/sections.py NAME RESULTS FOLDER cuda
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import exactness
import speed
import torch
import training_runs
from sizes import REAL, TINY

Figures = dict[str, Any]


class Section(NamedTuple):
    """A check, and the seconds that it may take on a GPU."""

    check: Callable[..., Iterator[Figures]]
    seconds: int


SECTIONS = {  # the most telling first: what is left when the time of all is up is skipped
    "card": Section(speed.card, 40),
    "log_probs": Section(exactness.log_probs, 80),
    "host_waits": Section(exactness.host_waits, 80),
    "sft": Section(partial(speed.benchmark, what="sft"), 80),
    "sft_medium": Section(partial(speed.benchmark, what="sft", model="gpt2-medium"), 100),
    "resume_deterministic": Section(partial(training_runs.resume, deterministic=True), 100),
    "dpo": Section(partial(speed.benchmark, what="dpo"), 80),
    "lora_medium": Section(partial(speed.benchmark, what="sft", model="gpt2-medium", lora={"rank": 16}), 80),
    "generate": Section(partial(speed.benchmark, what="generate"), 60),
    "greedy_decoding": Section(exactness.greedy_decoding, 60),
    "runs": Section(training_runs.sft_lora_dpo, 150),
    "kernels": Section(speed.kernels, 60),
    "resume": Section(partial(training_runs.resume, deterministic=False), 100),
    "sft_usual": Section(partial(speed.benchmark, what="sft", model="gpt2-medium", against="transformers"), 150),
    "dpo_usual": Section(partial(speed.benchmark, what="dpo", model="gpt2-medium", against="transformers"), 150),
}


def main(name: str, results: str, folder: str, device: str) -> None:
    """Run a section, and write a line of JSON for each of its figures as soon as it is there."""
    started, sizes = time.monotonic(), REAL if device == "cuda" else TINY
    with open(results, "a", encoding="utf-8") as file:
        for figures in SECTIONS[name].check(torch.device(device), sizes, Path(folder)):
            line = {"section": name} | figures | {"at_seconds": round(time.monotonic() - started, 1)}
            print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
