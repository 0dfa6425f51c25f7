"""A strategy's contract on one process: the update, Adam's moments, the full model.

Shards on several processes are in tests/runs/test_strategies.py.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from gpt2ft.checkpoint import MOMENTS
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.lora import apply_lora
from gpt2ft.settings.sections import LoRASettings
from gpt2ft.settings.training import OptimizerSettings
from gpt2ft.training.optimizer import adamw
from gpt2ft.training.preflight import PreflightError
from gpt2ft.training.strategy import DDP, ZeRO3, cast_frozen, prepare

MAX_GRAD_NORM = 0.5


@pytest.fixture
def make_strategy(tiny_gpt2, accelerator):
    def make(adapt=False):
        gpt2 = tiny_gpt2(64, 16)
        if adapt:
            apply_lora(gpt2, LoRASettings(rank=2, alpha=4.0), [60], torch.Generator().manual_seed(1))
        model = TargetLogProbs(gpt2, 64, "segments")
        return prepare(accelerator, model, adamw(gpt2, OptimizerSettings(learning_rate=0.1), False), MAX_GRAD_NORM)

    return make


def set_gradients(strategy, seed=0, scale=1.0):
    """Random gradients, and their norm."""
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in strategy.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return math.sqrt(sum(float(parameter.grad.double().square().sum()) for parameter in trained))


def weights(strategy):
    return {name: parameter.detach().clone() for name, parameter in strategy.full_model().named_parameters()}


def test_without_a_launcher_it_is_the_model_itself(make_strategy):
    strategy = make_strategy()
    assert isinstance(strategy, DDP)
    assert isinstance(strategy.model, TargetLogProbs)
    assert strategy.full_model() is strategy.model.gpt2


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_the_gradient_is_clipped_and_its_norm_before_that_is_told(scale, make_strategy):
    """Adam's first mean is (1 - beta1) times the clipped gradient."""
    strategy = make_strategy()
    norm = set_gradients(strategy, scale=scale)
    gradients = {name: parameter.grad.clone() for name, parameter in strategy.gpt2.named_parameters()}
    assert (norm > MAX_GRAD_NORM) == (scale == 1.0)
    before = weights(strategy)
    assert strategy.update() == pytest.approx(norm, rel=1e-5)
    clip = min(1.0, MAX_GRAD_NORM / norm)
    beta1 = OptimizerSettings().beta1
    for name, mean in strategy.moments()["exp_avg"].items():
        torch.testing.assert_close(mean, (1 - beta1) * clip * gradients[name], rtol=1e-4, atol=1e-12)
        assert not torch.equal(before[name], weights(strategy)[name])
    assert all(parameter.grad is None for parameter in strategy.model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(value, make_strategy):
    strategy = make_strategy()
    set_gradients(strategy)
    strategy.update()
    before, moments = weights(strategy), strategy.moments()
    moments = {moment: {name: tensor.clone() for name, tensor in moments[moment].items()} for moment in MOMENTS}
    set_gradients(strategy)
    strategy.gpt2.ln_f.bias.grad[3] = value
    assert not math.isfinite(strategy.update())
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(strategy).items())
    assert all(
        torch.equal(moments[moment][name], tensor)
        for moment in MOMENTS
        for name, tensor in strategy.moments()[moment].items()
    )
    assert all(parameter.grad is None for parameter in strategy.model.parameters())


@pytest.mark.parametrize("adapt", [False, True])
def test_moments_have_the_names_and_shapes_of_what_is_trained(adapt, make_strategy):
    strategy = make_strategy(adapt)
    trained = {name: p.shape for name, p in strategy.gpt2.named_parameters() if p.requires_grad}
    assert (len(trained) < len(list(strategy.gpt2.parameters()))) == adapt
    zeros = strategy.moments()
    assert zeros.keys() == set(MOMENTS)
    for tensors in zeros.values():
        assert {name: tensor.shape for name, tensor in tensors.items()} == trained
        assert not any(tensor.any() for tensor in tensors.values())


