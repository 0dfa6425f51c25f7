"""A run that ends early leaves all that another does, and is the same one after a kill."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gpt2ft.checkpoint import TrainState
from gpt2ft.errors import SettingsError
from gpt2ft.report.facts import facts
from gpt2ft.runs import verify
from gpt2ft.runs.describe import describe_patience
from gpt2ft.runs.evaluation import HeldOutEvaluation
from gpt2ft.runs.finish import early_end
from gpt2ft.runs.loaded_model import read_run_settings
from gpt2ft.runs.run_setup import for_plan
from gpt2ft.settings.measuring import VerifySettings
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.settings.training import TrainingSettings

LOSSES = {0: 9.0, 1: 3.0, 2: 2.0, 3: 2.5, 4: 2.0, 5: 1.0}  # the best of step 2 is not bettered in 3 and 4
IMPATIENT = {"steps": 9, "patience": 2, "eval_every": 1, "log_every": 3}


@pytest.fixture(scope="module", autouse=True)
def given_losses():
    """Held-out losses that do not depend on what is trained."""
    whole = HeldOutEvaluation.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOutEvaluation, "__call__", lambda self, step: whole(self, step) and LOSSES[step])
        yield


def read(folder, name):
    return json.loads((folder / name).read_text())


def lines(folder):
    """Without time and speed."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in ("time", "train/tokens_per_second")} for line in found]


@pytest.fixture(scope="module")
def ended(given_losses, run_sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended") / "run"
    run_sft(folder, **IMPATIENT)
    return folder


def test_it_is_finished_and_verifies(ended, run_sft):
    state = read(ended, "manifest.json")["finished"]
    assert (state["step"], state["best_step"]) == (4, 2)
    assert [line["step"] for line in lines(ended) if "train/loss" in line] == [3, 4]
    for part, step in (("model", 4), ("best", 2)):
        saved = load_file(ended / "checkpoints" / f"step-0000000{step}" / "model.safetensors")
        exported = load_file(ended / part / "model.safetensors")
        assert torch.equal(saved["h.0.mlp.c_fc.weight"], exported["transformer.h.0.mlp.c_fc.weight"])
    for patience in (2, 5):
        with pytest.raises(SettingsError, match="is finished: pass `--resume never`"):
            run_sft(ended, **IMPATIENT | {"patience": patience})
    found = facts(read_run_settings(ended), read(ended, "manifest.json"), ended / "metrics.jsonl")
    assert found["steps"] == 4
    verify.run(VerifySettings(paths=[str(ended)], seed=0))
    assert {claim["result"] for claim in read(ended, "certificate.json")["claims"]} == {"holds"}


def test_a_run_that_was_killed_ends_at_the_same_step_and_says_so(ended, run_sft, stopped_after, tmp_path, capsys):
    with stopped_after(4):  # between two evaluations
        run_sft(tmp_path / "run", **IMPATIENT)
    run_sft(tmp_path / "run", **IMPATIENT)
    said = capsys.readouterr().out
    assert "of 9 in all" in said  # before it begins
    (end,) = (line for line in said.splitlines() if line.startswith("ended early"))
    assert all(fact in end for fact in ("step 4 of 9", "2 evaluations", "step 2", str(tmp_path / "run" / "best")))
    assert lines(tmp_path / "run") == lines(ended)
    files = [folder / "model" / "model.safetensors" for folder in (tmp_path / "run", ended)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_so_does_one_that_learns_preferences(run_dpo, tmp_path, capsys):
    run_dpo(tmp_path / "run", **IMPATIENT | {"patience": 1})
    assert read(tmp_path / "run", "manifest.json")["finished"]["step"] == 3
    assert "step 3 of 9: 1 evaluation " in capsys.readouterr().out


def test_without_held_out_data_it_is_refused(run_sft, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "Tea?", "completion": "Yes."}\n{"prompt": "Milk?", "completion": "No."}\n')
    data = {"train": [str(few)], "eval": (), "eval_fraction": None}
    with pytest.raises(SettingsError, match="`training.patience` needs held-out data"):
        run_sft(tmp_path / "run", steps=2, patience=1, eval_every=None, data=data)
    for settings in ({"training": {"patience": 1}}, {"data": {"eval_limit": 5}}):
        values = {"data": {"train": ("a",)} | settings.get("data", {}), "training": settings.get("training", {})}
        (problem,) = SFTSettings(**values).problems()
        assert any(f"`{section}.{name}`" in problem for section, given in settings.items() for name in given)


def test_small_data_are_evaluated_often_enough_for_it():
    plan = SimpleNamespace(epochs=120, steps=240, steps_per_epoch=2.0)
    settings = SFTSettings(data={"train": ("a",), "eval": ("b",)}, training={"epochs": 1, "patience": 3})
    often = for_plan(settings, plan, has_held_out=True).training
    assert often.eval_every == 24
    assert describe_patience(often, 240, plan).endswith("of 10 in all")
    assert describe_patience(TrainingSettings(patience=1), 240, plan).endswith("of 120 in all")


def test_a_run_without_a_finite_loss_has_no_best(tmp_path):
    assert "none was finite" in early_end(TrainState(step=3, evaluations_since_best=3), 9, tmp_path / "best")
