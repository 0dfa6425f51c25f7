"""The next token of each sequence, drawn from the model's logits.

The steps come in this order, each on what the one before has left (`SamplingSettings`):

    repetition_penalty   divides positive and multiplies negative logits of content that stands in the prompt or the
                         reply (Keskar et al. 2019, "CTRL", section 4.1). Control tokens are never penalised: with the
                         `<|end|>` of earlier turns penalised, a model would not stop any more.
    temperature          divides the logits; 0 always takes the likeliest token and leaves out the steps below
    top_k                keeps this many of the likeliest tokens, and those that equal the last of them
    top_p                keeps the fewest of the likeliest tokens that together have this probability (Holtzman et al.
                         2019, "The Curious Case of Neural Text Degeneration")
    min_p                keeps tokens with at least this share of the likeliest one's probability (Nguyen et al. 2024,
                         "Turning Up the Heat: Min-p Sampling")

A seed gives the same reply, whichever sequences are decoded beside it. Shape letters: B sequences, V rows of the
vocabulary.
"""

import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gpt2ft.device import to_device
from gpt2ft.random import generator
from gpt2ft.settings.sections import SamplingSettings

EXTREME = 1e20  # larger values, and those below its inverse, count as this: float32 holds their products

GREEDY = SamplingSettings(temperature=0)


class Sampler:
    """The state of one sequence: its settings, the ids of its content so far, random numbers of its own."""

    def __init__(self, settings: SamplingSettings, content_ids: Sequence[int]) -> None:
        self.settings = settings
        self.content_ids = list(content_ids)
        self._random = generator(secrets.randbits(63) if settings.seed is None else settings.seed, "sampling")

    def uniform(self) -> float:
        """Draw a number from [0, 1): one for each token."""
        return self._random.random()


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Draw the next id of each sequence, [B].

    Args:
        logits: floating point [B, V], minus infinity for ids that must not be sampled.
        samplers: B of them; each draws one number, unless all take the likeliest.
    """
    logits, settings = penalized(logits, samplers), [sampler.settings for sampler in samplers]
    if all(one.temperature == 0 for one in settings):
        return logits.argmax(-1)
    return sample_by_inverse_cdf(probabilities(logits, settings), [sampler.uniform() for sampler in samplers])


def penalized(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """logits [B, V] after each sequence's repetition penalty."""
    penalties = [_bounded(sampler.settings.repetition_penalty) for sampler in samplers]
    repeated = [(row, id) for row, one in enumerate(samplers) if penalties[row] != 1 for id in one.content_ids]
    if not repeated:
        return logits
    index = to_device(repeated, logits.device).unbind(1)
    penalty, old = to_device(penalties, logits.device, logits.dtype)[index[0]], logits[index]
    return logits.index_put(index, torch.where(old < 0, old * penalty, old / penalty))


def probabilities(logits: Tensor, settings: Sequence[SamplingSettings]) -> Tensor:
    """logits [B, V] -> the probability of each id, [B, V]: 0 for what a step has left out."""
    device, are_greedy = logits.device, [one.temperature == 0 for one in settings]
    temperatures = to_device([_bounded(one.temperature) for one in settings], device, logits.dtype)
    scores = (logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]
    rows = [row for row, one in enumerate(settings) if _truncates(one) and not are_greedy[row]]
    if rows:
        index = to_device(rows, device)
        truncated = scores[index]
        scores[index] = truncated.masked_fill(~_kept(truncated, [settings[row] for row in rows]), -torch.inf)
    shaped = scores.softmax(-1)
    if any(are_greedy):
        likeliest = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        shaped = torch.where(to_device(are_greedy, device)[:, None], likeliest, shaped)
    return shaped


def _truncates(settings: SamplingSettings) -> bool:
    """True if unlikely tokens are left out."""
    return settings.top_k > 0 or settings.top_p < 1 or settings.min_p > 0


def _kept(scores: Tensor, settings: Sequence[SamplingSettings]) -> Tensor:
    """bool [B, V]: the ids that top-k, top-p and min-p keep. Of equal scores the lower ids come first.

    Only the scores are sorted, not the ids with them: the kept ones are the beginning of a sorted row, so their number
    and the last score among them are enough.
    """
    most, device = scores.shape[-1], scores.device
    ordered = _descending(scores)
    last_kept = to_device([min(one.top_k or most, most) - 1 for one in settings], device)[:, None]
    top_p, min_p = to_device(list(map(_top_p_and_min_p, settings)), device, scores.dtype).split(1, dim=-1)
    masses = ordered.masked_fill(ordered < ordered.gather(-1, last_kept), -torch.inf).softmax(-1)
    above = masses.cumsum(-1) - masses  # how probable the likelier ones are together
    is_kept = (masses > 0) & (above < top_p) & (masses >= min_p * masses[:, :1])
    num_kept = is_kept.sum(-1, keepdim=True)
    last = ordered.gather(-1, num_kept - 1)
    likelier, equal = scores > last, scores == last
    return likelier | (equal & (equal.cumsum(-1) <= num_kept - likelier.sum(-1, keepdim=True)))


def _descending(scores: Tensor) -> Tensor:
    """Sort each row. NumPy is many times faster than torch, which on a CPU sorts the ids along."""
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return scores.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)


def _top_p_and_min_p(settings: SamplingSettings) -> tuple[float, float]:
    """Both as they are compared; a top-p that is off becomes one that no sum of rounded probabilities reaches."""
    return max(settings.top_p, 1 / EXTREME) if settings.top_p < 1 else 2.0, settings.min_p


def _bounded(value: float) -> float:
    return min(max(value, 1 / EXTREME), EXTREME)


def sample_by_inverse_cdf(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Take the id [B] at which the running sum of `probabilities` [B, V] passes each number from [0, 1).

    The sum runs in the order of the ids, where rounding hardly moves it; in the order of probability, rounding may swap
    ids.
    """
    sums = probabilities.cumsum(-1).masked_fill(probabilities == 0, 0.0)  # what has no probability passes nothing
    total = sums.amax(-1, keepdim=True)
    uniform = to_device(uniforms, sums.device, sums.dtype)[:, None]
    quantile = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return (sums > quantile).int().argmax(-1)  # the first
