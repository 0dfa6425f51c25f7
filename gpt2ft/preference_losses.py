"""Preference losses: one for every pair of a chosen and a rejected reply to the same prompt.

They compare log-probs of whole replies, c and r, and how far these have moved from the reference:

    change(y) = log policy(y) - log reference(y)         h = change(chosen) - change(rejected)

Each loss is a pure function of `PairLogProbs`, [P] -> [P], or of `LabelledLogProbs` where replies are good or bad by
themselves, and of the settings of `dpo` that stand in its signature.
`PREFERENCE_LOSSES`, at the end, is the list of them: settings offer what stands there, and nothing else needs to know.
A loss of whole rankings gives all pairs of one the same value, so that each ranking weighs what its pairs weigh.
Settings load without torch, so it is not imported here before a loss is computed. Shape letter: P pairs, or labelled
replies.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairLogProbs:
    """Log-probs of the replies of each pair, summed over their targets."""

    chosen: "Tensor"  # [P] under the policy
    rejected: "Tensor"  # [P]
    reference_chosen: "Tensor"  # [P] under the reference; losses without one do not read it
    reference_rejected: "Tensor"  # [P]
    chosen_lengths: "Tensor"  # [P] targets
    rejected_lengths: "Tensor"  # [P]
    chosen_ignored: "Tensor | float" = 0.0  # [P] share of the change that LD-DPO leaves out of account
    rejected_ignored: "Tensor | float" = 0.0
    rankings: "Tensor | None" = None  # [P] number of the ranking that each pair is of, for list-wise losses
    chosen_replies: "Tensor | None" = None  # [P] number of the chosen reply

    @property
    def chosen_change(self) -> "Tensor":
        """Log-prob under the policy minus that under the reference."""
        return self.chosen - self.reference_chosen - self.chosen_ignored

    @property
    def rejected_change(self) -> "Tensor":
        return self.rejected - self.reference_rejected - self.rejected_ignored

    @property
    def change_margin(self) -> "Tensor":
        """h of the losses."""
        return self.chosen_change - self.rejected_change

    @property
    def change_margin_per_token(self) -> "Tensor":
        """h with each change divided by the length of its reply."""
        return self.chosen_change / self.chosen_lengths - self.rejected_change / self.rejected_lengths

    @property
    def chosen_mean(self) -> "Tensor":
        """Log-prob per token under the policy."""
        return self.chosen / self.chosen_lengths

    @property
    def rejected_mean(self) -> "Tensor":
        return self.rejected / self.rejected_lengths


def sigmoid(pairs: PairLogProbs, beta: float) -> "Tensor":
    """-log sigmoid(beta h). Rafailov et al. 2023, "Direct Preference Optimization", eq. 7."""
    return -_log_sigmoid(beta * pairs.change_margin)


def cdpo(pairs: PairLogProbs, beta: float, label_smoothing: float) -> "Tensor":
    """Conservative DPO: the label is right with probability 1 - eps. Mitchell 2023, "A note on DPO with noisy
    preferences", eq. 3."""
    margin, eps = beta * pairs.change_margin, label_smoothing
    return -(1 - eps) * _log_sigmoid(margin) - eps * _log_sigmoid(-margin)


def robust(pairs: PairLogProbs, beta: float, label_smoothing: float) -> "Tensor":
    """Unbiased where labels are flipped with probability eps. Chowdhury et al. 2024, "Provably robust DPO", eq. 12."""
    margin, eps = beta * pairs.change_margin, label_smoothing
    return (-(1 - eps) * _log_sigmoid(margin) + eps * _log_sigmoid(-margin)) / (1 - 2 * eps)


def ipo(pairs: PairLogProbs, beta: float) -> "Tensor":
    """(h - 1 / (2 beta))^2 with changes per token, as TRL has it. Azar et al. 2023, "A general theoretical paradigm",
    eq. 17."""
    return (pairs.change_margin_per_token - 1 / (2 * beta)).square()


def hinge(pairs: PairLogProbs, beta: float) -> "Tensor":
    """max(0, 1 - beta h). Liu et al. 2023, "Statistical rejection sampling improves preference optimization", eq. 9."""
    return (1 - beta * pairs.change_margin).relu()


def sigmoid_norm(pairs: PairLogProbs, beta: float) -> "Tensor":
    """DPO with changes per token. Lambert et al. 2024, "Tulu 3", eq. 6."""
    return -_log_sigmoid(beta * pairs.change_margin_per_token)


def apo_zero(pairs: PairLogProbs, beta: float) -> "Tensor":
    """1 - sigmoid(beta change(c)) + sigmoid(beta change(r)): the chosen reply is to become likelier, the rejected one
    less so. D'Oosterlinck et al. 2024, "Anchored preference optimization", eq. 7."""
    return (-beta * pairs.chosen_change).sigmoid() + (beta * pairs.rejected_change).sigmoid()


def apo_down(pairs: PairLogProbs, beta: float) -> "Tensor":
    """sigmoid(beta change(c)) + 1 - sigmoid(beta h): both are to become less likely, the rejected one more so.
    D'Oosterlinck et al. 2024, eq. 8."""
    return (beta * pairs.chosen_change).sigmoid() + (-beta * pairs.change_margin).sigmoid()


def nca(pairs: PairLogProbs, beta: float) -> "Tensor":
    """Each reply against the reference, not against the other. Chen et al. 2024, "Noise contrastive alignment", eq. 10
    for pairs."""
    chosen, rejected = beta * pairs.chosen_change, beta * pairs.rejected_change
    return -_log_sigmoid(chosen) - 0.5 * _log_sigmoid(-chosen) - 0.5 * _log_sigmoid(-rejected)


