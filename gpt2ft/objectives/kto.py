"""The objective of labelled replies: the mean loss over them, against how far the model has moved at large.

That baseline is the mean change of all unrelated replies of a step (see data/labelled_replies.py), over all of its
streams and processes, at least 0: an estimate of KL(policy || reference), on which nothing is trained. It is known
before the first loss of a step is computed, so a step takes one more forward pass.

Shape letters: P labelled replies, S supervised targets.
"""

import torch
from torch import Tensor

from gpt2ft.objectives.dpo import reply_log_probs
from gpt2ft.objectives.losses import losses_of
from gpt2ft.preference_losses import LabelledLogProbs
from gpt2ft.settings.training import PreferenceSettings
from gpt2ft.stream import TokenStream


class KTO:
    """The mean loss over all labelled replies of the step."""

    metric_names = ("reward", "margin", "accuracy", "desirable", "divergence", "change_per_token", "length")

    def __init__(self, settings: PreferenceSettings) -> None:
        self.settings = settings

    def normalizer(self, stream: TokenStream) -> float:
        return float(stream.pairs.num_pairs)

    def loss(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        losses = losses_of(self.settings, labelled_log_probs(log_probs, stream))
        # The second term is zero: it keeps a stream without replies connected to the gradient all-reduce.
        return losses.sum().float().to(log_probs.device) + 0.0 * log_probs.sum()

    def metrics(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        """Return sums [7].

        `accuracy` counts replies that have changed more than the baseline, or less if undesirable; a tie is one half.
        """
        replies, beta = labelled_log_probs(log_probs.detach(), stream), self.settings.beta
        margins = replies.signs * (replies.changes - replies.baseline)
        lengths = stream.pairs.lengths.double()[stream.pairs.index[: stream.pairs.num_pairs, 0]]
        baselines = replies.baseline + torch.zeros_like(margins)
        values = [beta * replies.changes, beta * margins, (margins.sign() + 1) / 2, (replies.signs + 1) / 2]
        return torch.stack([*values, baselines, replies.changes / lengths, lengths]).sum(1)

    def baseline(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        _, unrelated = _changes(log_probs, stream)
        return torch.stack([unrelated.sum(), torch.ones_like(unrelated).sum()])


def labelled_log_probs(log_probs: Tensor, stream: TokenStream) -> LabelledLogProbs:
    """Return what the loss is told of a stream's replies, from the log-probs of its targets [S]."""
    labelled, _ = _changes(log_probs, stream)
    signs = stream.pairs.weights[: stream.pairs.num_pairs].double().sign()
    return LabelledLogProbs(labelled, signs, stream.pairs.baseline)


def _changes(log_probs: Tensor, stream: TokenStream) -> tuple[Tensor, Tensor]:
    """Return [P] how far labelled replies, and the unrelated ones beside them, have moved from the reference."""
    changes = reply_log_probs(log_probs, stream) - stream.pairs.reference
    return changes[stream.pairs.index[: stream.pairs.num_pairs]].unbind(1)
