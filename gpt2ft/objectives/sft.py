"""Supervised fine-tuning: the mean negative log-likelihood per unit of supervised weight."""

import torch
from torch import Tensor

from gpt2ft.stream import TokenStream


class SFT:
    """loss = - sum w log p / sum w over all targets of the step."""

    metric_names = ()

    def normalizer(self, stream: TokenStream) -> float:
        return float(stream.weights.double().sum())

    def loss(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        return -(stream.weights * log_probs).sum()

    def metrics(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        return torch.zeros(0, dtype=torch.float64, device=log_probs.device)
