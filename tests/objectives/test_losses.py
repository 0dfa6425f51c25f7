"""Preference losses: equal to TRL's own code, each with its traits, and what they are by hand."""

import math
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from gpt2ft.objectives.dpo import DPO, pair_metrics, tail_log_probs
from gpt2ft.objectives.losses import pair_losses, start_loss
from gpt2ft.preference_losses import PREFERENCE_LOSSES, PairLogProbs, PreferenceLoss, sigmoid
from gpt2ft.settings.training import LossName, PreferenceSettings
from gpt2ft.stream import Pairs, TokenStream

SETTINGS = {
    "sigmoid": PreferenceSettings(loss="sigmoid", beta=0.3),
    "cdpo": PreferenceSettings(loss="cdpo", beta=0.3, label_smoothing=0.15),
    "robust": PreferenceSettings(loss="robust", beta=0.3, label_smoothing=0.15),
    "ipo": PreferenceSettings(loss="ipo", beta=0.3),
    "hinge": PreferenceSettings(loss="hinge", beta=0.3),
    "sigmoid_norm": PreferenceSettings(loss="sigmoid_norm", beta=5.0),
    "apo_zero": PreferenceSettings(loss="apo_zero", beta=0.3),
    "apo_down": PreferenceSettings(loss="apo_down", beta=0.3),
    "nca": PreferenceSettings(loss="nca", beta=0.3),
    "sppo": PreferenceSettings(loss="sppo", beta=0.3),
    "simpo": PreferenceSettings(loss="simpo", beta=2.0, gamma=0.5),
    "orpo": PreferenceSettings(loss="orpo", beta=0.2),
    "plackett_luce": PreferenceSettings(loss="plackett_luce", beta=0.3),
}


def test_every_loss_is_tested():
    assert {*SETTINGS, "kto"} == PREFERENCE_LOSSES.keys()  # kto: test_kto.py
    assert all(PREFERENCE_LOSSES[name].of_pairs for name in SETTINGS)
    assert all(
        loss.function.__name__ == name and loss.arguments[0] == "beta" for name, loss in PREFERENCE_LOSSES.items()
    )
    assert set(get_args(LossName)) == PREFERENCE_LOSSES.keys()


@pytest.mark.parametrize("loss", SETTINGS)
def test_a_loss_takes_its_own_parameters_and_no_others(loss):
    """Each setting that a loss takes changes it, and no other does."""
    traits, pairs, own = PREFERENCE_LOSSES[loss], random_pairs(5), SETTINGS[loss]
    assert not list(own.problems())
    values = {"label_smoothing": 0.3, "gamma": 0.7, "rpo_alpha": 0.5, "ld_alpha": 0.5}
    values |= {"desirable_weight": 2.0, "undesirable_weight": 2.0}
    for name, value in values.items():
        changed = own.model_copy(update={name: value})
        problems = list(changed.problems())
        if name in traits.parameters:
            assert not problems
            other = replace(pairs, chosen_ignored=pairs.chosen / 9) if name == "ld_alpha" else pairs
            assert not torch.equal(pair_losses(changed, other), pair_losses(own, pairs))
        else:
            assert [f"`dpo.{name}`" in problem and loss in problem for problem in problems] == [True]


@pytest.mark.parametrize("loss", SETTINGS)
def test_a_loss_reads_the_reference_if_it_needs_one(loss):
    pairs = random_pairs(5)
    other = replace(pairs, reference_chosen=pairs.reference_chosen - 1)
    is_read = not torch.equal(pair_losses(SETTINGS[loss], pairs), pair_losses(SETTINGS[loss], other))
    assert is_read == PREFERENCE_LOSSES[loss].needs_reference == SETTINGS[loss].needs_reference


def random_pairs(number, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (2, number), generator=random).to(dtype)
    log_probs = -lengths.repeat(2, 1) * (0.5 + torch.rand(4, number, generator=random, dtype=dtype))
    chosen, rejected, reference_chosen, reference_rejected = log_probs
    alone = torch.arange(number)
    return PairLogProbs(
        chosen, rejected, reference_chosen, reference_rejected, *lengths, rankings=alone, chosen_replies=alone
    )


