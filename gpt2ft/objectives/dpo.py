"""The preference objective: the mean loss over pairs of replies, and the metrics of each pair.

Shape letters: P pairs, R replies, S supervised targets.
"""

import torch
from torch import Tensor

from gpt2ft.objectives.losses import pair_losses
from gpt2ft.preference_losses import PairLogProbs
from gpt2ft.settings.training import PreferenceSettings
from gpt2ft.stream import TokenStream


def pair_metrics(settings: PreferenceSettings, pairs: PairLogProbs) -> dict[str, Tensor]:
    """Return metrics by name, [P] each: one value for each pair.

    A reward is beta times the change from the reference; without a reference, beta times the log-prob per token.
    `accuracy` counts a tie as one half, so it starts there. `both_fall` is likelihood displacement: chosen and rejected
    reply have both become less likely (Razin et al. 2024).
    """
    if settings.needs_reference:
        chosen, rejected = pairs.chosen_change, pairs.rejected_change
    else:
        chosen, rejected = pairs.chosen_mean, pairs.rejected_mean
    metrics = {
        "reward_chosen": settings.beta * chosen,
        "reward_rejected": settings.beta * rejected,
        "margin": settings.beta * (chosen - rejected),
        "accuracy": _is_above(chosen, rejected),
        "likelier": _is_above(pairs.chosen_mean, pairs.rejected_mean),
    }
    if settings.needs_reference:
        metrics["chosen_change_per_token"] = pairs.chosen_change / pairs.chosen_lengths
        metrics["rejected_change_per_token"] = pairs.rejected_change / pairs.rejected_lengths
        metrics["both_fall"] = ((pairs.chosen_change < 0) & (pairs.rejected_change < 0)).to(chosen.dtype)
    return metrics | {"chosen_length": pairs.chosen_lengths, "rejected_length": pairs.rejected_lengths}


def _is_above(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 where a > b, 1/2 where they are equal, else 0."""
    return (torch.sign(a - b) + 1) / 2


class DPO:
    """The mean loss over all pairs of the step, each with its weight."""

    baseline = None

    def __init__(self, settings: PreferenceSettings) -> None:
        self.settings = settings
        any_pairs = PairLogProbs(*torch.ones(6, 1))  # the names do not depend on them
        self.metric_names = tuple(pair_metrics(settings, any_pairs))

    def normalizer(self, stream: TokenStream) -> float:
        return float(stream.pairs.weights.double().sum())

    def loss(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        losses = pair_losses(self.settings, pair_log_probs(log_probs, stream, self.settings.ld_alpha))
        # The second term is zero: it keeps a stream without pairs connected to the gradient all-reduce.
        return (_weights(stream) * losses).sum().float().to(log_probs.device) + 0.0 * log_probs.sum()

    def metrics(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        metrics = pair_metrics(self.settings, pair_log_probs(log_probs.detach(), stream, self.settings.ld_alpha))
        return torch.stack([(_weights(stream) * values).sum() for values in metrics.values()])


def pair_log_probs(log_probs: Tensor, stream: TokenStream, ld_alpha: float = 1.0) -> PairLogProbs:
    """Return the log-probs of a stream's pairs from those of its targets [S], the tail left out.

    In float64, so beside Apple's GPUs on the CPU: log-probs of whole replies are large, and their differences small.

    Args:
        ld_alpha: how much the tokens count by which a reply is longer than the other, under the policy and under the
            reference alike. Liu et al. 2024, "Length desensitization in DPO".
    """
    ignored = (0.0, 0.0)
    if ld_alpha < 1:
        tails = tail_log_probs(log_probs, stream) - stream.pairs.reference_tails[: stream.pairs.num_pairs]
        ignored = ((1 - ld_alpha) * tails).unbind(1)
    replies = reply_log_probs(log_probs, stream)
    chosen, rejected = stream.pairs.index[: stream.pairs.num_pairs].unbind(1)
    reference, lengths = stream.pairs.reference, stream.pairs.lengths.double()
    return PairLogProbs(
        replies[chosen],
        replies[rejected],
        reference[chosen],
        reference[rejected],
        lengths[chosen],
        lengths[rejected],
        *ignored,
        rankings=stream.pairs.rankings[: stream.pairs.num_pairs],
        chosen_replies=chosen,
    )


def tail_log_probs(log_probs: Tensor, stream: TokenStream) -> Tensor:
    """Return [P, 2] float64, for both replies of each pair the log-prob of the tokens by which it is longer.

    By a product with 0 and 1, as sums of stretches by differences of running sums are not deterministic on CUDA.
    """
    log_probs, stream = _beside_pairs(log_probs, stream)
    lengths = stream.pairs.lengths.long()
    within = torch.arange(len(stream.groups), device=lengths.device) - (lengths.cumsum(0) - lengths)[stream.groups]
    index = stream.pairs.index[: stream.pairs.num_pairs]
    shorter = lengths[index].amin(1)[:, None, None]
    is_tail = (stream.groups == index[..., None]) & (within >= shorter)  # [P, 2, S]
    return is_tail.double() @ (stream.weights * log_probs).double()


def reply_log_probs(log_probs: Tensor, stream: TokenStream) -> Tensor:
    """Return the log-prob of each whole reply, [R] float64, from those of the targets [S]."""
    log_probs, stream = _beside_pairs(log_probs, stream)
    counted = (stream.weights * log_probs).double()
    return torch.zeros_like(stream.pairs.reference).index_add(0, stream.groups, counted)


def _beside_pairs(log_probs: Tensor, stream: TokenStream) -> tuple[Tensor, TokenStream]:
    """Return both where the pairs lie: see `TokenStream.to`."""
    device = stream.pairs.reference.device
    return log_probs.to(device), stream.to(device)


def _weights(stream: TokenStream) -> Tensor:
    return stream.pairs.weights[: stream.pairs.num_pairs].double()
