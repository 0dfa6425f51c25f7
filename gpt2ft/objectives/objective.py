"""What the loop asks of an objective: a loss as a sum, and what the sum is to be divided by."""

from typing import Protocol

from torch import Tensor

from gpt2ft.stream import TokenStream


class Objective(Protocol):
    """One thing to train for. The loss of a step is the sum over all its streams / the count over all of them."""

    names: tuple[str, ...]  # of what is measured besides the loss

    def count(self, stream: TokenStream) -> float:
        """What a stream adds to the divisor, known before the model runs."""

    def loss(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        """log_probs [S] of a stream -> its sum of losses, a scalar."""

    def measure(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        """log_probs [S] of a stream -> [len(names)] sums in float64, divided like the loss, for people alone."""