# --- TRL ------------------------------------------------------------------------------------------------------------


def trl_dpo_loss(pairs, index, loss_types, beta, label_smoothing=0.0, weights=(1.0,)):
    """DPOTrainer's own loss of one pair: a "model" that answers with per-token log-probs of the given sums."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs trl")
    lengths = [int(pairs.chosen_lengths[index]), int(pairs.rejected_lengths[index])]
    sums = [float(pairs.chosen[index]), float(pairs.rejected[index])]
    parts = [torch.linspace(1, 2, length, dtype=torch.float64) for length in lengths]
    policy = [total * part / part.sum() for total, part in zip(sums, parts, strict=True)]
    trainer, inputs, model = trl_dpo(policy, loss_types, beta, label_smoothing=label_smoothing, loss_weights=[*weights])
    inputs |= {
        "ref_chosen_logps": pairs.reference_chosen[index : index + 1],
        "ref_rejected_logps": pairs.reference_rejected[index : index + 1],
    }
    loss = trl.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return float(loss), {name: values[-1] for name, values in trainer._metrics["train"].items() if values}


def trl_dpo(log_probs_of_tokens, loss_types, beta, **others):
    """A trainer, its inputs for one pair, and the "model" that answers them with these log-probs of tokens."""
    lengths = [len(values) for values in log_probs_of_tokens]
    width = 3 + max(lengths)
    completion_mask = torch.zeros(2, width, dtype=torch.long)
    log_probs = torch.zeros(2, width - 1, dtype=torch.float64)
    for row, values in enumerate(log_probs_of_tokens):
        completion_mask[row, 3 : 3 + len(values)] = 1
        log_probs[row, 2 : 2 + len(values)] = values
    zeros = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    inputs = {
        "input_ids": torch.ones(2, width, dtype=torch.long),
        "attention_mask": torch.ones(2, width, dtype=torch.long),
        "completion_mask": completion_mask,
    }
    trainer = {
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"),
            gather=lambda value: value,
            gather_for_metrics=lambda value: value,
            autocast=nullcontext,
        ),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "ref_model": "another",
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "loss_types": loss_types,
        "loss_weights": [1.0],
        "beta": beta,
        "label_smoothing": 0.0,
        "use_weighting": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**(trainer | others)), inputs, lambda **_: outputs


@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        ("sigmoid", "sigmoid"),
        ("robust", "robust"),
        ("ipo", "ipo"),
        ("hinge", "hinge"),
        ("sigmoid_norm", "sigmoid_norm"),
        ("apo_zero", "apo_zero"),
        ("apo_down", "apo_down"),
        ("nca", "nca_pair"),
        ("sppo", "sppo_hard"),
        ("cdpo", "aot"),  # which of a single pair is label smoothing alone
    ],
)
def test_losses_and_rewards_are_those_of_trl(loss, theirs):
    settings, pairs = SETTINGS[loss], random_pairs(20)
    losses, metrics = pair_losses(settings, pairs), pair_metrics(settings, pairs)
    for index in range(20):
        expected, logged = trl_dpo_loss(pairs, index, [theirs], settings.beta, settings.label_smoothing)
        assert float(losses[index]) == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert float(metrics["reward_chosen"][index]) == pytest.approx(logged["rewards/chosen"], abs=1e-6)
        assert float(metrics["margin"][index]) == pytest.approx(logged["rewards/margins"], abs=1e-6)
        assert float(metrics["accuracy"][index]) == logged["rewards/accuracies"]
    assert {0.0, 1.0} == set(metrics["accuracy"].tolist())


def test_the_nll_term_is_that_of_trl():
    pairs = random_pairs(10)
    losses = pair_losses(PreferenceSettings(loss="sigmoid", beta=0.3, rpo_alpha=0.7), pairs)
    for index in range(10):
        expected, _ = trl_dpo_loss(pairs, index, ["sigmoid", "sft"], 0.3, weights=(1.0, 0.7))
        assert float(losses[index]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("lengths", [(7, 3), (2, 9), (4, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_ld_dpo_is_that_of_trl(loss, lengths):
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs trl")
    policy, reference = ([-3 * torch.rand(length, dtype=torch.float64) for length in lengths] for _ in range(2))
    trainer, inputs, model = trl_dpo(policy, [loss], 0.3, ld_alpha=0.4)
    start = trl_dpo(reference, [loss], 0.3)[2]
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = trl.DPOTrainer.compute_ref_log_probs(
        trainer, start, inputs
    )
    expected = float(trl.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False))

    stream = stream_of_pair(torch.cat(reference), lengths)
    tails = tail_log_probs(torch.cat(reference), stream)
    stream = replace(stream, pairs=replace(stream.pairs, reference_tails=tails))
    settings = PreferenceSettings(loss=loss, beta=0.3, ld_alpha=0.4)
    found = DPO(settings).loss(torch.cat(policy), stream)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    metrics = dict(zip(DPO(settings).metric_names, DPO(settings).metrics(torch.cat(policy), stream), strict=True))
    logged = trainer._metrics["train"]
    assert float(metrics["reward_chosen"]) == pytest.approx(logged["rewards/chosen"][-1], abs=1e-6)
    assert float(metrics["margin"]) == pytest.approx(logged["rewards/margins"][-1], abs=1e-6)
    plain = float(DPO(PreferenceSettings(loss=loss, beta=0.3)).loss(torch.cat(policy), stream))
    assert (float(found) == pytest.approx(plain, rel=1e-9)) == (lengths == (4, 4))


def stream_of_pair(log_probs, lengths):
    """A stream of two replies of these log-probs, of which the first is chosen."""
    groups = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    reference = torch.zeros(2, dtype=torch.float64).index_add(0, groups, log_probs)
    one_ranking = torch.zeros(1, dtype=torch.long)
    lengths_of = torch.tensor(lengths).float()
    pairs = Pairs(torch.tensor([[0, 1]]), torch.ones(1), reference, lengths_of, one_ranking, num_pairs=1)
    nothing = torch.zeros(sum(lengths), dtype=torch.long)
    ones = torch.ones(sum(lengths))
    return TokenStream(*[nothing] * 5, ones, groups, sum(lengths), sum(lengths), pairs=pairs)


def test_simpo_is_that_of_trl():
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="needs trl")
    settings, pairs = SETTINGS["simpo"], random_pairs(20)
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        loss_type="simpo",
        simpo_gamma=settings.gamma,
        beta=settings.beta,
        label_smoothing=0.0,
    )
    means = pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths
    expected, chosen, rejected = cpo.CPOTrainer.cpo_loss(trainer, *means)
    torch.testing.assert_close(pair_losses(settings, pairs), expected, rtol=1e-6, atol=1e-6)
    metrics = pair_metrics(settings, pairs)
    torch.testing.assert_close(metrics["reward_chosen"], chosen)
    torch.testing.assert_close(metrics["reward_rejected"], rejected)


def test_orpo_is_that_of_trl():
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="needs trl")
    settings, pairs = SETTINGS["orpo"], random_pairs(20)
    trainer = SimpleNamespace(beta=settings.beta, accelerator=SimpleNamespace(device=torch.device("cpu")))
    means = pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths
    ratio = orpo.ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
    torch.testing.assert_close(pair_losses(settings, pairs), -means[0] - ratio, rtol=1e-6, atol=1e-6)


# --- the losses themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", SETTINGS)
def test_gradients(loss):
    pairs = random_pairs(4, seed=1)
    sums = [values.clone().requires_grad_() for values in (pairs.chosen, pairs.rejected)]

    def losses(chosen, rejected):
        return pair_losses(SETTINGS[loss], replace(pairs, chosen=chosen, rejected=rejected))

    assert torch.autograd.gradcheck(losses, sums)


@pytest.mark.parametrize("loss", [loss for loss, own in SETTINGS.items() if start_loss(own) is not None])
def test_the_loss_of_the_start_is_known(loss):
    pairs = random_pairs(5)
    same = replace(pairs, reference_chosen=pairs.chosen, reference_rejected=pairs.rejected)
    losses = pair_losses(SETTINGS[loss], same)
    assert losses.tolist() == pytest.approx([start_loss(SETTINGS[loss])] * 5)
    assert set(pair_metrics(SETTINGS[loss], same)["accuracy"].tolist()) == {0.5}


def test_the_loss_of_the_start_depends_on_the_data():
    assert start_loss(PreferenceSettings(loss="sigmoid", rpo_alpha=1.0)) is None
    assert {loss for loss, own in SETTINGS.items() if start_loss(own) is None} == {"simpo", "orpo", "plackett_luce"}
    assert start_loss(SETTINGS["sigmoid"]) == math.log(2)


def test_the_start_of_a_new_loss_is_found_out(monkeypatch):
    """Also if it needs a reference and looks at more than changes. Its entry alone makes it known."""
    twice = PreferenceLoss(lambda pairs, beta, gamma: 2 * sigmoid(pairs, beta) + gamma, "twice")
    more = PreferenceLoss(lambda pairs, beta: sigmoid(pairs, beta) - pairs.chosen, "more", has_nll=True)
    monkeypatch.setitem(PREFERENCE_LOSSES, "twice", twice)
    monkeypatch.setitem(PREFERENCE_LOSSES, "more", more)
    assert start_loss(PreferenceSettings.model_construct(loss="twice", gamma=1.0)) == 2 * math.log(2) + 1
    assert start_loss(PreferenceSettings.model_construct(loss="more")) is None
    assert twice.parameters == ("gamma", "rpo_alpha", "ld_alpha")
    assert more.parameters == ("ld_alpha",)


def test_robust_is_unbiased_where_labels_are_flipped():
    eps, pairs = 0.2, random_pairs(30)
    flipped = PairLogProbs(
        *(pairs.rejected, pairs.chosen, pairs.reference_rejected, pairs.reference_chosen),
        *(pairs.rejected_lengths, pairs.chosen_lengths),
    )
    settings = PreferenceSettings(loss="robust", label_smoothing=eps)
    mean = (1 - eps) * pair_losses(settings, pairs) + eps * pair_losses(settings, flipped)
    torch.testing.assert_close(mean, pair_losses(PreferenceSettings(loss="sigmoid"), pairs))


@pytest.mark.parametrize("loss", SETTINGS)
def test_extreme_log_probs_stay_finite(loss):
    chosen = torch.tensor([-1e-7, -1e5, -1e5, -1e-7], dtype=torch.float64).requires_grad_()
    rejected = torch.tensor([-1e5, -1e-7, -1e5, -1e-7], dtype=torch.float64).requires_grad_()
    references = torch.full((4,), -10.0, dtype=torch.float64)
    pairs = replace(random_pairs(4), chosen=chosen, rejected=rejected)
    pairs = replace(pairs, reference_chosen=references, reference_rejected=references)
    pairs = replace(pairs, chosen_lengths=torch.ones(4), rejected_lengths=torch.ones(4))
    losses = pair_losses(SETTINGS[loss], pairs)
    losses.sum().backward()
    assert all(bool(torch.isfinite(values).all()) for values in (losses, chosen.grad, rejected.grad))


def test_metrics_by_hand():
    pairs = PairLogProbs(*(torch.tensor(values, dtype=torch.float64) for values in (
        [-8.0, -6.0], [-9.0, -5.0], [-6.0, -7.0], [-6.0, -5.0], [2.0, 2.0], [3.0, 5.0],
    )))  # fmt: skip
    metrics = {name: values.tolist() for name, values in pair_metrics(PreferenceSettings(beta=0.5), pairs).items()}
    assert metrics == {
        "reward_chosen": [-1.0, 0.5],
        "reward_rejected": [-1.5, 0.0],
        "margin": [0.5, 0.5],
        "accuracy": [1.0, 1.0],
        "likelier": [0.0, 0.0],
        "chosen_change_per_token": [-1.0, 0.5],
        "rejected_change_per_token": [-1.0, 0.0],
        "both_fall": [1.0, 0.0],
        "chosen_length": [2.0, 2.0],
        "rejected_length": [3.0, 5.0],
    }
