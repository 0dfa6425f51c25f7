"""One training run, however it is cut: 8 micro-batches a step as 1 x 8, 2 x 4 or 8 x 1 of accumulation x size.

"Size" is what is computed together. Over processes, with dropout on and off; and within one process as longer
streams, where dropout must be off because it falls on other places.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gpt2ft.data.packing import build_stream

LAUNCH = Path(__file__).parent.parent.parent / "launch"
STEPS = 5  # 3 steps to an epoch, the last one short: 18 streams in steps of 8


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line], [
        line["eval/loss"] for line in lines if "eval/loss" in line
    ]


def train_with(processes, dropout, folder, cache, *settings):
    settings += ("--training.eval_every", 3, "--training.max_grad_norm", 0.5)
    settings += ("--model.dropout", dropout, "--model.attention_dropout", dropout)
    return launched(processes, "sft.py", "quickstart", folder, cache, *settings)


def launched(processes, script, recipe, folder, cache, *settings):
    arguments = [LAUNCH / script, recipe, "--output", folder / "run", "--data.cache", cache]
    arguments += ["--training.steps", STEPS, "--training.log_every", 1, "--training.micro_batches_per_step", 8]
    arguments += ["--training.sample_prompts", 1, "--training.sample_tokens", 4, *settings]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *arguments]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(folder / "run")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process, by dropout; made when first asked for."""
    made = {}

    def get(dropout, cache):
        if dropout not in made:
            made[dropout] = train_with(1, dropout, tmp_path_factory.mktemp("alone"), cache)
        return made[dropout]

    return get


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("processes", "dropout"),
    [
        (4, 0.1),
        pytest.param(2, 0.1, marks=pytest.mark.long),
        pytest.param(8, 0.1, marks=pytest.mark.long),
        pytest.param(2, 0.0, marks=pytest.mark.long),
        pytest.param(8, 0.0, marks=pytest.mark.long),
    ],
)
def test_any_number_of_processes_gives_the_same_losses(processes, dropout, alone, cache, tmp_path):
    train_losses, eval_losses = alone(dropout, cache)
    assert len(train_losses) == STEPS
    assert len(set(train_losses)) == STEPS
    found = train_with(processes, dropout, tmp_path, cache)
    assert found[0] == pytest.approx(train_losses, rel=1e-5)
    assert found[1] == pytest.approx(eval_losses, rel=1e-5)


def test_adapters_learn_the_same_on_two_processes(tiny_weights_folder, cache, tmp_path):
    settings = ["--model.path", tiny_weights_folder, "--model.random_init", "false"]
    settings += ["--lora.rank", 4, "--lora.dropout", 0.2, "--lora.targets", "q", "v", "fc"]
    one, two = (train_with(number, 0.1, tmp_path / str(number), cache, *settings) for number in (1, 2))
    assert len(set(one[0])) == STEPS
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert two[1] == pytest.approx(one[1], rel=1e-5)
    adapters = [load_file(tmp_path / name / "run" / "adapter" / "adapter_model.safetensors") for name in "12"]
    for name, tensor in adapters[0].items():
        assert float((tensor - adapters[1][name]).abs().max()) < 1e-5


@pytest.mark.parametrize("recipe", ["single-topic-dpo", pytest.param("quickstart-dpo", marks=pytest.mark.long)])
def test_preferences_are_learnt_the_same_on_two_processes(recipe, tiny_weights_folder, tmp_path):
    """All weights and adapters alone, each run with a reference of its own, computed by as many processes."""
    settings = ["--model.path", tiny_weights_folder, "--dpo.pairs", "all", "--dpo.pair_weight", "prompt"]
    one, two = (
        launched(number, "dpo.py", recipe, tmp_path / str(number), tmp_path / f"cache {number}", *settings)
        for number in (1, 2)
    )
    assert len(set(one[0])) == STEPS
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert two[1] == pytest.approx(one[1], rel=1e-5)


class Regrouped:
    """A plan whose micro-batches are joined, `size` at a time, into longer streams."""

    def __init__(self, plan, size):
        self.plan, self.size = plan, size
        self.steps_per_epoch = plan.steps_per_epoch
        self.micro_batches_per_step = plan.micro_batches_per_step // size

    def training_stream(self, step, number):
        parts = self.plan.micro_batches(step)[number * self.size : (number + 1) * self.size]
        trees = [self.plan.pieces.tree(piece) for part in parts for piece in part]
        return build_stream(trees, self.plan.capacity * self.size, self.plan.target_capacity * self.size)


def test_longer_streams_give_the_same_losses(run_sft, tmp_path, monkeypatch):
    from gpt2ft.runs import train

    fit = train.fit
    curves = {}
    for size in (1, 4, 8):

        def regrouped(job, state, size=size):
            job.accelerator.gradient_state.plugin_kwargs["num_steps"] = 8 // size
            return fit(job.__class__(**(vars(job) | {"plan": Regrouped(job.plan, size)})), state)

        monkeypatch.setattr(train, "fit", regrouped)
        run_sft(tmp_path / str(size), steps=STEPS, dropout=0.0, micro_batches_per_step=8)
        curves[size], _ = losses(tmp_path / str(size))
    assert len(set(curves[1])) == STEPS
    assert curves[4] == pytest.approx(curves[1], rel=1e-5)
    assert curves[8] == pytest.approx(curves[1], rel=1e-5)
