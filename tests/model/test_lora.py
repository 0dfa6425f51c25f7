"""LoRA changes nothing at first, trains nothing else, and is what merging makes of it."""

from copy import deepcopy
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.model.lora import (
    apply_lora,
    cast_frozen_matrices,
    load_trainable_parameters,
    merged_weights,
    trainable_parameters,
)
from gpt2ft.settings.choices import LORA_TARGETS
from gpt2ft.settings.sections import LoRASettings

VOCABULARY, ROWS = 90, 128
ROW_IDS = [85, 3, 89]
SOME_TARGETS = [*combinations(LORA_TARGETS, 1), ("q", "v"), ("k", "o"), ("fc", "proj"), tuple(LORA_TARGETS)]


@pytest.fixture(scope="module")
def base(tiny_gpt2):
    """Weights large enough for attention and distributions that are far from even."""
    model = tiny_gpt2(ROWS, 384)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 5
    return model


@pytest.fixture(scope="module")
def stream(random_stream):
    stream = random_stream(np.random.default_rng(0), VOCABULARY)
    assert set(ROW_IDS) <= set(stream.tokens[: stream.num_tokens].tolist())
    assert set(ROW_IDS) & set(stream.targets[: stream.num_supervised].tolist())
    return stream


def adapted(base, settings, learnt=True):
    """The base with adapters, and with weights as if these had been trained for a while."""
    model = deepcopy(base)
    apply_lora(model, settings, ROW_IDS, torch.Generator().manual_seed(1))
    if learnt:
        random = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter += 0.3 * torch.randn(parameter.shape, generator=random)
    return model


def plain(model):
    other = type(model)(model.config)
    other.load_state_dict(merged_weights(model))
    return other


def log_probs(model, stream):
    return TargetLogProbs(model, VOCABULARY, "dense")(stream)


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"embeddings": True}])
@pytest.mark.parametrize("targets", SOME_TARGETS, ids="-".join)
def test_nothing_changes_at_first(base, stream, targets, kind):
    model = adapted(base, LoRASettings(rank=4, alpha=8.0, targets=targets, **kind), learnt=False)
    with torch.no_grad():
        assert torch.equal(log_probs(model, stream), log_probs(base, stream))
        assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in merged_weights(model).items())


@pytest.mark.parametrize("dora", [False, True])
def test_nothing_changes_at_first_in_half(base, stream, dora):
    """Also where matrices are held in bf16, whose columns have other norms."""
    model, other = (
        adapted(base, LoRASettings(rank=4, dora=dora), learnt=False),
        adapted(base, LoRASettings(rank=1), False),
    )
    for one in (model, other):
        cast_frozen_matrices(one, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_probs(model, stream), log_probs(other, stream))


OF_EACH = {"rank_per_target": ("q=3", "proj=7"), "alpha_per_target": ("v=2", "fc=9")}


@pytest.mark.parametrize(
    "kind", [{}, {"rslora": True}, {"dora": True}, OF_EACH, OF_EACH | {"rslora": True, "dora": True}]
)
@pytest.mark.parametrize("targets", SOME_TARGETS, ids="-".join)
def test_merged_is_adapted(base, stream, targets, kind):
    model = adapted(base, LoRASettings(rank=5, alpha=7.0, targets=targets, **kind))
    with torch.no_grad():
        found, before = log_probs(model, stream), log_probs(base, stream)
        assert (found - before).abs().max() > 0.5
        assert_close(log_probs(plain(model), stream), found, atol=1e-4, rtol=1e-5)


