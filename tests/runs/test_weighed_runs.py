"""A run by weights, and by the last turns alone: the same in longer streams, and to the bit where it is stopped."""

import json
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from safetensors.torch import load_file
from test_same_run import Regrouped, losses

from gpt2ft import quickstart

STEPS = 4


@pytest.fixture(scope="module")
def weighed(tmp_path_factory):
    """A half of the quickstart's trees, their replies of many weights."""
    marks, lines = cycle([1, 0.5, 0.1, 0, None, 0.75]), []
    for line in quickstart.TREES.read_text(encoding="utf-8").splitlines()[::2]:
        record = json.loads(line)
        waiting = [record["prompt"]]
        while waiting:
            message = waiting.pop()
            waiting += message.get("replies", [])
            if message["role"] == "assistant":
                message["weight"] = next(marks)
        lines.append(json.dumps(record) + "\n")
    file = tmp_path_factory.mktemp("data") / "weighed.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return {"train": [str(file)], "eval": ["quickstart:held_out"]}


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in ("time", "train/tokens_per_second")} for line in lines]


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_a_weighed_run_that_is_stopped_ends_in_the_same_bits(train_on, weighed, run_sft, stopped_after, tmp_path):
    data = weighed | {"train_on": train_on}
    run_sft(tmp_path / "whole", steps=STEPS, data=data)
    with stopped_after(3):
        run_sft(tmp_path / "parts", steps=STEPS, data=data)
    run_sft(tmp_path / "parts", steps=STEPS, data=data)
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text())
    assert [start["step"] for start in manifest["starts"]] == [0, 2]


def test_longer_streams_give_the_same_losses_by_weight(weighed, run_sft, tmp_path, monkeypatch):
    """As more processes do: what a step is divided by is the sum of weights over all of it."""
    from gpt2ft.runs import train

    fit, curves = train.fit, {}
    for size in (1, 3):

        def regrouped(inputs, state, size=size):
            inputs.accelerator.gradient_state.plugin_kwargs["num_steps"] = 6 // size
            return fit(replace(inputs, batches=Regrouped(inputs.batches, size)), state)

        monkeypatch.setattr(train, "fit", regrouped)
        run_sft(tmp_path / str(size), steps=STEPS, dropout=0.0, data=weighed)
        curves[size], _ = losses(tmp_path / str(size))
    assert len(set(curves[1])) == STEPS
    assert curves[3] == pytest.approx(curves[1], rel=1e-5)


def test_a_turn_that_is_last_in_one_row_and_goes_on_in_another(run_sft, tmp_path):
    """Put together they are one tree, in which the first reply is learnt, and the second."""
    rows = []
    for number in range(4):
        turns = [("user", f"Tea {number}?"), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "It is warm.")]
        messages = [{"role": role, "content": text} for role, text in turns]
        rows += [{"messages": messages[:2]}, {"messages": messages}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plans = []
    for share in (False, True):
        data = {"train": [str(tmp_path / "rows.jsonl")], "train_on": "last", "share_prefixes": share}
        run_sft(tmp_path / str(share), steps=1, data=data)
        plans.append(json.loads((tmp_path / str(share) / "manifest.json").read_text())["plan"])
    assert plans[0]["supervised"] == plans[1]["supervised"] > 0
    assert plans[1]["tokens"] < plans[0]["tokens"]
