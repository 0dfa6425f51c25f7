"""Runs in fp16: stopped amid overflows and continued to the same bits, scale of the loss included."""

import json

import torch
from safetensors.torch import load_file

from gpt2ft.checkpoint import read_state, step_folder
from gpt2ft.objectives.sft import SFT

STEPS = 9


class Steep(SFT):
    """A loss so large that the first steps overflow, until its scale was halved often enough."""

    def loss(self, log_probs, stream):
        return 100 * super().loss(log_probs, stream)


def all_lines(folder):
    """In their order, without time and speed; NaN, of steps that overflow, as its name."""
    lines = [json.loads(line, parse_constant=str) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in ("time", "train/tokens_per_second")} for line in lines]


def test_a_run_stopped_between_overflows_ends_in_the_same_bits(run_sft, stopped_after, tmp_path):
    fp16 = {"steps": STEPS, "precision": "fp16", "objective": Steep(), "max_skipped_steps": 1, "save_every": 1}
    run_sft(tmp_path / "whole", **fp16)
    with stopped_after(3):
        run_sft(tmp_path / "run", **fp16)
    run_sft(tmp_path / "run", **fp16)
    folders = [tmp_path / name for name in ("whole", "run")]
    lines = [all_lines(folder) for folder in folders]
    assert lines[0] == lines[1]
    scales = [line["train/loss_scale"] for line in lines[0] if "train/loss_scale" in line]
    assert len(scales) == STEPS
    assert 65536 > scales[1] > scales[-1]  # the stop is between
    states = [read_state(step_folder(folder / "checkpoints", STEPS))[0] for folder in folders]
    assert states[0] == states[1]
    assert 0 < states[0].updates < STEPS - 2
    assert states[0].scaler["loss_scale"] == scales[-1]
    for name in ("model", "best"):
        expected, found = (load_file(folder / name / "model.safetensors") for folder in folders)
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert json.loads((folders[0] / "manifest.json").read_text())["precision"] == "fp16"
