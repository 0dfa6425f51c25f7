"""A run on labelled replies: it starts where the reference is, learns what the labels say, and resumes like any."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2ft.settings.scripts import DPOSettings, ReferenceSettings

STEPS = 5


def logged(folder, prefix):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if f"{prefix}/loss" in line]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Unpaired: short replies are good, long ones are not."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    replies = ["Hot tea.", "Well, as I have said so often, I would rather speak of the weather and of rain."]
    asked = [(f"Question {number}: what now?", f"{number} {replies[number % 2]}") for number in range(60)]
    rows = [
        {"prompt": prompt, "completion": reply, "label": number % 2 == 0}
        for number, (prompt, reply) in enumerate(asked)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_it_learns_what_the_labels_say_and_resumes_to_the_same_bits(run_dpo, stopped_after, rows, tmp_path, capsys):
    def run(name):
        data = {"train": [rows], "eval": [], "eval_fraction": 0.2}
        run_dpo(tmp_path / name, STEPS, data=data, dpo={"loss": "kto"}, learning_rate=3e-3, micro_batches_per_step=2)

    run("whole")
    steps, held_out = logged(tmp_path / "whole", "train"), logged(tmp_path / "whole", "eval")
    assert steps[0]["train/loss"] == held_out[0]["eval/loss"] == pytest.approx(0.5)
    assert held_out[0]["eval/accuracy"] == 0.5
    assert steps[-1]["train/loss"] < 0.5
    assert held_out[-1]["eval/loss"] < 0.5
    assert held_out[-1]["eval/margin"] > 0
    assert all(line["train/divergence"] >= 0 for line in steps)
    assert "labelled replies to " in capsys.readouterr().out
    with stopped_after(3):
        run("parts")
    run("parts")
    expected, found = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["train/loss"] for line in logged(tmp_path / "parts", "train")] == [
        line["train/loss"] for line in steps
    ]


@pytest.mark.parametrize(("label", "told"), [("true", "desirable"), ("false", "undesirable"), (None, "")])
def test_labels_that_are_all_the_same_are_told_of(run_dpo, rows, tmp_path, capsys, label, told):
    file, text = tmp_path / "rows.jsonl", Path(rows).read_text()
    file.write_text(re.sub(r"true|false", label, text) if label else text)
    run_dpo(tmp_path / "run", 1, data={"train": [str(file)], "eval": []}, dpo={"loss": "kto"})
    assert re.findall(r"all labels are (\w+):", capsys.readouterr().out) == ([told] if told else [])


@pytest.mark.parametrize(
    "dpo",
    [{"pairs": "adjacent"}, {"pair_weight": "prompt"}, {"whole_trees": True}, {"ld_alpha": 0.5}, {"rpo_alpha": 1.0}],
    ids=str,
)
def test_what_is_of_pairs_alone_is_refused(dpo):
    settings = DPOSettings(data={"train": ["rows.jsonl"]}, dpo={"loss": "kto"} | dpo)
    assert [problem.startswith(f"`dpo.{next(iter(dpo))}` must be ") for problem in settings.problems()] == [True]
    assert not list(DPOSettings(data={"train": ["rows.jsonl"]}, dpo={"loss": "kto", "beta": 0.2}).problems())


def test_a_report_on_pairs_is_refused():
    settings = ReferenceSettings(data={"train": ["rows.jsonl"]}, dpo={"loss": "kto"}, report="report.json")
    assert ["`report`" in problem for problem in settings.problems()] == [True]
