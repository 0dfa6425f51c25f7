"""Preference losses: one for every pair of a chosen and a rejected reply to the same prompt.

They compare log-probs of whole replies, c and r, and how far these have moved from the reference:

    change(y) = log policy(y) - log reference(y)         h = change(chosen) - change(rejected)

Each loss is a pure function of the settings and `PairLogProbs`, [P] -> [P]. `PREFERENCE_LOSSES` (settings/choices.py)
lists which of them need a reference, and their parameters. Shape letter: P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gpt2ft.settings.choices import PREFERENCE_LOSSES
from gpt2ft.settings.sections import PreferenceSettings


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
        """Log-prob under the policy minus that under the reference."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_change(self) -> Tensor:
        return self.rejected - self.reference_rejected

    @property
    def change_margin(self) -> Tensor:
        """h of the losses."""
        return self.chosen_change - self.rejected_change

    @property
    def change_margin_per_token(self) -> Tensor:
        """h with each change divided by the length of its reply."""
        return self.chosen_change / self.chosen_lengths - self.rejected_change / self.rejected_lengths

    @property
    def chosen_mean(self) -> Tensor:
        """Log-prob per token under the policy."""
        return self.chosen / self.chosen_lengths

    @property
    def rejected_mean(self) -> Tensor:
        return self.rejected / self.rejected_lengths


def sigmoid(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """-log sigmoid(beta h). Rafailov et al. 2023, "Direct Preference Optimization", eq. 7."""
    return -logsigmoid(settings.beta * pairs.change_margin)


def cdpo(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """Conservative DPO: the label is right with probability 1 - eps. Mitchell 2023, "A note on DPO with noisy
    preferences", eq. 3."""
    margin, eps = settings.beta * pairs.change_margin, settings.label_smoothing
    return -(1 - eps) * logsigmoid(margin) - eps * logsigmoid(-margin)


def robust(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """Unbiased where labels are flipped with probability eps. Chowdhury et al. 2024, "Provably robust DPO", eq. 12."""
    margin, eps = settings.beta * pairs.change_margin, settings.label_smoothing
    return (-(1 - eps) * logsigmoid(margin) + eps * logsigmoid(-margin)) / (1 - 2 * eps)


def ipo(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """(h - 1 / (2 beta))^2 with changes per token, as TRL has it. Azar et al. 2023, "A general theoretical paradigm",
    eq. 17."""
    return (pairs.change_margin_per_token - 1 / (2 * settings.beta)).square()


def hinge(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """max(0, 1 - beta h). Liu et al. 2023, "Statistical rejection sampling improves preference optimization", eq. 9."""
    return torch.relu(1 - settings.beta * pairs.change_margin)


def sigmoid_norm(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """DPO with changes per token. Lambert et al. 2024, "Tulu 3", eq. 6."""
    return -logsigmoid(settings.beta * pairs.change_margin_per_token)


def apo_zero(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """1 - sigmoid(beta change(c)) + sigmoid(beta change(r)): the chosen reply is to become likelier, the rejected one
    less so. D'Oosterlinck et al. 2024, "Anchored preference optimization", eq. 7."""
    return torch.sigmoid(-settings.beta * pairs.chosen_change) + torch.sigmoid(settings.beta * pairs.rejected_change)


def apo_down(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """sigmoid(beta change(c)) + 1 - sigmoid(beta h): both are to become less likely, the rejected one more so.
    D'Oosterlinck et al. 2024, eq. 8."""
    return torch.sigmoid(settings.beta * pairs.chosen_change) + torch.sigmoid(-settings.beta * pairs.change_margin)


def nca(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """Each reply against the reference, not against the other. Chen et al. 2024, "Noise contrastive alignment", eq. 10
    for pairs."""
    chosen, rejected = settings.beta * pairs.chosen_change, settings.beta * pairs.rejected_change
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def sppo(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """(change(c) - 1 / (2 beta))^2 + (change(r) + 1 / (2 beta))^2, with labels taken as certain. Wu et al. 2024,
    "Self-play preference optimization", eq. 4.7."""
    target = 1 / (2 * settings.beta)
    return (pairs.chosen_change - target).square() + (pairs.rejected_change + target).square()


def simpo(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """-log sigmoid(beta (c per token - r per token) - gamma), without a reference. Meng et al. 2024, "SimPO", eq. 6."""
    return -logsigmoid(settings.beta * (pairs.chosen_mean - pairs.rejected_mean) - settings.gamma)


def orpo(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """NLL of the chosen reply per token, and beta times that of the odds ratio. Hong et al. 2024, "ORPO", eq. 6, 7."""
    ratio = _log_odds(pairs.chosen_mean) - _log_odds(pairs.rejected_mean)
    return -pairs.chosen_mean - settings.beta * logsigmoid(ratio)


def _log_odds(log_prob: Tensor) -> Tensor:
    """log(p / (1 - p))"""
    return log_prob - torch.log(-torch.expm1(log_prob))


LOSSES: dict[str, Callable[[PreferenceSettings, PairLogProbs], Tensor]] = {
    name: globals()[name] for name in PREFERENCE_LOSSES
}


def pair_losses(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """Return [P] the loss of each pair, with `rpo_alpha` times the NLL per token of the chosen reply.

    The added term is that of Pang et al. 2024, "Iterative reasoning preference optimization", eq. 1.
    """
    losses = LOSSES[settings.loss](settings, pairs)
    return losses - settings.rpo_alpha * pairs.chosen_mean if settings.rpo_alpha else losses


def start_loss(settings: PreferenceSettings) -> float | None:
    """Return the loss where policy and reference are equal; None where it depends on the data."""
    chosen, rejected = torch.tensor([[-5.0, -40.0, -9.0], [-30.0, -8.0, -9.0]], dtype=torch.float64)
    chosen_lengths, rejected_lengths = torch.tensor([[3.0, 20.0, 4.0], [17.0, 2.0, 5.0]])
    pairs = PairLogProbs(chosen, rejected, chosen, rejected, chosen_lengths, rejected_lengths)
    losses = pair_losses(settings, pairs)
    return float(losses[0]) if torch.allclose(losses, losses[:1]) else None
