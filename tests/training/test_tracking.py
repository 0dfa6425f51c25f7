"""Metrics of a run: complete lines in order, whatever run has been killed or goes on."""

import json
import math
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import tqdm

from gpt2ft.checkpoint import TrainState
from gpt2ft.training.tracking import Tracker


@pytest.fixture
def open_tracker(tmp_path):
    """open_tracker(start, evaluated): of a run of 200 steps; closed in the end."""
    trackers = []

    def open_(start=0, evaluated=None, active=True):
        state = TrainState(step=start, evaluated_step=evaluated)
        trackers.append(Tracker(tmp_path, state, 200, {"training": {"seed": 0}}, active))
        return trackers[-1]

    yield open_
    for tracker in trackers:
        tracker.close()


def lines(folder):
    """Without their times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name != "time"} for line in found]


def steps(folder):
    return [line["step"] for line in lines(folder)]


def test_one_object_a_line_at_once(open_tracker, tmp_path):
    tracker = open_tracker()
    tracker.log(0, {"eval/loss": 8.25})
    assert lines(tmp_path) == [{"step": 0, "eval/loss": 8.25}]
    tracker.log(10, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/learning_rate": 1e-3})
    assert lines(tmp_path)[1] == {
        "step": 10, "train/loss": None, "train/grad_norm": None, "train/learning_rate": 1e-3,
    }  # fmt: skip
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(open_tracker, tmp_path):
    tracker = open_tracker()
    for step in (0, 10, 20, 30):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "train/lo')  # the line under way at a kill
    tracker = open_tracker(start=20)
    assert steps(tmp_path) == [0, 10, 20]
    tracker.log(30, {"train/loss": 2.0})
    assert lines(tmp_path)[-1] == {"step": 30, "train/loss": 2.0}


@pytest.mark.parametrize(
    ("evaluated", "kept"), [(None, [0]), (10, [0, 10]), (20, [0, 10, 20])], ids=["at the start", "before", "since"]
)
def test_an_evaluation_that_is_made_up_for_stands_there_once(evaluated, kept, open_tracker, tmp_path):
    """Saved by a signal before the evaluation of its step, then killed after it."""
    tracker = open_tracker()
    for step in (0, 10, 20, 30):
        if step:
            tracker.log(step, {"train/loss": 1.0})
        tracker.log(step, {"eval/loss": 1.0, "eval/stopped": 1.0})
    tracker.close()
    open_tracker(start=20, evaluated=evaluated)
    found = lines(tmp_path)
    assert [line["step"] for line in found if "train/loss" in line] == [10, 20]
    assert [line["step"] for line in found if "eval/loss" in line] == kept


def test_a_new_start_drops_everything(open_tracker, tmp_path):
    tracker = open_tracker()
    tracker.log(0, {"eval/loss": 1.0})
    tracker.close()
    open_tracker()
    assert steps(tmp_path) == []


def test_tensorboard_has_the_same_numbers_and_the_texts(open_tracker, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_tracker()
    tracker.log(10, {"train/loss": 0.5, "data": "0f"})
    tracker.log_text(10, "samples/0", "Tea is hot.")
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 0.5)]
    assert events.Tags()["scalars"] == ["train/loss"]
    assert lines(tmp_path) == [{"step": 10, "train/loss": 0.5, "data": "0f"}]
    (text,) = events.Tensors("samples/0/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (10, b"Tea is hot.")
    (settings,) = events.Tensors("settings/text_summary")
    assert b'"seed": 0' in settings.tensor_proto.string_val[0]


def test_without_a_terminal_progress_is_lines(open_tracker, capsys):
    tracker = open_tracker()
    tracker.advance()
    tracker.show(50, {"train/loss": 5.12345, "train/tokens_per_second": 9226.6}, seconds_left=75.9)
    tracker.print_line("step 50: held-out loss 5.2")
    printed = capsys.readouterr()
    assert printed.out == "step  50/200  loss 5.1235  9,227 tokens/s  01:15 left\nstep 50: held-out loss 5.2\n"
    assert printed.err == ""


def test_other_processes_than_the_main_one_write_and_print_nothing(open_tracker, tmp_path, capsys):
    tracker = open_tracker(active=False)
    tracker.advance()
    tracker.log(1, {"train/loss": 1.0})
    tracker.show(1, {"train/loss": 1.0, "train/tokens_per_second": 1.0}, 0.0)
    tracker.log_text(1, "a", "b")
    tracker.print_line("c")
    tracker.close()
    assert list(Path(tmp_path).iterdir()) == []
    assert capsys.readouterr() == ("", "")


METRICS = {"train/loss": 5.12345, "train/tokens_per_second": 9226.6}


def test_a_line_says_when_it_was_written(open_tracker, tmp_path):
    open_tracker().log(1, METRICS)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert abs((datetime.now(UTC) - datetime.fromisoformat(line["time"])).total_seconds()) < 60


@pytest.fixture
def on_terminal(monkeypatch):
    """on_terminal("stdout", "stderr"): these are 80 columns wide."""

    def make(*names):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(tqdm.std, "_screen_shape_wrapper", lambda: lambda _: (80, 40))
        for name in names:
            monkeypatch.setattr(getattr(sys, name), "isatty", lambda: True, raising=False)

    return make


def test_a_terminal_has_a_bar_and_a_line_is_left_now_and_then(on_terminal, open_tracker, capsys):
    on_terminal("stdout", "stderr")
    tracker = open_tracker()
    for step in range(1, 201):
        tracker.advance()
        tracker.show(step, METRICS, seconds_left=75.9)
    tracker.close()
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/200" for step in range(10, 201, 10)]
    assert all("loss 5.1235" in line for line in lines)
    bars = [re.sub("\x1b\\[[0-9;]*[A-Za-z]", "", bar).strip() for bar in printed.err.split("\r")]
    bar = [bar for bar in bars if "loss" in bar][-1]
    assert re.search("█{15,}.*%, .* left, loss 5.1235, 9,227 tokens/s", bar)
    assert max(map(len, bars)) <= 80


def test_a_log_has_every_line_though_the_bar_is_on_a_terminal(on_terminal, open_tracker, capsys):
    on_terminal("stderr")
    tracker = open_tracker()
    for step in (1, 2, 3):
        tracker.show(step, METRICS, seconds_left=1.0)
    out = capsys.readouterr().out
    assert out.count("\n") == 3
    assert "\x1b" not in out
    assert "\r" not in out
