"""Preference objectives: a loss for every pair of a chosen and a rejected reply to the same prompt.

What is compared are log-probs of whole replies, c and r, and how far they have moved from the reference:

    change(y) = log policy(y) - log reference(y)         h = change(chosen) - change(rejected)

Each loss is a pure function of `PairLogProbs`. Shape letters: P pairs, R replies, S supervised targets.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gpt2ft.stream import TokenStream


@dataclass(frozen=True)
class PairLogProbs:
    """Log-probs of the replies of each pair, summed over their targets."""

    chosen: Tensor  # [P] under the policy
    rejected: Tensor  # [P]
    reference_chosen: Tensor  # [P] under the reference; losses without one do not read it
    reference_rejected: Tensor  # [P]
    chosen_lengths: Tensor  # [P] targets
    rejected_lengths: Tensor  # [P]

    @property
    def chosen_change(self) -> Tensor:
        return self.chosen - self.reference_chosen

    @property
    def rejected_change(self) -> Tensor:
        return self.rejected - self.reference_rejected

    @property
    def chosen_mean(self) -> Tensor:
        """Log-prob per token under the policy."""
        return self.chosen / self.chosen_lengths

    @property
    def rejected_mean(self) -> Tensor:
        return self.rejected / self.rejected_lengths


@dataclass(frozen=True)
class DPOConfig:
    """Which loss, and what it is told. See `PreferenceSettings`."""

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.0
    rpo_alpha: float = 0.0


# --- the losses -----------------------------------------------------------------------------------------------------


def sigmoid(config: DPOConfig, pairs: PairLogProbs) -> Tensor:
    """-log sigmoid(beta h). Rafailov et al. 2023, "Direct Preference Optimization", eq. 7."""
    return -logsigmoid(config.beta * (pairs.chosen_change - pairs.rejected_change))


def cdpo(config: DPOConfig, pairs: PairLogProbs) -> Tensor:
    """Conservative DPO: the label is right with probability 1 - eps. Mitchell 2023, "A note on DPO with noisy
    preferences", eq. 3."""
    reward = config.beta * (pairs.chosen_change - pairs.rejected_change)
    eps = config.label_smoothing
    return -(1 - eps) * logsigmoid(reward) - eps * logsigmoid(-reward)


def robust(config: DPOConfig, pairs: PairLogProbs) -> Tensor:
    """Unbiased where labels are flipped with probability eps. Chowdhury et al. 2024, "Provably robust DPO", eq. 12."""
    reward = config.beta * (pairs.chosen_change - pairs.rejected_change)
    eps = config.label_smoothing
    return (-(1 - eps) * logsigmoid(reward) + eps * logsigmoid(-reward)) / (1 - 2 * eps)


def ipo(config: DPOConfig, pairs: PairLogProbs) -> Tensor:
    """(h - 1 / (2 beta))^2 with changes per token, as TRL has it. Azar et al. 2023, "A general theoretical paradigm",
    eq. 17."""
    per_token = pairs.chosen_change / pairs.chosen_lengths - pairs.rejected_change / pairs.rejected_lengths
    return (per_token - 1 / (2 * config.beta)).square()


def hinge(config: DPOConfig, pairs: PairLogProbs) -> Tensor:
    """max(0, 1 - beta h). Liu et al. 2023, "Statistical rejection sampling improves preference optimization", eq. 9."""
    return torch.relu(1 - config.beta * (pairs.chosen_change - pairs.rejected_change))


def sigmoid_norm(config: DPOConfig, pairs: PairLogProbs) -> Tensor:
    """DPO with changes per token. Lambert et al. 2024, "Tulu 3", eq. 6."""
    per_token = pairs.chosen_change / pairs.chosen_lengths - pairs.rejected_change / pairs.rejected_lengths
    return -logsigmoid(config.beta * per_token)


def simpo(config: DPOConfig, pairs: PairLogProbs) -> Tensor:
    """-log sigmoid(beta (c per token - r per token) - gamma), without a reference. Meng et al. 2024, "SimPO", eq. 6."""
    return -logsigmoid(config.beta * (pairs.chosen_mean - pairs.rejected_mean) - config.gamma)


def orpo(config: DPOConfig, pairs: PairLogProbs) -> Tensor:
    """NLL of the chosen reply per token, and beta times that of the odds ratio. Hong et al. 2024, "ORPO", eq. 6, 7."""
    ratio = _log_odds(pairs.chosen_mean) - _log_odds(pairs.rejected_mean)
    return -pairs.chosen_mean - config.beta * logsigmoid(ratio)


def _log_odds(log_prob: Tensor) -> Tensor:
    """log(p / (1 - p))"""
    return log_prob - torch.log(-torch.expm1(log_prob))


