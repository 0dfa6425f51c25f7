"""The line at the end of a run on how it compares with its start."""

import json

import pytest

from gpt2ft.runs.evaluation import HeldOutEvaluation
from gpt2ft.runs.finish import compared_with_start
from gpt2ft.runs.samples import Sample

LINES = [
    {"step": 0, "eval/loss": 5.3324, "eval/stopped": 0.0},
    {"step": 20, "train/loss": 4.8, "train/learning_rate": 1e-3},
    {"step": 90, "eval/loss": 3.9203, "eval/stopped": 1 / 3},
    {"step": 100, "train/loss": 3.5},
    {"step": 266, "eval/loss": 3.8357, "eval/stopped": 1.0},
]


@pytest.fixture
def compare(tmp_path):
    def compare(lines):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return compared_with_start(tmp_path / "metrics.jsonl")

    return compare


def test_the_last_evaluation_is_compared_with_the_first(compare):
    line = compare(LINES)
    for fact in ("step 0 to step 266", "held-out loss 5.3324 -> 3.8357", "0% -> 100%"):
        assert fact in line


def test_a_run_without_sample_replies_says_nothing_of_them(compare):
    lines = [{name: value for name, value in line.items() if name != "eval/stopped"} for line in LINES]
    assert compare(lines).endswith("5.3324 -> 3.8357")


@pytest.mark.parametrize("lines", [[], LINES[1:2], LINES[:2]])
def test_a_run_that_has_not_evaluated_twice_says_nothing(compare, lines):
    assert compare(lines) is None


def test_a_loss_that_is_not_finite_is_said_to_be(compare):
    assert "5.3324 -> nan" in compare([*LINES[:4], {"step": 266, "eval/loss": None, "eval/stopped": 0.0}])


@pytest.mark.parametrize("at_start", [[], [Sample("Tea?", "\x1b[2J", True)]])
def test_no_reply_drives_the_terminal(at_start, monkeypatch):
    samples = [Sample("Tea?", "It is\n\x1b]0;hot\x07 and \x9b31m red.", True)]
    monkeypatch.setattr(HeldOutEvaluation, "generate_samples", lambda self: samples)
    transcript = HeldOutEvaluation(*[None] * 6, at_start).transcript()
    assert "It is\n\\x1b]0;hot\\x07 and \\x9b31m red." in transcript
    assert not {"\x1b", "\x07", "\x9b"} & set(transcript)
