"""Supervised fine-tuning: the mean negative log-likelihood per unit of supervised weight."""

from torch import Tensor

from gpt2ft.stream import TokenStream


class SFT:
    """loss = - sum w log p / sum w over all targets of the step."""

    def count(self, stream: TokenStream) -> float:
        return float(stream.weights.double().sum())

    def loss(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        return -(stream.weights * log_probs).sum()