LOSSES: dict[str, Callable[[DPOConfig, PairLogProbs], Tensor]] = {
    loss.__name__: loss for loss in (sigmoid, cdpo, robust, ipo, hinge, sigmoid_norm, simpo, orpo)
}


def needs_reference(loss: str) -> bool:
    return loss not in ("simpo", "orpo")


def pair_losses(config: DPOConfig, pairs: PairLogProbs) -> Tensor:
    """[P] the loss of each pair, with `rpo_alpha` times the NLL per token of the chosen reply.

    The added term is that of Pang et al. 2024, "Iterative reasoning preference optimization", eq. 1.
    """
    losses = LOSSES[config.loss](config, pairs)
    return losses - config.rpo_alpha * pairs.chosen_mean if config.rpo_alpha else losses


def start_loss(config: DPOConfig) -> float | None:
    """The loss where policy and reference are equal; None where it depends on the data."""
    if config.rpo_alpha or not needs_reference(config.loss):
        return None
    return {"ipo": 1 / (2 * config.beta) ** 2, "hinge": 1.0}.get(config.loss, math.log(2))


def pair_metrics(config: DPOConfig, pairs: PairLogProbs) -> dict[str, Tensor]:
    """What people want to know of each pair, [P] each.

    A reward is beta times the change from the reference; without a reference, beta times the log-prob per token.
    `accuracy` counts a tie as one half, so it starts there. `both_fall` is likelihood displacement: chosen and rejected
    reply have both become less likely (Razin et al. 2024).
    """
    with_reference = needs_reference(config.loss)
    chosen, rejected = (
        (pairs.chosen_change, pairs.rejected_change) if with_reference else (pairs.chosen_mean, pairs.rejected_mean)
    )
    metrics = {
        "reward_chosen": config.beta * chosen,
        "reward_rejected": config.beta * rejected,
        "margin": config.beta * (chosen - rejected),
        "accuracy": _is_above(chosen, rejected),
        "likelier": _is_above(pairs.chosen_mean, pairs.rejected_mean),
    }
    if with_reference:
        metrics["chosen_change_per_token"] = pairs.chosen_change / pairs.chosen_lengths
        metrics["rejected_change_per_token"] = pairs.rejected_change / pairs.rejected_lengths
        metrics["both_fall"] = ((pairs.chosen_change < 0) & (pairs.rejected_change < 0)).to(chosen.dtype)
    return metrics | {"chosen_length": pairs.chosen_lengths, "rejected_length": pairs.rejected_lengths}


def _is_above(a: Tensor, b: Tensor) -> Tensor:
    """1 where a > b, 1/2 where they are equal, else 0."""
    return (torch.sign(a - b) + 1) / 2


class DPO:
    """The mean loss over all pairs of the step, each with its weight."""

    def __init__(self, config: DPOConfig) -> None:
        self.config = config
        ones = PairLogProbs(*torch.ones(6, 1))
        self.metric_names = tuple(pair_metrics(config, ones))

    def normalizer(self, stream: TokenStream) -> float:
        return float(stream.pairs.weights.double().sum())

    def loss(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        losses = pair_losses(self.config, of_pairs(log_probs, stream))
        # The second term is zero: it keeps a stream without pairs connected to the gradient all-reduce.
        return (_weights(stream) * losses).sum().float() + 0.0 * log_probs.sum()

    def metrics(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        metrics = pair_metrics(self.config, of_pairs(log_probs.detach(), stream))
        return torch.stack([(_weights(stream) * values).sum() for values in metrics.values()])


def of_pairs(log_probs: Tensor, stream: TokenStream) -> PairLogProbs:
    """log_probs [S] of a stream -> those of its pairs, the tail left out.

    In float64, as what is subtracted is large and what is left is small.
    """
    replies = reply_log_probs(log_probs, stream)
    chosen, rejected = stream.pairs.index[stream.pairs.weights > 0].unbind(1)
    reference, lengths = stream.pairs.reference, stream.pairs.lengths.double()
    return PairLogProbs(
        replies[chosen],
        replies[rejected],
        reference[chosen],
        reference[rejected],
        lengths[chosen],
        lengths[rejected],
    )


def reply_log_probs(log_probs: Tensor, stream: TokenStream) -> Tensor:
    """log_probs [S] -> [R] float64, of whole replies."""
    counted = (stream.weights * log_probs).double()
    return torch.zeros_like(stream.pairs.reference).index_add(0, stream.groups, counted)


def _weights(stream: TokenStream) -> Tensor:
    weights = stream.pairs.weights
    return weights[weights > 0].double()
