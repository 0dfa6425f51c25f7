"""Intervals that cover what they estimate in 95 of 100 samples: of shares, and of whatever sums give.

A seed gives the same interval each time.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from gpt2ft.random import generator
from gpt2ft.report.schema import CONFIDENCE, Estimate, Metric

RESAMPLES = 2000
FEWEST = 6  # things: all resamples of fewer lie within a range that holds the truth in less than 95 of 100 samples
_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf((1 + CONFIDENCE) / 2)


def share(hits: int, count: int) -> Metric:
    """Return the share of hits with its interval (Wilson 1927), which also holds for no hit and for hits alone."""
    value, width = hits / count, _Z**2 / count
    centre = (value + width / 2) / (1 + width)
    half = _Z / (1 + width) * float(np.sqrt(value * (1 - value) / count + width / count / 4))
    low, high = min(value, centre - half), max(value, centre + half)  # equal but for rounding
    return {"value": value, "low": max(0.0, low), "high": min(1.0, high), "count": count}


def mean(values: Sequence[float], seed: int) -> Metric:
    """Return the mean of some values with its interval; where all are 0 or 1, as a share."""
    if all(value in (0, 1) for value in values):
        return share(round(sum(values)), len(values))
    columns = np.stack([np.asarray(values, np.float64), np.ones(len(values))], axis=1)
    return {**bootstrap(columns, lambda sums: sums[..., 0] / sums[..., 1], seed), "count": len(values)}


def bootstrap(columns: NDArray[np.float64], statistic: Callable[[NDArray], NDArray], seed: int) -> Estimate:
    """Return what `statistic` makes of the sums of n things drawn at random, with the interval of the percentiles.

    The percentiles lie further out the fewer things there are, as those of Student's t do: see Hesterberg 2015, "What
    teachers should know about the bootstrap", 5.3.

    Args:
        columns: [n, k] what is added up of each thing; drawn together, so that models are compared on the same things.
        statistic: [..., k] -> [...]
    """
    count = len(columns)
    random = generator(seed, "bootstrap")
    at_once = max(1, 10_000_000 // count)
    sums = [
        random.multinomial(count, np.full(count, 1 / count), min(at_once, RESAMPLES - done)) @ columns
        for done in range(0, RESAMPLES, at_once)
    ]
    tail = _NORMAL.cdf(-_student(count - 1) * np.sqrt(count / max(1, count - 1)))
    low, high = np.quantile(statistic(np.concatenate(sums)), [tail, 1 - tail]).tolist()
    return {"value": float(statistic(columns.sum(axis=0))), "low": low, "high": high}


def _student(freedom: int) -> float:
    """Return the quantile of Student's t, from that of the normal distribution (Abramowitz and Stegun, 26.7.5)."""
    z, n = _Z, max(1, freedom)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
