"""Sums of what is logged: exact means over the steps since the last time, and seconds that count training alone."""

import json
import math
from contextlib import suppress

import pytest
import torch

from gpt2ft.checkpoint import CheckpointError
from gpt2ft.training import metric_sums
from gpt2ft.training.metric_sums import MetricSums

CPU = torch.device("cpu")


class Clock:
    """time.perf_counter of a test: it stands still unless it is moved."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metric_sums, "time", clock)
    return clock


def add(sums, loss, metrics=(), normalizer=1.0, tokens=10, grad_norm=1.0):
    step, counts = (torch.tensor(values, dtype=torch.float64) for values in ((loss, *metrics), (normalizer, tokens)))
    sums.add(step, counts, grad_norm)


def test_means_are_sums_over_normalizers_not_means_of_means(clock):
    sums = MetricSums(CPU, ["margin", "accuracy"], {})
    add(sums, 6.0, [1.0, 2.0], normalizer=2.0, tokens=30, grad_norm=1.5)
    add(sums, 4.0, [5.0, 4.0], normalizer=8.0, tokens=50, grad_norm=0.5)
    clock.now += 4.0
    metrics, seconds_per_step = sums.take()
    assert metrics == {"loss": 1.0, "margin": 0.6, "accuracy": 0.6, "grad_norm": 1.0, "tokens_per_second": 20.0}
    assert seconds_per_step == 2.0


def test_each_line_begins_anew(clock):
    sums = MetricSums(CPU, [], {})
    for loss, seconds in ((3.0, 1.0), (5.0, 2.0)):
        add(sums, loss)
        clock.now += seconds
        metrics, seconds_per_step = sums.take()
        assert (metrics["loss"], metrics["tokens_per_second"], seconds_per_step) == (loss, 10 / seconds, seconds)


def test_a_skipped_step_adds_its_tokens_alone(clock):
    sums = MetricSums(CPU, ["margin"], {})
    add(sums, 2.0, [4.0], normalizer=4.0, tokens=10, grad_norm=3.0)
    for norm in (math.nan, math.inf):
        add(sums, math.nan, [math.nan], normalizer=100.0, tokens=20, grad_norm=norm)
    clock.now += 3.0
    metrics, seconds_per_step = sums.take()
    expected = {"loss": 0.5, "margin": 1.0, "grad_norm": 3.0, "tokens_per_second": 50 / 3}
    assert metrics == pytest.approx(expected)
    assert seconds_per_step == 1.0


def test_without_a_finite_gradient_there_is_no_mean(clock):
    sums = MetricSums(CPU, ["margin"], {})
    add(sums, math.nan, [math.nan], grad_norm=math.nan)
    clock.now += 1.0
    metrics, _ = sums.take()
    assert all(math.isnan(metrics[name]) for name in ("loss", "margin", "grad_norm"))
    assert metrics["tokens_per_second"] == 10.0


def test_seconds_of_other_work_do_not_count(clock):
    sums = MetricSums(CPU, [], {})
    add(sums, 1.0, tokens=12)
    clock.now += 1.0
    with sums.paused():
        clock.now += 1000.0
    clock.now += 2.0
    with suppress(KeyError), sums.paused():  # whatever ends the pause
        clock.now += 1000.0
        raise KeyError
    clock.now += 1.0
    assert sums.take()[0]["tokens_per_second"] == 3.0


def test_sums_that_were_saved_go_on_in_the_next_line_and_speed_begins_anew(clock):
    whole, before = MetricSums(CPU, ["margin"], {}), MetricSums(CPU, ["margin"], {})
    steps = [(0.1, [1 / 3], 0.7, 5, 0.3), (1e9, [1e-9], 1.0, 7, 1 / 7), (math.nan, [0.0], 9.0, 7, math.nan)]
    for step in steps:
        add(whole, *step)
        add(before, *step)
    after = MetricSums(CPU, ["margin"], json.loads(json.dumps(before.to_json())))
    for sums in (whole, after):
        add(sums, 0.2, [0.3], 0.4, 11, 0.5)
    clock.now += 2.0
    expected, found = whole.take()[0], after.take()[0]
    assert (expected.pop("tokens_per_second"), found.pop("tokens_per_second")) == (15.0, 5.5)
    assert found == expected
    assert set(after.to_json().values()) == {0.0}


def test_sums_of_other_metrics_are_refused():
    saved = MetricSums(CPU, ["margin"], {}).to_json()
    with pytest.raises(CheckpointError, match=r"`state.sums` must hold .*, accuracy,|accuracy.*but holds .*margin"):
        MetricSums(CPU, ["accuracy"], saved)