def sppo(pairs: PairLogProbs, beta: float) -> "Tensor":
    """(change(c) - 1 / (2 beta))^2 + (change(r) + 1 / (2 beta))^2, with labels taken as certain. Wu et al. 2024,
    "Self-play preference optimization", eq. 4.7."""
    target = 1 / (2 * beta)
    return (pairs.chosen_change - target).square() + (pairs.rejected_change + target).square()


def simpo(pairs: PairLogProbs, beta: float, gamma: float) -> "Tensor":
    """-log sigmoid(beta (c per token - r per token) - gamma), without a reference. Meng et al. 2024, "SimPO", eq. 6."""
    return -_log_sigmoid(beta * (pairs.chosen_mean - pairs.rejected_mean) - gamma)


def orpo(pairs: PairLogProbs, beta: float) -> "Tensor":
    """NLL of the chosen reply per token, and beta times that of the odds ratio. Hong et al. 2024, "ORPO", eq. 6, 7."""
    ratio = _log_odds(pairs.chosen_mean) - _log_odds(pairs.rejected_mean)
    return -pairs.chosen_mean - beta * _log_sigmoid(ratio)


def plackett_luce(pairs: PairLogProbs, beta: float) -> "Tensor":
    """-log of the probability of a whole ranking, to each of its pairs: the sum over its replies but the worst of

        -log (exp(beta change(y)) / sum exp(beta change(y')))        y' being y and all replies worse than it

    Plackett 1975, "The analysis of permutations"; Luce 1959; Rafailov et al. 2023, appendix A.3, eq. 20. Replies of one
    rank are not compared, so each is drawn from itself and what is worse than both.
    """
    margins = beta * pairs.change_margin
    in_ranking = pairs.rankings[:, None] == pairs.rankings  # [P, P]
    in_draw = in_ranking & (pairs.chosen_replies[:, None] == pairs.chosen_replies)
    draws = -_log_sigmoid(-(-margins).where(in_draw, -math.inf).logsumexp(1))  # [P] equal for all pairs of a draw
    return in_ranking.to(draws.dtype) @ (draws / in_draw.sum(1))


@dataclass(frozen=True)
class LabelledLogProbs:
    """Replies of which each is desirable or not by itself."""

    changes: "Tensor"  # [P] log-prob under the policy minus that under the reference
    signs: "Tensor"  # [P] 1 where desirable, -1 where not
    baseline: "Tensor | float"  # estimate of KL(policy || reference), the same for all replies of a step


def kto(replies: LabelledLogProbs, beta: float, desirable_weight: float, undesirable_weight: float) -> "Tensor":
    """w (1 - sigmoid(beta (change - baseline))) of a desirable reply, w (1 - sigmoid(beta (baseline - change))) of
    another. Ethayarajh et al. 2024, "KTO", eq. 7."""
    weights = (desirable_weight + undesirable_weight) / 2 + (desirable_weight - undesirable_weight) / 2 * replies.signs
    return weights * (-beta * replies.signs * (replies.changes - replies.baseline)).sigmoid()


def _log_sigmoid(x: "Tensor") -> "Tensor":
    """log(1 / (1 + exp(-x)))"""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def _log_odds(log_prob: "Tensor") -> "Tensor":
    """log(p / (1 - p))"""
    return log_prob - (-log_prob.expm1()).log()


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss, and all that settings must know of it.

    Attributes:
        function: of `PairLogProbs` or `LabelledLogProbs`, and of settings of `dpo`, `beta` first.
        meaning: in a few words, for --help.
        has_nll: the NLL of the chosen reply is a part of it, so `rpo_alpha` would add it once more.
        is_list_wise: it is of a whole ranking, with the same value for all pairs of it, so these must be all that the
            ranking gives, and no setting may weigh a reply by the pair that it is in.
        of_pairs: False where replies are labelled, each by itself.
    """

    function: Callable[..., "Tensor"]
    meaning: str
    needs_reference: bool = True
    has_nll: bool = False
    is_list_wise: bool = False
    of_pairs: bool = True

    @property
    def arguments(self) -> tuple[str, ...]:
        """Settings that the function itself takes."""
        return tuple(inspect.signature(self.function).parameters)[1:]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Settings of `dpo` that have a meaning beside `beta`."""
        weighs_pairs = self.of_pairs and not self.is_list_wise
        others = {"rpo_alpha": weighs_pairs and not self.has_nll, "ld_alpha": weighs_pairs and self.needs_reference}
        return (*self.arguments[1:], *(name for name, has_meaning in others.items() if has_meaning))


PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(sigmoid, "DPO as published"),
    "cdpo": PreferenceLoss(cdpo, "for labels that are sometimes wrong"),
    "robust": PreferenceLoss(robust, "the same without bias"),
    "ipo": PreferenceLoss(ipo, "a margin to meet, not to pass"),
    "hinge": PreferenceLoss(hinge, "a margin to reach"),
    "sigmoid_norm": PreferenceLoss(sigmoid_norm, "DPO per token"),
    "apo_zero": PreferenceLoss(apo_zero, "chosen up, rejected down"),
    "apo_down": PreferenceLoss(apo_down, "both down, rejected further"),
    "nca": PreferenceLoss(nca, "each reply against the reference"),
    "sppo": PreferenceLoss(sppo, "a margin to meet for each reply"),
    "plackett_luce": PreferenceLoss(plackett_luce, "the whole ranking of a prompt's replies", is_list_wise=True),
    "simpo": PreferenceLoss(simpo, "without a reference", needs_reference=False),
    "orpo": PreferenceLoss(
        orpo, "without a reference, beside the NLL of the chosen reply", needs_reference=False, has_nll=True
    ),
    "kto": PreferenceLoss(kto, "of replies that are labelled, each by itself", of_pairs=False),
}
