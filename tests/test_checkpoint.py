"""The state of a run, and Adam's moments put back. Whole runs are in tests/runs/test_resume.py."""

import math

import pytest
import torch

from gpt2ft import checkpoint
from gpt2ft.checkpoint import TrainState
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.lora import load_trainable_parameters, trainable_parameters
from gpt2ft.settings.training import OptimizerSettings
from gpt2ft.training.optimizer import adamw
from gpt2ft.training.strategy import DDP


def test_the_best_is_the_lowest_finite_loss():
    state = TrainState(step=1)
    for step, loss in enumerate([math.nan, 3.0, 2.0, math.nan, 2.5, 2.0], start=1):
        state = TrainState(step, best_loss=state.best_loss, best_step=state.best_step).after_evaluation(loss)
    assert (state.best_loss, state.best_step) == (2.0, 3)


def test_evaluations_since_the_best_are_counted():
    """One without held-out data is none, and a loss that is not finite is no better than any."""
    state, counts = TrainState(step=9), []
    for loss in (math.nan, 3.0, 3.0, None, math.inf, 2.9, 3.0):
        state = state.after_evaluation(loss)
        counts.append(state.evaluations_since_best)
    assert counts == [1, 0, 1, 1, 2, 0, 1]


def test_a_skipped_step_is_a_step_but_no_update():
    state = TrainState().after_step(True).after_step(False).after_step(False)
    assert (state.step, state.updates, state.skipped_in_a_row) == (3, 1, 2)
    assert state.after_step(True).skipped_in_a_row == 0


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_put_back_makes_the_step_that_would_have_followed(fused, tiny_gpt2, accelerator, tmp_path):
    def replicated():
        model = TargetLogProbs(tiny_gpt2(64, 16), 64, "segments")
        return DDP(accelerator, model, adamw(model.gpt2, settings, fused), max_grad_norm=1e9)

    def step(strategy, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in strategy.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        strategy.update()

    settings = OptimizerSettings(learning_rate=0.1)
    one, other = replicated(), replicated()
    for seed in range(3):
        step(one, seed)
    weights = trainable_parameters(one.full_model())
    folder = checkpoint.save(tmp_path, weights, one.moments(), TrainState(step=4, updates=3), {"a": 1})

    load_trainable_parameters(other.full_model(), checkpoint.read_weights(folder))
    state, identity = checkpoint.read_state(folder)
    other.load_moments(checkpoint.read_moments(folder), state.updates)
    assert (state.step, identity) == (4, {"a": 1})
    step(one, seed=9)
    step(other, seed=9)
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(mine, its) for mine, its in pairs)


def test_the_first_difference_is_named():
    saved = {"a": {"b": 1, "c": [1]}, "d": "x"}
    assert checkpoint.difference(saved, saved) is None
    assert checkpoint.difference(saved, {"a": {"b": 1, "c": [2]}, "d": "y"}) == "`a.c` was [1] and is now [2]"
    assert checkpoint.difference(saved, {"a": {"b": 1, "c": [1]}}) == "`d` was 'x' and is now None"
