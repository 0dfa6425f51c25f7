"""Which token comes next. Shape letters: B sequences, V rows of the vocabulary."""

from torch import Tensor


def greedy(logits: Tensor) -> Tensor:
    """logits [B, V] -> the likeliest ids [B]."""
    return logits.argmax(-1)
