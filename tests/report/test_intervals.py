"""Intervals cover what they claim to, in samples whose truth is known."""

import numpy as np
import pytest

from gpt2ft.report import intervals
from gpt2ft.report.intervals import bootstrap, mean, share

SAMPLES = 100


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 600)


def covered(estimates, truth):
    return sum(estimate["low"] <= truth <= estimate["high"] for estimate in estimates)


@pytest.mark.parametrize(("probability", "count"), [(0.5, 30), (0.9, 30), (0.1, 100)])
def test_shares_are_covered(probability, count):
    random = np.random.default_rng(3)
    hits = random.binomial(count, probability, 10 * SAMPLES).tolist()
    assert 900 <= covered([share(number, count) for number in hits], probability) <= 990


@pytest.mark.parametrize("count", [10, 30, 200])
def test_means_are_covered(count):
    random = np.random.default_rng(4)
    assert 90 <= covered([mean(random.normal(3, 2, count).tolist(), 0) for _ in range(SAMPLES)], 3) <= 99


@pytest.mark.parametrize("count", [10, 50])
def test_paired_differences_are_covered_and_narrower_than_unpaired_ones(count):
    """Losses of two models on conversations of which some are harder than others, to both."""
    random = np.random.default_rng(5)
    paired, unpaired = [], []
    for number in range(SAMPLES):
        tokens = random.integers(20, 300, count)
        hard = random.normal(2, 0.5, count)
        one, other = (tokens * (hard + gain + random.normal(0, 0.1, count)) for gain in (0, -0.3))
        columns = np.stack([one, other, tokens], axis=1)
        paired.append(bootstrap(columns, lambda sums: (sums[..., 1] - sums[..., 0]) / sums[..., 2], number))
        unpaired.append(bootstrap(columns, lambda sums: sums[..., 1] / sums[..., 2], number))
    assert 90 <= covered(paired, -0.3) <= 99
    width = [sum(estimate["high"] - estimate["low"] for estimate in found) for found in (paired, unpaired)]
    assert width[0] < width[1] / 2


def test_what_is_known_by_hand():
    assert share(0, 10)["low"] == 0
    assert share(0, 10)["high"] == pytest.approx(0.2775, abs=1e-4)  # Wilson's, from any table
    assert share(10, 10)["high"] == share(10, 10)["value"] == 1
    assert mean([True, False, True, True], 0) == share(3, 4)
    assert mean([2.0, 2.0, 2.0], 0) == {"value": 2.0, "low": 2.0, "high": 2.0, "count": 3}
    assert mean([5.0], 0)["value"] == 5.0


def test_the_seed_decides():
    values = np.random.default_rng(0).normal(0, 1, 20).tolist()
    assert mean(values, 1) == mean(values, 1) != mean(values, 2)


def test_many_things_are_drawn_in_parts(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 7)
    columns = np.ones((3_000_000, 1))
    assert bootstrap(columns, lambda sums: sums[..., 0], 0) == {"value": 3e6, "low": 3e6, "high": 3e6}
