"""Small data: settings that suit them are filled in, and what a run says of itself beforehand."""

from types import SimpleNamespace

import pytest

from gpt2ft.runs.describe import few_steps_warning
from gpt2ft.runs.duration import estimate_seconds, spoken
from gpt2ft.runs.run_setup import for_model, for_plan
from gpt2ft.settings.parsing import parse_recipe
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.settings.training import TrainingSettings


def parse(recipe, *words):
    return parse_recipe(SFTSettings, "", [recipe, "--data.train", "mine.jsonl", *map(str, words)])


@pytest.mark.parametrize(("width", "rate", "steps"), [(64, 1e-3, 240), (256, 1e-3, 240), (768, 3.33e-4, 80)])
def test_rate_and_steps_suit_the_model_unless_they_are_given(width, rate, steps):
    suited = for_model(parse("my-data"), width)
    assert suited.optimizer.learning_rate == pytest.approx(rate, rel=1e-2)
    assert suited.training.min_steps == steps
    given = for_model(parse("my-data", "--training.min_steps", 0, "--optimizer.learning_rate", 3e-5), width)
    assert (given.optimizer.learning_rate, given.training.min_steps) == (3e-5, 0)
    assert for_model(parse("oasst-gpt2"), width) == parse("oasst-gpt2")


def test_what_is_passed_over_many_times_is_evaluated_twice():
    settings = parse("my-data")
    one, many = SimpleNamespace(epochs=1, steps=300), SimpleNamespace(epochs=120, steps=241)
    assert for_plan(settings, one, has_held_out=True) == settings
    assert for_plan(settings, many, has_held_out=True).training.eval_every == 121
    assert for_plan(settings, many, has_held_out=False).training.save_every == 121
    asked = parse("my-data", "--training.eval_every", 50)
    assert for_plan(asked, many, has_held_out=True) == asked


@pytest.mark.parametrize(("training", "named"), [({}, "--training.min_steps"), ({"steps": 3}, "--training.steps")])
def test_so_few_steps_that_they_change_little_are_pointed_out_with_the_setting(training, named):
    said = few_steps_warning(3, TrainingSettings(**training))
    assert "3 steps" in said
    assert named in said


@pytest.mark.parametrize(("processes", "rounds"), [(1, 6), (2, 3), (4, 2), (8, 1)])
def test_a_run_takes_its_streams_one_after_the_other_and_evaluates_in_a_third_of_the_time(processes, rounds):
    setup = SimpleNamespace(
        plan=SimpleNamespace(streams_per_step=6, capacity=512, steps_per_epoch=10),
        eval_plan=None,
        steps=100,
        settings=SimpleNamespace(training=TrainingSettings()),
        accelerator=SimpleNamespace(num_processes=processes),
    )
    assert estimate_seconds(setup, 0.5, done=0) == pytest.approx(100 * rounds * 0.5)
    assert estimate_seconds(setup, 0.5, done=60) == pytest.approx(40 * rounds * 0.5)
    setup.eval_plan = SimpleNamespace(streams=[[0]] * 8, capacity=256)
    evaluation = 8 / processes * 0.5 / 2 / 3
    assert estimate_seconds(setup, 0.5, done=0) == pytest.approx(100 * rounds * 0.5 + 11 * evaluation)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "1 s"), (40, "40 s"), (100, "2 min"), (3 * 3600, "3 h"), (66_000 * 8 * 55, "336 days")]
)
def test_a_duration_is_said_in_one_unit(seconds, said):
    assert spoken(seconds) == said
