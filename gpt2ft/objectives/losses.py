"""The preference loss that settings name, and where it starts."""

import torch
from torch import Tensor

from gpt2ft.preference_losses import PREFERENCE_LOSSES, LabelledLogProbs, PairLogProbs
from gpt2ft.settings.training import PreferenceSettings


def losses_of(settings: PreferenceSettings, replies: PairLogProbs | LabelledLogProbs) -> Tensor:
    """Return [P] the loss of each pair, or of each labelled reply."""
    loss = PREFERENCE_LOSSES[settings.loss]
    return loss.function(replies, **{name: getattr(settings, name) for name in loss.arguments})


def pair_losses(settings: PreferenceSettings, pairs: PairLogProbs) -> Tensor:
    """Return [P] the loss of each pair, with `rpo_alpha` times the NLL per token of the chosen reply.

    The added term is that of Pang et al. 2024, "Iterative reasoning preference optimization", eq. 1.
    """
    losses = losses_of(settings, pairs)
    return losses - settings.rpo_alpha * pairs.chosen_mean if settings.rpo_alpha else losses


def start_loss(settings: PreferenceSettings) -> float | None:
    """Return the loss where policy and reference are equal; None where it depends on the data."""
    chosen, rejected = torch.tensor([[-5.0, -40.0, -9.0], [-30.0, -8.0, -9.0]], dtype=torch.float64)
    chosen_lengths, rejected_lengths = torch.tensor([[3.0, 20.0, 4.0], [17.0, 2.0, 5.0]])
    one_ranking = torch.tensor([0, 0, 1])  # of two pairs, and one of one
    pairs = PairLogProbs(
        *(chosen, rejected, chosen, rejected, chosen_lengths, rejected_lengths),
        rankings=one_ranking,
        chosen_replies=one_ranking,
    )
    if PREFERENCE_LOSSES[settings.loss].of_pairs:
        losses = pair_losses(settings, pairs)
    else:
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
        losses = losses_of(settings, LabelledLogProbs(torch.zeros_like(signs), signs, 0.0))
    return float(losses[0]) if torch.allclose(losses, losses[:1]) else None
