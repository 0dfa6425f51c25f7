"""Supervised fine-tuning: the mean negative log-likelihood per unit of supervised weight.

As torch's cross_entropy has it with weights: the sum of w * nll is divided by the sum of w and not by the tokens, so a
step is as long whether its weights are high or low, and only their ratios count.
"""

from torch import Tensor

from gpt2ft.stream import TokenStream


class SFT:
    """loss = - sum w log p / sum w over all targets of the step."""

    metric_names = ()
    baseline = None

    def normalizer(self, stream: TokenStream) -> float:
        return float(stream.weights.double().sum())

    def loss(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        return -(stream.weights * log_probs).sum()

    def metrics(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        return log_probs.new_zeros(0)