def test_gradients_are_those_of_the_merged_matrices(base, stream):
    """dB = s G^T A^T and dA = s B^T G^T in the columns of each target, where G is the gradient of the plain matrix."""
    settings, scaling = LoRASettings(rank=3, alpha=6.0, targets=tuple(LORA_TARGETS)), 6.0 / 3
    model = adapted(base, settings)
    other = plain(model)
    for one in (model, other):
        (log_probs(one, stream) * stream.weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == trainable_parameters(model).keys()
    assert_close(gradients["wte.rows"], other.wte.weight.grad[sorted(ROW_IDS)], rtol=1e-3, atol=1e-4)
    seen = set()
    for block in range(2):
        for target, (module, part, num_parts) in LORA_TARGETS.items():
            G = other.get_parameter(f"h.{block}.{module}.weight").grad.chunk(num_parts, dim=1)[part]
            adapter = model.get_submodule(f"h.{block}.{module}").adapters[target]
            for found, expected in (
                (adapter.B.grad, scaling * G.t() @ adapter.A.t()),
                (adapter.A.grad, scaling * adapter.B.t() @ G.t()),
            ):
                assert (found - expected).norm() < 1e-4 * expected.norm()
            seen.add(float(G.abs().max()) > 1e-3)
    assert seen == {True}


def test_what_is_trained_and_what_is_frozen(base):
    model = adapted(base, LoRASettings(rank=4, alpha=8.0, targets=("q", "o")))
    names = [
        f"h.{n}.attn.{m}.adapters.{t}.{w}"
        for n in range(2)
        for m, t in (("c_attn", "q"), ("c_proj", "o"))
        for w in "AB"
    ]
    assert set(trainable_parameters(model)) == {*names, "wte.rows"}
    assert model.wte.rows.shape == (3, 64)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen.keys() == base.state_dict().keys()
    assert all(torch.equal(p, base.state_dict()[name]) for name, p in frozen.items() if name != "wte.weight")


def test_the_table_is_trained_whole(base, stream):
    """Its gradient is that of a plain model, as embedding and as head; it is the only one of the base's that is."""
    model = adapted(base, LoRASettings(rank=4, embeddings=True))
    other = plain(model)
    for one in (model, other):
        (log_probs(one, stream) * stream.weights).sum().backward()
    trained = {name for name in trainable_parameters(model) if ".adapters." not in name}
    assert trained == {"wte.weight"}
    expected = other.wte.weight.grad
    assert (model.wte.weight.grad - expected).norm() < 1e-4 * expected.norm()
    cast_frozen_matrices(model, torch.bfloat16)
    assert model.wte.weight.dtype == torch.float32


def test_the_order_of_targets_and_the_seed_of_others_do_not_matter(base):
    first, second = (
        adapted(base, LoRASettings(rank=4, alpha=8.0, targets=t), learnt=False) for t in (("v", "q"), ("q", "v"))
    )
    assert all(torch.equal(p, trainable_parameters(second)[name]) for name, p in trainable_parameters(first).items())
    A = [first.h[n].attn.c_attn.adapters[t].A for n in range(2) for t in "qv"]
    assert len({a[0, 0].item() for a in A}) == 4


def test_dropout_acts_in_training_alone(base, stream):
    model = adapted(base, LoRASettings(rank=4, alpha=8.0, dropout=0.5))
    without = adapted(base, LoRASettings(rank=4, alpha=8.0))
    with torch.no_grad():
        model.eval()
        assert torch.equal(log_probs(model, stream), log_probs(without, stream))
        model.train()
        one, two = log_probs(model, stream), log_probs(model, stream)
    assert (one - two).abs().max() > 0.01
    assert (one - log_probs(without, stream)).abs().max() > 0.01


def test_the_mean_over_dropout_masks_is_what_is_without(base):
    model = adapted(base, LoRASettings(rank=4, alpha=8.0, dropout=0.5)).train()
    projection = model.h[0].attn.c_attn
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).expand(20_000, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        mean = projection(x).mean(0)
        expected = projection.eval()(x[0])
    assert_close(mean, expected, atol=0.15, rtol=0.1)


def test_no_matrix_waits_for_the_backward_pass_of_dora(base):
    """The norms are of a sum as large as the matrix, which must be gone before the next matrix has its own."""
    projection = adapted(base, LoRASettings(rank=4, dora=True)).h[0].attn.c_attn
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        projection(torch.ones(7, 64, requires_grad=True))
    assert len(kept) > 9
    as_large = [tensor for tensor in kept if tensor.numel() > 7 * 192]
    assert {tensor.data_ptr() for tensor in as_large} == {projection.weight.data_ptr()}


@pytest.mark.parametrize("dora", [False, True])
def test_frozen_matrices_are_held_once_in_half(base, stream, dora):
    model = adapted(base, LoRASettings(rank=4, alpha=8.0, dora=dora))
    whole = log_probs(model, stream)
    size = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    cast_frozen_matrices(model, torch.bfloat16)
    assert sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad) < 0.7 * size
    for name, parameter in model.named_parameters():
        half = not parameter.requires_grad and parameter.ndim == 2 and name != "wpe.weight"
        assert parameter.dtype == (torch.bfloat16 if half else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = log_probs(model, stream)
        (found * stream.weights).sum().backward()
    assert found.dtype == torch.float32
    assert (found - whole).abs().mean() < 0.1
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable_parameters(model).values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_weights_of_another_model_are_refused(base):
    model, other = (adapted(base, LoRASettings(rank=4, alpha=8.0, targets=t)) for t in (("q",), ("q", "v")))
    with pytest.raises(ValueError, match=r"`h\.0\.attn\.c_attn\.adapters\.v\.A` is trained either here or there"):
        load_trainable_parameters(model, trainable_parameters(other))
    broad = {name: torch.ones(1) for name in trainable_parameters(model)}
    with pytest.raises(ValueError, match=r"` must have shape \(\d+, \d+\), but has \(1,\)"):
        load_trainable_parameters(model, broad)
    again = adapted(base, LoRASettings(rank=4, alpha=8.0, targets=("q",)), learnt=False)
    load_trainable_parameters(again, trainable_parameters(model))
    assert all(torch.equal(p, trainable_parameters(model)[name]) for name, p in trainable_parameters(again).items())


def test_a_target_that_there_is_not():
    with pytest.raises(ValueError, match="targets"):
        LoRASettings(rank=4, targets=("q", "gate"))
    assert any("`lora.targets`" in problem for problem in LoRASettings(rank=4, targets=()).problems())


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ({"q": 16, "v": 4}, {"q": 16, "k": 8, "v": 4}),
        (["v=4", "q=16"], {"q": 16, "k": 8, "v": 4}),
        ("q=16,v=4", {"q": 16, "k": 8, "v": 4}),
        ((), {"q": 8, "k": 8, "v": 8}),
    ],
)
def test_ranks_of_single_targets_however_they_are_given(given, ranks):
    settings = LoRASettings(rank=8, targets=("q", "k", "v"), rank_per_target=given)
    assert {target: settings.rank_of(target) for target in ranks} == ranks
    assert settings.rank_per_target in (("q=16", "v=4"), ())
    assert LoRASettings.model_validate(settings.model_dump(mode="json")) == settings
    assert not list(settings.problems())


@pytest.mark.parametrize("setting", ["rank_per_target", "alpha_per_target"])
@pytest.mark.parametrize(
    "given", ["q", "q=", "=4", "w=4", "q=0", "q=-1", "q=nan", "q=inf", "q=x", ["q=4", "q=4"], {"q": True}]
)
def test_numbers_of_single_targets_that_mean_nothing(setting, given):
    with pytest.raises(ValueError, match=f"{setting}\n.*must be TARGET=NUMBER"):
        LoRASettings(rank=4, **{setting: given})


def test_numbers_of_targets_that_get_no_adapter():
    settings = LoRASettings(rank=4, targets=("q",), rank_per_target="v=4", alpha_per_target="q=4")
    assert [problem.split(",")[0] for problem in settings.problems()] == [
        "`lora.rank_per_target` must name targets that `lora.targets` names"
    ]
