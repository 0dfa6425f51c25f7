"""Facts of runs and their curves, from what runs leave behind."""

import json

from gpt2ft.report.facts import MOST_POINTS, curves, facts, settings_that_differ
from gpt2ft.settings.scripts import DPOSettings, SFTSettings


def test_curves_are_read_by_name_and_lines_that_are_cut_short_are_left_out():
    lines = [{"step": 1, "train/loss": 3.0, "train/grad_norm": None, "time": "now"}, {"step": 2, "eval/loss": 2.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "train/lo'
    assert curves(text) == {"train/loss": [(1, 3.0)], "eval/loss": [(2, 2.5)]}
    assert curves("") == {}


def test_of_many_points_some_stay_and_the_ends_always():
    lines = [json.dumps({"step": step, "train/loss": 1 / step}) for step in range(1, 2002)]
    points = curves("\n".join(lines))["train/loss"]
    assert MOST_POINTS / 2 < len(points) <= MOST_POINTS + 1
    assert points[0] == (1, 1.0)
    assert points[-1] == (2001, 1 / 2001)


def test_settings_that_differ_stand_side_by_side():
    one = SFTSettings(data={"train": ("a",), "cache": "x"}, output="runs/one", optimizer={"learning_rate": 1e-3})
    two = DPOSettings(data={"train": ("a",), "cache": "y"}, output="runs/two", optimizer={"learning_rate": 1e-4})
    assert settings_that_differ([None, one, two]) == {"optimizer.learning_rate": [None, 1e-3, 1e-4]}
    assert settings_that_differ([one, one, None]) == {}
    assert settings_that_differ([None]) == {}


def test_shares_come_from_the_plan(tmp_path):
    settings = SFTSettings(data={"train": ("a",)}, training={"tokens_per_micro_batch": 1024})
    plan = {"streams": 2, "steps": 5, "tokens": 1600, "repeated": 160, "supervised": 800}
    manifest = {"sources": [{"source": "a"}], "dropped": {"no reply": 2}, "plan": plan}
    found = facts(settings, manifest, tmp_path / "metrics.jsonl")
    assert (found["supervised_share"], found["repeated_share"], found["steps"]) == (0.5, 0.1, 5)
    assert found["fill"] == 1600 / 2048
    assert found["curves"] == {}
    assert facts(settings, manifest | {"plan": plan | {"fill": 0.9}}, tmp_path / "no")["fill"] == 0.9
