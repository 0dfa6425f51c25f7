"""The learning rate as a pure function of the step, and what decays."""

import pytest
import torch
from torch import nn

from gpt2ft.model.lora import apply_lora, trainable_parameters
from gpt2ft.settings.sections import LoRASettings
from gpt2ft.settings.training import OptimizerSettings
from gpt2ft.training.optimizer import adamw, learning_rate, set_learning_rate

STEPS = 100


def rates(**settings):
    settings = OptimizerSettings(learning_rate=1.0, warmup_fraction=0.1, final_fraction=0.2, **settings)
    return [learning_rate(step, STEPS, settings) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rise(schedule):
    assert rates(schedule=schedule)[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.6), ("linear", 0.6), ("constant", 1.0)])
def test_the_schedule(schedule, middle):
    found = rates(schedule=schedule)
    assert found[10:] == sorted(found[10:], reverse=True)
    assert (found[54] + found[55]) / 2 == pytest.approx(middle, abs=0.01)
    assert found[-1] == pytest.approx(1.0 if schedule == "constant" else 0.2)


def test_without_a_rise_and_with_one_step():
    settings = OptimizerSettings(learning_rate=1.0, warmup_fraction=0.0)
    assert learning_rate(0, 1, settings) == 1.0


def test_decay_falls_on_matrices_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(3, 4))
    model[0].weight.requires_grad_(False)
    optimizer = adamw(model, OptimizerSettings(weight_decay=0.3, beta2=0.9), fused=False)
    decayed, plain = (group for group in optimizer.param_groups)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [p.ndim for p in decayed["params"]] == [2]  # the embedding: what is frozen is left out
    assert {p.ndim for p in plain["params"]} == {1}
    assert optimizer.defaults["betas"] == (0.9, 0.9)


def test_the_second_matrix_of_adapters_has_a_rate_of_its_own(tiny_gpt2):
    gpt2 = tiny_gpt2(64, 16)
    settings = OptimizerSettings(learning_rate=1e-3, weight_decay=0.3)
    apply_lora(gpt2, LoRASettings(rank=2, dora=True), [60], torch.Generator().manual_seed(1))
    optimizer = adamw(gpt2, settings, fused=False, lora_plus_ratio=16.0)
    names = {parameter: name for name, parameter in gpt2.named_parameters()}
    for step in (0, 50, 99):
        rate = learning_rate(step, 100, settings)
        set_learning_rate(optimizer, rate)
        found = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
        assert found.keys() == trainable_parameters(gpt2).keys()
        for name, group in found.items():
            assert group["lr"] == rate * (16.0 if name.endswith(".B") else 1.0)
            assert group["weight_decay"] == (0.0 if name.endswith(".magnitude_change") else 0.3)
    assert {name.rpartition(".")[2] for name in found} == {"A", "B", "magnitude_change", "rows"}
    ratios = [group["rate_ratio"] for group in adamw(gpt2, settings, fused=False).param_groups]
    assert ratios == [1.0, 1.0]


def test_the_first_step_is_adams():
    """One update against the formula of Kingma and Ba 2015, algorithm 1, with decoupled decay."""
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    module = nn.Module()
    module.weight = parameter
    optimizer = adamw(module, OptimizerSettings(learning_rate=0.1, weight_decay=0.5), fused=False)
    parameter.grad = torch.tensor([[0.3, -0.01]])
    optimizer.step()
    expected = torch.tensor([[1.0, -2.0]]) * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    assert torch.allclose(parameter.detach(), expected, atol=1e-5)
