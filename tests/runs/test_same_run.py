"""One training run, however it is cut: 8 micro-batches a step as 1 x 8, 2 x 4 or 8 x 1 of accumulation x size.

"Size" is what is computed together. Over processes, with dropout on (see test_strategies.py for other numbers and for
shards); and within one process as longer streams, where dropout must be off because it falls on other places.
"""

import json
from dataclasses import replace

import pytest
from processes import ON_CPU, run, torchrun

from gpt2ft.data.packing import build_stream

STEPS = 5  # steps of 8 out of 16 or more streams: epochs that end within a step too


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line], [
        line["eval/loss"] for line in lines if "eval/loss" in line
    ]


def train_with(processes, dropout, folder, cache):
    arguments = ["launch/sft.py", "quickstart", "--output", folder / "run", "--data.cache", cache]
    arguments += ["--training.steps", STEPS, "--training.log_every", 1, "--training.eval_every", 3]
    arguments += ["--training.micro_batches_per_step", 8, "--training.max_grad_norm", 0.5]
    arguments += ["--training.sample_prompts", 1, "--training.sample_tokens", 4]
    arguments += ["--model.dropout", dropout]
    run([*torchrun(processes), *arguments], seconds=600, **ON_CPU)
    return losses(folder / "run")


@pytest.mark.campaign
def test_eight_processes_give_the_losses_of_one(tmp_path):
    alone, eight = (train_with(number, 0.1, tmp_path / str(number), tmp_path / "cache") for number in (1, 8))
    assert len(set(alone[0])) == STEPS
    assert eight[0] == pytest.approx(alone[0], rel=1e-5)
    assert eight[1] == pytest.approx(alone[1], rel=1e-5)


class Regrouped:
    """A plan whose micro-batches are joined, `size` at a time, into longer streams."""

    def __init__(self, plan, size):
        self.plan, self.size = plan, size
        self.ends_epoch, self.position = plan.ends_epoch, plan.position
        self.micro_batches_per_step = plan.micro_batches_per_step // size

    def training_stream(self, step, number):
        parts = self.plan.micro_batches(step)[number * self.size : (number + 1) * self.size]
        trees = [self.plan.chunks.tree(piece) for part in parts for piece in part]
        return build_stream(trees, self.plan.capacity * self.size, self.plan.target_capacity * self.size)


def test_longer_streams_give_the_same_losses(run_sft, tmp_path, monkeypatch):
    from gpt2ft.runs import train

    fit = train.fit
    curves = {}
    for size in (1, 4, 8):

        def regrouped(inputs, state, size=size):
            inputs.accelerator.gradient_state.plugin_kwargs["num_steps"] = 8 // size
            return fit(replace(inputs, batches=Regrouped(inputs.batches, size)), state)

        monkeypatch.setattr(train, "fit", regrouped)
        run_sft(tmp_path / str(size), steps=STEPS, dropout=0.0, micro_batches_per_step=8)
        curves[size], _ = losses(tmp_path / str(size))
    assert len(set(curves[1])) == STEPS
    assert curves[4] == pytest.approx(curves[1], rel=1e-5)
    assert curves[8] == pytest.approx(curves[1], rel=1e-5)
