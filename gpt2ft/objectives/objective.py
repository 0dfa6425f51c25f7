"""The interface between the training loop and an objective: a loss as a sum, and the normalizer of that sum.

    loss of a step  =  sum of `loss` over all its streams  /  sum of `normalizer` over all its streams

Sums and normalizers are added up over processes before they are divided, so a mean never depends on how a step is cut.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from gpt2ft.stream import TokenStream


class Objective(Protocol):
    """One thing to train for. Shape letters: S supervised targets, M metrics."""

    metric_names: tuple[str, ...]  # [M] of what is logged besides the loss
    # What a stream adds to a mean over the whole step, as sum and count in float64 [2]. Losses are measured against it,
    # or against 0 where it is below: `stream.pairs.baseline`, which has no gradient. None where there is none.
    baseline: Callable[[Tensor, TokenStream], Tensor] | None

    def normalizer(self, stream: TokenStream) -> float:
        """Return how much a stream, still on the CPU, adds to the normalizer: known before the model runs."""

    def loss(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        """Return the sum of a stream's losses, a scalar, from the log-prob of each target [S]."""

    def metrics(self, log_probs: Tensor, stream: TokenStream) -> Tensor:
        """Return sums [M], to be normalized like the loss. They are logged; nothing is trained on them."""