def test_loaded_moments_are_those_that_were_saved(make_strategy):
    one, other = make_strategy(), make_strategy()
    for strategy in (one, other):
        set_gradients(strategy, seed=1 if strategy is one else 2)
        strategy.update()
    other.load_moments(one.moments(), updates=1)
    for moment in MOMENTS:
        assert all(torch.equal(tensor, other.moments()[moment][name]) for name, tensor in one.moments()[moment].items())
    other.load_moments(None, updates=0)
    assert not any(tensor.any() for tensors in other.moments().values() for tensor in tensors.values())


def test_a_wrapper_that_replaces_parameters_is_refused(make_strategy, tiny_gpt2):
    class Replacing:
        is_main_process = True

        def prepare(self, model, optimizer):
            return TargetLogProbs(tiny_gpt2(64, 16), 64, "segments"), optimizer

    model = TargetLogProbs(tiny_gpt2(64, 16), 64, "segments")
    with pytest.raises(PreflightError):
        DDP(Replacing(), model, adamw(model.gpt2, OptimizerSettings(), False), MAX_GRAD_NORM)


def test_other_processes_than_the_main_one_get_no_model_and_no_moments(tiny_gpt2):
    process = SimpleNamespace(is_main_process=False, prepare=lambda model, optimizer: (model, optimizer))
    model = TargetLogProbs(tiny_gpt2(64, 16), 64, "segments")
    strategy = DDP(process, model, adamw(model.gpt2, OptimizerSettings(), False), MAX_GRAD_NORM)
    assert strategy.full_model() is None
    assert strategy.moments() == {}


AUTOCAST = SimpleNamespace(deepspeed_config={"torch_autocast": {"enabled": True}})


@pytest.mark.parametrize(
    ("precision", "deepspeed", "dtype"),
    [("bf16", None, torch.bfloat16), ("no", None, torch.float32), ("no", AUTOCAST, torch.float32)],
)
def test_frozen_matrices_alone_are_rounded_and_under_deepspeed_not_cast(precision, deepspeed, dtype, tiny_gpt2):
    gpt2 = tiny_gpt2(64, 16)
    apply_lora(gpt2, LoRASettings(rank=2, alpha=4.0), [60], torch.Generator().manual_seed(1))
    before = {name: parameter.clone() for name, parameter in gpt2.named_parameters()}
    cast_frozen(SimpleNamespace(mixed_precision=precision, state=SimpleNamespace(deepspeed_plugin=deepspeed)), gpt2)
    is_rounded = precision == "bf16" or deepspeed is not None
    for name, parameter in gpt2.named_parameters():
        is_frozen_matrix = not parameter.requires_grad and parameter.ndim == 2 and name != "wpe.weight"
        assert parameter.dtype == (dtype if is_frozen_matrix else torch.float32), name
        expected = before[name].bfloat16().float() if is_frozen_matrix and is_rounded else before[name]
        assert torch.equal(parameter.float(), expected), name


@pytest.mark.parametrize(
    ("overflow", "gradient", "updates"), [(False, 1.0, True), (True, 1.0, False), (False, math.nan, False)]
)
def test_under_zero_a_step_counts_only_if_deepspeed_has_made_it(overflow, gradient, updates, tiny_gpt2):
    """It leaves steps out for reasons of its own too, and then still tells the norm of the one before."""
    strategy = ZeRO3.__new__(ZeRO3)
    strategy.gpt2, decisions = tiny_gpt2(64, 16), []
    strategy.model = SimpleNamespace(get_global_grad_norm=lambda: 1.0)
    strategy._zero = SimpleNamespace(overflow=overflow, _update_scale=decisions.append)
    strategy._check_gradients(SimpleNamespace(device=torch.device("cpu"), num_processes=1))
    (strategy.gpt2.wte.weight.sum() * gradient).backward()
    strategy._zero._update_scale(overflow)
    assert decisions == [strategy._zero.overflow] == [not updates]
    assert math.isfinite(strategy.update()) is updates
