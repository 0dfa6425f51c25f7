"""Preference losses: equal to TRL's own code, and a mean over all pairs of a step however they are cut into streams."""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2ft.objectives.dpo import (
    DPO,
    LOSSES,
    DPOConfig,
    PairLogProbs,
    needs_reference,
    of_pairs,
    pair_losses,
    pair_metrics,
    start_loss,
)
from gpt2ft.stream import Pairs, TokenStream

CONFIGS = {
    "sigmoid": DPOConfig("sigmoid", beta=0.3),
    "cdpo": DPOConfig("cdpo", beta=0.3, label_smoothing=0.15),
    "robust": DPOConfig("robust", beta=0.3, label_smoothing=0.15),
    "ipo": DPOConfig("ipo", beta=0.3),
    "hinge": DPOConfig("hinge", beta=0.3),
    "sigmoid_norm": DPOConfig("sigmoid_norm", beta=5.0),
    "simpo": DPOConfig("simpo", beta=2.0, gamma=0.5),
    "orpo": DPOConfig("orpo", beta=0.2),
}
assert CONFIGS.keys() == LOSSES.keys()


def random_pairs(number, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (2, number), generator=random).to(dtype)
    log_probs = -lengths.repeat(2, 1) * (0.5 + torch.rand(4, number, generator=random, dtype=dtype))
    chosen, rejected, reference_chosen, reference_rejected = log_probs
    return PairLogProbs(chosen, rejected, reference_chosen, reference_rejected, *lengths)


# --- TRL ------------------------------------------------------------------------------------------------------------


