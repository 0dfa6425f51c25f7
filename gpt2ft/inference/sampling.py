"""Which token comes next. Shape letters: B sequences, V rows of the vocabulary."""

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2ft.random import generator

EXTREME = 1e20  # what lies beyond this, or below its inverse, counts as this: float32 holds its products


@dataclass(frozen=True)
class Sampling:
    """How one sequence chooses its tokens. The steps come in this order, each on what the one before left.

    repetition_penalty: divides positive and multiplies negative logits of content that stands in the prompt or the
        reply (Keskar et al. 2019, "CTRL", section 4.1); 1 is off. Control tokens are never penalised: a model that
        was told off for the `<|end|>` of earlier turns would not stop any more.
    temperature: divides the logits; 0 always takes the likeliest token and leaves out the steps below.
    top_k: keeps this many of the likeliest tokens, and those that equal the last of them; 0 is off.
    top_p: keeps the fewest of the likeliest tokens that together have this probability (Holtzman et al. 2019, "The
        Curious Case of Neural Text Degeneration"); 1 is off.
    min_p: keeps tokens with at least this share of the likeliest one's probability (Nguyen et al. 2024, "Turning Up
        the Heat: Min-p Sampling"); 0 is off.
    seed: the same seed gives the same reply, whichever sequences are decoded beside it; None draws one.

    Raises:
        ValueError: with a line for each value that is out of its range.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = [
            ("temperature", "a finite number of at least 0", _is_number(self.temperature) and self.temperature >= 0),
            ("top_k", "a whole number of at least 0", _is_whole(self.top_k) and self.top_k >= 0),
            ("top_p", "a number above 0 and at most 1", _is_number(self.top_p) and 0 < self.top_p <= 1),
            ("min_p", "a number from 0 to 1", _is_number(self.min_p) and 0 <= self.min_p <= 1),
            (
                "repetition_penalty",
                "a finite number above 0",
                _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            ),
            ("seed", "a whole number or None", self.seed is None or _is_whole(self.seed)),
        ]
        problems = [
            f"`{name}` must be {rule}, but is {getattr(self, name)!r}" for name, rule, holds in rules if not holds
        ]
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def leaves_out(self) -> bool:
        """Whether any token is left out for being unlikely."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


GREEDY = Sampling(temperature=0)


class Sampler:
    """What one sequence brings to each choice: its `Sampling`, its content so far, random numbers of its own."""

    def __init__(self, sampling: Sampling, content_ids: Sequence[int]) -> None:
        self.sampling = sampling
        self.content_ids = list(content_ids)
        self._random = generator(secrets.randbits(63) if sampling.seed is None else sampling.seed, "sampling")

    def uniform(self) -> float:
        """The next random number from [0, 1): one for each token."""
        return self._random.random()


def next_ids(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """The next id of each sequence, [B].

    Args:
        logits: floating point [B, V], minus infinity for ids that must not be said.
        samplers: B of them; each draws one number.
    """
    chances = probabilities(penalized(logits, samplers), [sampler.sampling for sampler in samplers])
    return inverse_cdf(chances, [sampler.uniform() for sampler in samplers])


def penalized(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """logits [B, V] after each sequence's repetition penalty."""
    logits = logits.clone()
    for row, sampler in zip(logits, samplers, strict=True):
        penalty = _bounded(sampler.sampling.repetition_penalty)
        if penalty != 1 and sampler.content_ids:
            ids = torch.tensor(sampler.content_ids, device=row.device)
            old = row[ids]
            row[ids] = torch.where(old < 0, old * penalty, old / penalty)
    return logits


def probabilities(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """logits [B, V] -> the probability with which each id is taken, [B, V]: 0 for what a step has left out."""
    likeliest = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    are_greedy = [sampling.temperature == 0 for sampling in samplings]
    if all(are_greedy):
        return likeliest
    temperatures = torch.tensor([_bounded(sampling.temperature) for sampling in samplings]).to(logits)
    scores = (logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]
    rows = [row for row, sampling in enumerate(samplings) if sampling.leaves_out and not are_greedy[row]]
    if rows:
        left_out = ~_kept(scores[rows], [samplings[row] for row in rows])
        scores[rows] = scores[rows].masked_fill(left_out, -torch.inf)
    return torch.where(torch.tensor(are_greedy, device=logits.device)[:, None], likeliest, scores.softmax(-1))


def _kept(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """bool [B, V]: what top-k, top-p and min-p leave of each row. Of equal scores the lower ids come first.

    Only the scores are sorted, and not the ids with them: what is kept of a sorted row is its beginning, so that its
    length and the last score in it say it all.
    """
    most = scores.shape[-1]
    ordered = _descending(scores)
    last_kept = torch.tensor([min(s.top_k or most, most) - 1 for s in samplings], device=scores.device)[:, None]
    top_p, min_p = torch.tensor([_parameters(sampling) for sampling in samplings]).to(scores).split(1, dim=-1)
    masses = ordered.masked_fill(ordered < ordered.gather(-1, last_kept), -torch.inf).softmax(-1)
    above = masses.cumsum(-1) - masses  # how probable the likelier ones are together
    is_kept = (masses > 0) & (above < top_p) & (masses >= min_p * masses[:, :1])
    num_kept = is_kept.sum(-1, keepdim=True)
    last = ordered.gather(-1, num_kept - 1)
    kept = scores >= last
    surplus = kept.sum(-1) - num_kept[:, 0]
    for row in surplus.nonzero()[:, 0].tolist():
        ties = (scores[row] == last[row]).nonzero()[:, 0]
        kept[row, ties[len(ties) - int(surplus[row]) :]] = False
    return kept


def _descending(scores: Tensor) -> Tensor:
    """Each row sorted. NumPy does that many times faster than torch, which on a CPU cannot but sort the ids too."""
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return scores.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)


def _parameters(sampling: Sampling) -> tuple[float, float]:
    """Top-p and min-p; off is a top-p that no sum of rounded probabilities reaches."""
    return max(sampling.top_p, 1 / EXTREME) if sampling.top_p < 1 else 2.0, sampling.min_p


def _bounded(value: float) -> float:
    return min(max(value, 1 / EXTREME), EXTREME)


def inverse_cdf(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The id at which the sum of `probabilities` [B, V], in the order of the ids, passes each number from [0, 1).

    In the order of the ids, because rounding hardly moves that sum, while it may swap ids in the order of probability.
    """
    sums = probabilities.cumsum(-1).masked_fill(probabilities == 0, 0.0)  # what has no probability passes nothing
    total = sums.amax(-1, keepdim=True)
    uniform = torch.tensor(uniforms, dtype=sums.dtype, device=sums.device)[:, None]
    quantile = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return (sums > quantile).int().argmax(-1)  # the first
