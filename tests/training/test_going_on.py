"""A run that goes on is the run that was never stopped, in every line too; and how much a kill can cost."""

import itertools
import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from small_loop import STEPS, NaNFrom, WithMetrics, assert_equal, weights, without_speed

from gpt2ft.checkpoint import CheckpointError, TrainState
from gpt2ft.distributed.signals import Preempted, SignalHandler
from gpt2ft.settings.training import TrainingSettings
from gpt2ft.training import fit as fit_module
from gpt2ft.training.fit import fit


class NaNWithMetrics(NaNFrom):
    metric_names = ("targets",)

    def __init__(self):
        super().__init__({4})

    def metrics(self, log_probs, stream):
        return torch.stack([-0.1 * log_probs.double().sum()])


@pytest.mark.parametrize("stop_after", range(1, STEPS))
def test_a_run_that_goes_on_logs_the_lines_of_one_that_was_never_stopped(stop_after, make_run):
    """Also where it stops between two lines, and with steps left out: to the bit."""
    whole, expected = make_run(NaNWithMetrics(), log_every=4)
    fit(whole, TrainState())
    parts, diary = make_run(NaNWithMetrics(), log_every=4, signal_after=stop_after)
    with pytest.raises(Preempted):
        fit(parts, TrainState())
    saved = TrainState.from_json(json.loads(json.dumps(asdict(diary.saved))))
    fit(replace(parts, signals=SignalHandler()), saved)
    assert without_speed(diary.metrics) == without_speed(expected.metrics)
    assert list(diary.metrics) == [4, 6]
    assert diary.metrics[6]["train/skipped_steps"] == 1


def test_sums_of_other_metrics_are_refused(make_run):
    parts, diary = make_run(WithMetrics(), signal_after=2, log_every=4)
    with pytest.raises(Preempted):
        fit(parts, TrainState())
    with pytest.raises(CheckpointError, match="streams"):
        fit(make_run()[0], diary.saved)


def test_checkpoints_come_by_time_too_unless_their_steps_are_set(make_run, monkeypatch):
    """Every step takes a minute here. They change nothing but what a kill would cost."""
    clock = itertools.count(step=30.0)  # it is asked once, and then twice a step at most
    monkeypatch.setattr(fit_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    inputs, diary = make_run(log_every=100, eval_every=100, save_minutes=70 / 60)
    fit(inputs, TrainState())
    assert [event for event in diary.events if "save" in event] == ["save 3", "save 6"]
    by_steps, other = make_run(log_every=100, eval_every=100, save_every=5)
    fit(by_steps, TrainState())
    assert [event for event in other.events if "save" in event] == ["save 5", "save 6"]
    assert_equal(weights(inputs), weights(by_steps))
    assert without_speed(diary.metrics) == without_speed(other.metrics)
    both, another = make_run(log_every=100, eval_every=100, save_every=5, save_minutes=70 / 60)
    fit(both, TrainState())
    assert [event for event in another.events if "save" in event] == ["save 3", "save 5", "save 6"]


def test_time_counts_by_itself_unless_steps_are_set():
    assert TrainingSettings().seconds_between_saves == 1800
    assert TrainingSettings(save_every=5).seconds_between_saves == math.inf
    assert TrainingSettings(save_every=5, save_minutes=0.5).seconds_between_saves == 30


def test_the_time_of_any_process_has_all_save(make_run):
    inputs, diary = make_run(log_every=100, eval_every=100)
    reduced = []

    def reduce(values, reduction):
        reduced.append(len(values))
        late = torch.zeros_like(values)
        late[-1] = float(len(values) == 3)  # of the other process: [loss, signal, time]
        return values + late

    accelerator = inputs.accelerator
    two = AsOneOfTwo(accelerator, reduce)
    fit(replace(inputs, accelerator=two), TrainState())
    assert [event for event in diary.events if "save" in event] == [f"save {step}" for step in range(1, STEPS + 1)]
    assert reduced == [2, 3] * STEPS  # the counts before a step, sums and flags after it


class AsOneOfTwo:
    """An accelerator that takes itself for one of two processes."""

    num_processes, process_index = 2, 0

    def __init__(self, accelerator, reduce):
        self.accelerator, self.reduce = accelerator, reduce

    def __getattr__(self, name):
        return getattr(self.accelerator, name)