def trl_dpo_loss(pairs, index, loss_types, beta, label_smoothing=0.0, weights=(1.0,)):
    """DPOTrainer's own loss of one pair: a "model" that answers with per-token log-probs of the given sums."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs trl")
    lengths = [int(pairs.chosen_lengths[index]), int(pairs.rejected_lengths[index])]
    sums = [float(pairs.chosen[index]), float(pairs.rejected[index])]
    width = 3 + max(lengths)
    completion_mask = torch.zeros(2, width, dtype=torch.long)
    log_probs = torch.zeros(2, width - 1, dtype=torch.float64)
    for row, (length, total) in enumerate(zip(lengths, sums, strict=True)):
        completion_mask[row, 3 : 3 + length] = 1
        parts = torch.linspace(1, 2, length, dtype=torch.float64)
        log_probs[row, 2 : 2 + length] = total * parts / parts.sum()
    zeros = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    inputs = {
        "input_ids": torch.ones(2, width, dtype=torch.long),
        "attention_mask": torch.ones(2, width, dtype=torch.long),
        "completion_mask": completion_mask,
        "ref_chosen_logps": pairs.reference_chosen[index : index + 1],
        "ref_rejected_logps": pairs.reference_rejected[index : index + 1],
    }
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    trainer = SimpleNamespace(
        model=torch.nn.Identity(),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=list(weights),
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return float(loss), {name: values[-1] for name, values in trainer._metrics["train"].items() if values}


@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        ("sigmoid", "sigmoid"),
        ("robust", "robust"),
        ("ipo", "ipo"),
        ("hinge", "hinge"),
        ("sigmoid_norm", "sigmoid_norm"),
        ("cdpo", "aot"),  # which of a single pair is label smoothing alone
    ],
)
def test_losses_and_rewards_are_those_of_trl(loss, theirs):
    config, pairs = CONFIGS[loss], random_pairs(20)
    losses, metrics = pair_losses(config, pairs), pair_metrics(config, pairs)
    for index in range(20):
        expected, logged = trl_dpo_loss(pairs, index, [theirs], config.beta, config.label_smoothing)
        assert float(losses[index]) == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert float(metrics["reward_chosen"][index]) == pytest.approx(logged["rewards/chosen"], abs=1e-6)
        assert float(metrics["margin"][index]) == pytest.approx(logged["rewards/margins"], abs=1e-6)
        assert float(metrics["accuracy"][index]) == logged["rewards/accuracies"]
    assert {0.0, 1.0} == set(metrics["accuracy"].tolist())


def test_the_nll_term_is_that_of_trl():
    pairs = random_pairs(10)
    losses = pair_losses(DPOConfig("sigmoid", beta=0.3, rpo_alpha=0.7), pairs)
    for index in range(10):
        expected, _ = trl_dpo_loss(pairs, index, ["sigmoid", "sft"], 0.3, weights=(1.0, 0.7))
        assert float(losses[index]) == pytest.approx(expected, rel=1e-6)


def test_simpo_is_that_of_trl():
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="needs trl")
    config, pairs = CONFIGS["simpo"], random_pairs(20)
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        loss_type="simpo",
        simpo_gamma=config.gamma,
        beta=config.beta,
        label_smoothing=0.0,
    )
    means = pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths
    expected, chosen, rejected = cpo.CPOTrainer.cpo_loss(trainer, *means)
    torch.testing.assert_close(pair_losses(config, pairs), expected, rtol=1e-6, atol=1e-6)
    metrics = pair_metrics(config, pairs)
    torch.testing.assert_close(metrics["reward_chosen"], chosen)
    torch.testing.assert_close(metrics["reward_rejected"], rejected)


def test_orpo_is_that_of_trl():
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="needs trl")
    config, pairs = CONFIGS["orpo"], random_pairs(20)
    trainer = SimpleNamespace(beta=config.beta, accelerator=SimpleNamespace(device=torch.device("cpu")))
    means = pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths
    ratio = orpo.ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
    torch.testing.assert_close(pair_losses(config, pairs), -means[0] - ratio, rtol=1e-6, atol=1e-6)


# --- the losses themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    pairs = random_pairs(4, seed=1)
    sums = [values.clone().requires_grad_() for values in (pairs.chosen, pairs.rejected)]

    def losses(chosen, rejected):
        fixed = (pairs.reference_chosen, pairs.reference_rejected, pairs.chosen_lengths, pairs.rejected_lengths)
        return pair_losses(CONFIGS[loss], PairLogProbs(chosen, rejected, *fixed))

    assert torch.autograd.gradcheck(losses, sums)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if needs_reference(loss)])
def test_the_loss_of_the_start_is_known(loss):
    pairs = random_pairs(5)
    same = PairLogProbs(pairs.chosen, pairs.rejected, pairs.chosen, pairs.rejected, *torch.ones(2, 5))
    losses = pair_losses(CONFIGS[loss], same)
    assert losses.tolist() == pytest.approx([start_loss(CONFIGS[loss])] * 5)
    assert set(pair_metrics(CONFIGS[loss], same)["accuracy"].tolist()) == {0.5}


def test_the_loss_of_the_start_depends_on_the_data():
    assert start_loss(DPOConfig("sigmoid", rpo_alpha=1.0)) is None
    assert start_loss(CONFIGS["simpo"]) is None
    assert start_loss(CONFIGS["sigmoid"]) == math.log(2)


def test_robust_is_unbiased_where_labels_are_flipped():
    eps, pairs = 0.2, random_pairs(30)
    flipped = PairLogProbs(
        *(pairs.rejected, pairs.chosen, pairs.reference_rejected, pairs.reference_chosen),
        *(pairs.rejected_lengths, pairs.chosen_lengths),
    )
    config = DPOConfig("robust", label_smoothing=eps)
    mean = (1 - eps) * pair_losses(config, pairs) + eps * pair_losses(config, flipped)
    torch.testing.assert_close(mean, pair_losses(DPOConfig("sigmoid"), pairs))


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_log_probs_stay_finite(loss):
    chosen = torch.tensor([-1e-7, -1e5, -1e5, -1e-7], dtype=torch.float64).requires_grad_()
    rejected = torch.tensor([-1e5, -1e-7, -1e5, -1e-7], dtype=torch.float64).requires_grad_()
    pairs = PairLogProbs(chosen, rejected, *torch.full((2, 4), -10.0, dtype=torch.float64), *torch.ones(2, 4))
    losses = pair_losses(CONFIGS[loss], pairs)
    losses.sum().backward()
    assert all(bool(torch.isfinite(values).all()) for values in (losses, chosen.grad, rejected.grad))


def test_metrics_by_hand():
    pairs = PairLogProbs(*(torch.tensor(values, dtype=torch.float64) for values in (
        [-8.0, -6.0], [-9.0, -5.0], [-6.0, -7.0], [-6.0, -5.0], [2.0, 2.0], [3.0, 5.0],
    )))  # fmt: skip
    metrics = {name: values.tolist() for name, values in pair_metrics(DPOConfig(beta=0.5), pairs).items()}
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


# --- on streams -----------------------------------------------------------------------------------------------------


def make_stream(groups, num_pairs=6, num_replies=8, num_targets=64):
    """A stream of groups: lengths of replies, reference of each, pairs of them, weight. Positions do not matter."""
    index, weights = torch.zeros(num_pairs, 2, dtype=torch.long), torch.zeros(num_pairs)
    reference, lengths = torch.zeros(num_replies, dtype=torch.float64), torch.ones(num_replies)
    targets = []
    first = pair = 0
    for sizes, known, compared, weight in groups:
        for number, size in enumerate(sizes):
            targets += [first + number] * size
            lengths[first + number] = size
            reference[first + number] = known[number]
        for a, b in compared:
            index[pair], weights[pair] = torch.tensor([first + a, first + b]), weight
            pair += 1
        first += len(sizes)
    scored = len(targets)
    numbers = torch.zeros(num_targets, dtype=torch.long)
    numbers[:scored] = torch.tensor(targets, dtype=torch.long)
    is_real = torch.zeros(num_targets)
    is_real[:scored] = 1
    nothing = torch.zeros(num_targets, dtype=torch.long)
    pairs = Pairs(index, weights, reference, lengths)
    return TokenStream(nothing, nothing, nothing, nothing, nothing, is_real, numbers, num_targets, scored, pairs)


def random_group(random):
    sizes = random.integers(1, 7, int(random.integers(2, 4))).tolist()
    compared = [(a, b) for a in range(len(sizes)) for b in range(a + 1, len(sizes))]
    return sizes, (-3 * random.random(len(sizes)) * sizes).tolist(), compared, float(random.choice([1.0, 0.25]))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_over_a_step_does_not_depend_on_how_pairs_are_cut_into_streams(loss):
    random = np.random.default_rng(3)
    groups = [random_group(random) for _ in range(4)]
    log_probs = [-torch.from_numpy(random.random(sum(sizes))).float() for sizes, *_ in groups]
    objective = DPO(CONFIGS[loss])

    def step(cuts, num_pairs):
        total = normalizer = 0.0
        metrics = torch.zeros(len(objective.metric_names), dtype=torch.float64)
        for cut in cuts:
            stream = make_stream([groups[i] for i in cut], num_pairs, num_replies=14, num_targets=90)
            values = torch.cat([*(log_probs[i] for i in cut), torch.full((90,), -1e30)])[:90]
            total += float(objective.loss(values, stream))
            normalizer += objective.normalizer(stream)
            metrics += objective.metrics(values, stream)
        return [total / normalizer, *(metrics / normalizer).tolist()]

    whole = step([[0, 1, 2, 3]], 12)
    assert step([[2], [], [0, 3], [1]], 12) == pytest.approx(whole, rel=1e-5)
    assert {len(compared) for _, _, compared, _ in groups} == {1, 3}
    assert len({weight for *_, weight in groups}) == 2


@pytest.mark.parametrize("loss", LOSSES)
def test_the_tail_adds_nothing_and_an_empty_stream_stays_connected(loss):
    objective = DPO(CONFIGS[loss])
    log_probs = -torch.rand(64)
    log_probs.requires_grad_()
    empty = make_stream([])
    value = objective.loss(log_probs, empty)
    value.backward()
    assert float(value) == 0
    assert objective.normalizer(empty) == 0
    assert log_probs.grad.tolist() == [0.0] * 64
    assert objective.metrics(log_probs, empty).tolist() == [0.0] * len(objective.metric_names)

    stream = make_stream([([3, 4], [-2.0, -5.0], [(0, 1)], 1.0)])
    log_probs.grad = None
    objective.loss(log_probs, stream).backward()
    assert bool((log_probs.grad[:3] != 0).all())
    assert not log_probs.grad[7:].any()
    assert bool(torch.isfinite(log_probs.grad).all())


def test_replies_are_summed_by_their_number():
    stream = make_stream([([2, 3], [-1.0, -2.0], [(1, 0)], 1.0)])
    pairs = of_pairs(-torch.arange(64.0), stream)
    assert [float(values) for values in vars(pairs).values()] == [-9.0, -1.0, -2.0, -1.0, 3.0, 2.0]
