"""Whole runs of the scripts, each in a process of its own: they learn, and go on to the same bits after a stop.

They train gpt2's shape with the bundled vocabulary and conversations, so that nothing is downloaded. This script starts
one, which is told to stop after some of its steps (0 for never):

    python tests/gpu/training_runs.py STOP_AFTER sft [RECIPE] ...
"""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sizes import Sizes

from gpt2ft import quickstart
from gpt2ft.__main__ import run_script

TOLD_TO_STOP = 75


def sft_lora_dpo(device: torch.device, sizes: Sizes, folder: Path) -> Iterator[dict[str, Any]]:
    """SFT from random weights; adapters, and preferences, on top of it."""
    steps = ["--training.steps", sizes.lasts]
    start(*of_sft(sizes, folder, folder / "sft"), *steps)
    yield learnt("sft", folder / "sft")
    after = ["--model.path", folder / "sft", *settings_of(sizes), *steps]
    start("sft", "quickstart", *after, "--output", folder / "lora", "--lora.rank", 8, "--optimizer.learning_rate", 5e-3)
    yield learnt("lora", folder / "lora")
    start("dpo", "quickstart-dpo", *after, "--output", folder / "dpo", "--optimizer.learning_rate", 2e-4)
    yield learnt("dpo", folder / "dpo")


def resume(device: torch.device, sizes: Sizes, folder: Path, deterministic: bool) -> Iterator[dict[str, Any]]:
    """A run that is told to stop and goes on ends in the bits of one that was not; promised if `deterministic`."""
    settings = ["--training.steps", sizes.lasts, "--training.deterministic", str(deterministic).lower()]
    start(*of_sft(sizes, folder, folder / "whole"), *settings)
    stopped = of_sft(sizes, folder, folder / "stopped")
    start(*stopped, *settings, stop_after=sizes.lasts // 2, code=TOLD_TO_STOP)
    start(*stopped, *settings)
    models = [(folder / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "stopped")]
    losses = [[line["train/loss"] for line in lines(folder / run, "train/loss")] for run in ("whole", "stopped")]
    yield {"deterministic": deterministic, "same_bits": models[0] == models[1], "same_losses": losses[0] == losses[1]}
    assert models[0] == models[1] or not deterministic


def of_sft(sizes: Sizes, folder: Path, output: Path) -> list[Any]:
    """Return the words of a run from random weights."""
    shape = folder / "shape"
    shape.mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (shape / name).write_bytes((quickstart.MODEL / name).read_bytes())
    config = json.loads((quickstart.MODEL / "config.json").read_text())
    (shape / "config.json").write_text(json.dumps(config | sizes.run_shape))
    start = ["--model.path", shape, "--model.random_init", "--model.dropout", 0.1]
    return ["sft", "quickstart", *start, *settings_of(sizes), "--output", output]


def settings_of(sizes: Sizes) -> list[Any]:
    given = sizes.training | {"log_every": 1, "eval_every": sizes.lasts, "sample_prompts": 1, "sample_tokens": 8}
    return [word for name, value in given.items() for word in (f"--training.{name}", value)]


def start(*words: Any, stop_after: int = 0, code: int = 0) -> None:
    """Run a script to its end, which must be of this exit code; what it prints is printed."""
    command = [sys.executable, __file__, str(stop_after), *map(str, words)]
    assert subprocess.run(command, check=False).returncode == code, words


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics that hold one of this name."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if name in line]


def learnt(what: str, run: Path) -> dict[str, Any]:
    """Return the held-out losses before and after a run, and its median speed; the loss must have fallen."""
    losses = [line["eval/loss"] for line in lines(run, "eval/loss")]
    speeds = [line["train/tokens_per_second"] for line in lines(run, "train/loss")]
    assert losses[-1] < losses[0], losses
    return {"run": what, "held_out": losses, "tokens_per_second": statistics.median(speeds)}


def main(stop_after: int, name: str, *words: str) -> None:
    """Run a script here, and send this process SIGTERM after so many of its steps."""
    from gpt2ft.training.tracking import Tracker

    advance, done = Tracker.advance, []

    def advance_and_stop(tracker: Tracker) -> None:
        advance(tracker)
        done.append(None)
        if len(done) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    Tracker.advance = advance_and_stop
    try:
        run_script(name, words)
    finally:
        Tracker.advance = advance


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
