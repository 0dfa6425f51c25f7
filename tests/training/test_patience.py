"""Runs that end early: at the same step whatever happens to them, saved and logged as after a last step."""

import json
import math
from dataclasses import asdict, replace

import pytest
from small_loop import assert_equal, weights, without_speed

from gpt2ft.checkpoint import TrainState
from gpt2ft.distributed.signals import Preempted, SignalHandler
from gpt2ft.training.evaluate import EvaluationInterrupted
from gpt2ft.training.fit import fit

LOSSES = {1: 5.0, 2: 4.0, 3: 4.5, 4: 4.0, 5: 3.0, 6: 2.0}  # the best of step 2 is not bettered in 3 and 4


@pytest.fixture
def make_impatient(make_run):
    settings = {"eval_every": 1, "save_every": 100, "log_every": 3, "patience": 2}

    def make(losses=LOSSES, **training):
        return make_run(losses=losses, **(settings | training))

    return make


def again(diary):
    """The state as the newest checkpoint has it."""
    return TrainState.from_json(json.loads(json.dumps(asdict(diary.saved))))


def test_a_run_ends_after_so_many_evaluations_that_were_no_better(make_impatient):
    inputs, diary = make_impatient()
    state = fit(inputs, TrainState())
    assert (state.step, state.best_step, state.best_loss, state.evaluations_since_best) == (4, 2, 4.0, 2)
    assert diary.events[-4:] == ["evaluate 3", "evaluate 4", "log 4", "save 4"]
    assert replace(diary.saved, sums={}) == state
    assert diary.saved.sums["updates"] == 0  # all of them are logged
    rest, other = make_impatient(patience=None)
    fit(rest, TrainState())
    rates = [run.metrics[3]["train/learning_rate"] for run in (diary, other)]
    assert rates[0] == rates[1]  # the schedule is that of all steps
    assert other.metrics[6]["train/learning_rate"] < diary.metrics[4]["train/learning_rate"] < rates[0]


@pytest.mark.parametrize(
    ("losses", "patience", "last"),
    [
        (LOSSES, 1, 3),
        (LOSSES, 3, 6),
        ({step: 7.0 - step for step in range(1, 7)}, 1, 6),
        (dict.fromkeys(range(1, 7), math.nan), 3, 3),
        ({}, 1, 6),  # without held-out data
        ({1: 1.0, 2: 2.0, 3: 0.5, 4: 2.0, 5: 0.4, 6: 2.0}, 2, 6),  # in a row
        ({5: 1.0, 6: 2.0}, 1, 6),
    ],
)
def test_where_a_run_ends(losses, patience, last, make_impatient):
    inputs, diary = make_impatient(losses, patience=patience)
    assert fit(inputs, TrainState()).step == last
    assert diary.events.count(f"save {last}") == diary.events.count(f"log {last}") == 1


def test_evaluations_are_counted_and_not_steps(make_impatient):
    inputs, _ = make_impatient({2: 1.0, 4: 2.0, 6: 3.0}, patience=1, eval_every=2)
    assert fit(inputs, TrainState()).step == 4


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_a_run_that_is_stopped_ends_at_the_same_step_in_the_same_bits(stop_after, make_impatient):
    whole, expected = make_impatient()
    end = fit(whole, TrainState())
    parts, diary = make_impatient()
    diary.signal_after = stop_after
    with pytest.raises(Preempted):
        fit(parts, TrainState())
    assert fit(replace(parts, signals=SignalHandler()), again(diary)) == end
    assert_equal(weights(parts), weights(whole))
    assert without_speed(diary.metrics) == without_speed(expected.metrics)
    assert replace(again(diary), sums={}) == end


def test_an_evaluation_that_was_cut_short_ends_it_after_the_resume(make_impatient):
    inputs, diary = make_impatient(save_every=1)

    def interrupted(step):
        if step == 4:
            raise EvaluationInterrupted
        return LOSSES[step]

    with pytest.raises(Preempted):
        fit(replace(inputs, evaluate=interrupted), TrainState())
    state = fit(inputs, again(diary))
    assert (state.step, state.evaluated_step) == (4, 4)
    assert replace(again(diary), sums={}) == state
    assert list(diary.metrics) == [3, 4]


def test_a_run_that_had_ended_trains_no_further(make_impatient):
    """It was killed before its model was exported."""
    inputs, diary = make_impatient()
    state = fit(inputs, TrainState())
    diary.events.clear()
    assert fit(inputs, again(diary)) == state
    assert diary.advanced == 4
    assert diary.events == ["save 4"]
    more, _ = make_impatient(patience=9)
    assert fit(more, state).step == 6  # but more patience has it go on


def test_the_result_of_an_evaluation_after_a_resume_is_saved(make_impatient):
    """Also after the last step, where no step follows that would."""
    inputs, diary = make_impatient({6: 1.0}, patience=None)
    state = fit(inputs, TrainState(step=6, updates=6))
    assert (state.evaluated_step, state.best_step) == (6, 6)
    assert again(diary).best_step == 6
