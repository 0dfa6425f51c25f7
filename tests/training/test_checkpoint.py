"""Where a run stands, and Adam's moments put back. Whole runs are in tests/runs/test_resume.py."""

import math

import pytest
import torch

from gpt2ft.settings import OptimizerSettings
from gpt2ft.training import checkpoint
from gpt2ft.training.checkpoint import TrainState
from gpt2ft.training.optimizer import adamw


def test_the_best_is_the_lowest_finite_loss():
    state = TrainState(step=1)
    for step, loss in enumerate([math.nan, 3.0, 2.0, math.nan, 2.5, 2.0], start=1):
        state = TrainState(step, best_loss=state.best_loss, best_step=state.best_step).after_evaluation(loss)
    assert (state.best_loss, state.best_step) == (2.0, 3)


def test_a_skipped_step_is_a_step_but_no_update():
    state = TrainState().after_step(True).after_step(False).after_step(False)
    assert (state.step, state.updates, state.skipped_in_a_row) == (3, 1, 2)
    assert state.after_step(True).skipped_in_a_row == 0


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_put_back_makes_the_step_that_would_have_followed(fused, tiny_gpt2, tmp_path):
    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    settings = OptimizerSettings(learning_rate=0.1)
    model = tiny_gpt2(64, 16)
    optimizer = adamw(model, settings, fused)
    for seed in range(3):
        step(model, optimizer, seed)
    folder = checkpoint.save(tmp_path, model, optimizer, TrainState(step=4, updates=3), {"a": 1})

    other = tiny_gpt2(64, 16)
    other.load_state_dict(checkpoint.read_weights(folder))
    state, identity = checkpoint.read_state(folder)
    continued = adamw(other, settings, fused)
    checkpoint.load_moments(folder, other, continued, state.updates)
    assert (state.step, identity) == (4, {"a": 1})
    step(model, optimizer, seed=9)
    step(other, continued, seed=9)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_the_first_difference_is_named():
    saved = {"a": {"b": 1, "c": [1]}, "d": "x"}
    assert checkpoint.difference(saved, saved) is None
    assert checkpoint.difference(saved, {"a": {"b": 1, "c": [2]}, "d": "y"}) == "`a.c` was [1] and is now [2]"
    assert checkpoint.difference(saved, {"a": {"b": 1, "c": [1]}}) == "`d` was 'x' and is now None"
