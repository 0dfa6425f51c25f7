"""Interrupted equals uninterrupted, to the bit; and checkpoints that cannot lie."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2ft import checkpoint
from gpt2ft.checkpoint import CheckpointError
from gpt2ft.errors import SettingsError
from gpt2ft.objectives.sft import SFT
from gpt2ft.training.fit import TrainingDiverged

STEPS = 7  # 17 streams to an epoch in steps of 6: the run ends in the third


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def training_lines(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def all_lines(folder):
    """In their order, without time and speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in ("time", "train/tokens_per_second")} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(run_sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_sft(folder, steps=STEPS)
    return folder


@pytest.mark.parametrize("stop_after", [3, 6, *(pytest.param(step, marks=pytest.mark.long) for step in (1, 2, 4, 5))])
def test_a_run_stopped_after_any_step_ends_in_the_same_bits(
    stop_after, uninterrupted, run_sft, stopped_after, tmp_path, capsys
):
    """With dropout and noise on, over epoch ends, saving every second step: so also from work that is done again."""
    with stopped_after(stop_after):
        run_sft(tmp_path / "run", steps=STEPS)
    run_sft(tmp_path / "run", steps=STEPS)
    assert f"from step 0 to step {STEPS}: held-out loss " in capsys.readouterr().out
    expected, found = weights(uninterrupted), weights(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all_lines(tmp_path / "run") == all_lines(uninterrupted)
    starts = json.loads((tmp_path / "run" / "manifest.json").read_text())["starts"]
    went_on_from = {1: [], 2: [], 3: [2], 4: [3], 5: [4], 6: [4]}[stop_after]
    assert [start["step"] for start in starts] == [0, *went_on_from]
    assert all(start["processes"] == 1 and "threads" in start["hardware"] for start in starts)


def test_each_line_tells_what_was_trained_on_until_then(uninterrupted, run_sft, tmp_path):
    """Equal in two runs for as long as they are trained on the same."""
    run_sft(tmp_path / "run", steps=3, seed=1)
    run_sft(tmp_path / "short", steps=3, learning_rate=1e-3, log_every=2)
    of_line, other, short = (
        {line["step"]: line["data"] for line in all_lines(folder) if "train/loss" in line}
        for folder in (uninterrupted, tmp_path / "run", tmp_path / "short")
    )
    assert len(set(of_line.values())) == STEPS
    assert short == {step: of_line[step] for step in (2, 3)}
    assert not set(other.values()) & set(of_line.values())


def test_every_line_has_its_time_and_how_far_the_run_is(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    streams = json.loads((uninterrupted / "manifest.json").read_text())["plan"]["streams"]
    assert [line["epoch"] for line in lines] == [line["step"] * 6 / streams for line in lines]
    assert lines[-1]["epoch"] > 2
    seen = [line["tokens_seen"] for line in lines]
    assert seen == sorted(seen)
    assert seen[0] == 0 < seen[1]
    assert all("time" in line for line in lines)
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert (manifest["strategy"], manifest["precision"]) == ("single process", "fp32")


def test_a_finished_run_says_so(uninterrupted, run_sft):
    with pytest.raises(SettingsError, match=r"is finished: pass `--resume never`"):
        run_sft(uninterrupted, steps=STEPS)


def test_resume_never_moves_the_earlier_run_aside(uninterrupted, run_sft, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    run_sft(tmp_path / "run", steps=1, resume="never")
    assert weights(tmp_path / "run.1").keys() == weights(uninterrupted).keys()
    assert len(training_lines(tmp_path / "run")) == 1


def test_a_restart_of_the_same_launch_goes_on_whatever_resume_says(
    uninterrupted, run_sft, stopped_after, tmp_path, monkeypatch, capsys
):
    """Moved aside once, by the first start; continued by the second; and the third finds it finished."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    shutil.copytree(uninterrupted, tmp_path / "run")
    with stopped_after(4):
        run_sft(tmp_path / "run", steps=STEPS, resume="never")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    run_sft(tmp_path / "run", steps=STEPS, resume="never")
    assert "resuming" in capsys.readouterr().out
    expected, found = weights(uninterrupted), weights(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for resume in ("never", "auto"):
        run_sft(tmp_path / "run", steps=STEPS, resume=resume)
        assert "finished" in capsys.readouterr().out
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["run", "run.1"]


@pytest.fixture
def stopped(uninterrupted, tmp_path):
    """The uninterrupted run as it was before it finished: with two checkpoints or more, without model/."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-3}, "optimizer.learning_rate"),
        ({"seed": 1}, "model|training.seed|initial_weights"),
        ({"steps": STEPS + 1}, "steps"),
        ({"max_rank": 0}, "data.max_rank|conversations"),
    ],
)
def test_settings_that_change_training_are_refused(stopped, run_sft, changes, named):
    with pytest.raises(SettingsError, match=rf"cannot be continued: .*({named}).* was .* and is now .*"):
        run_sft(stopped, **({"steps": STEPS} | changes))


def test_settings_that_do_not_change_training_are_not(stopped, run_sft, uninterrupted):
    run_sft(stopped, steps=STEPS, log_every=5, keep_checkpoints=3)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(stopped).values(), weights(uninterrupted).values(), strict=True)
    )


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


DAMAGES = {
    "bit flipped": flip_a_bit,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "extended": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "emptied": lambda file: file.write_bytes(b""),
    "removed": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "exp_avg.safetensors", "state.json", "manifest.json"])
def test_every_damage_is_detected(damage, name, stopped, capsys):
    newest, before = checkpoint.folders(stopped / "checkpoints")[:2]
    assert checkpoint.find_newest(stopped / "checkpoints", verbose=True) == newest
    if (damage, name) == ("bit flipped", "manifest.json"):
        (newest / name).write_text((newest / name).read_text().replace('"sha256": "', '"sha256": "0', 1))
    elif (damage, name) == ("extended", "manifest.json"):
        (newest / name).write_text((newest / name).read_text() + "x")
    else:
        DAMAGES[damage](newest / name)
    assert checkpoint.find_newest(stopped / "checkpoints", verbose=True) == before
    assert str(newest) in capsys.readouterr().err


def test_never_a_silent_fresh_start(stopped, run_sft):
    for folder in checkpoint.folders(stopped / "checkpoints"):
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match="none is whole"):
        run_sft(stopped, steps=STEPS)


def test_a_manifest_cannot_name_other_files(stopped):
    newest = checkpoint.folders(stopped / "checkpoints")[0]
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["../../recipe.yaml"] = manifest["state.json"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="must list"):
        checkpoint.verify(newest)


def test_a_leftover_of_a_killed_save_is_no_checkpoint_and_goes(stopped, run_sft):
    leftover = stopped / "checkpoints" / ".step-00000099.1.tmp"
    leftover.mkdir()
    save_file({"x": torch.zeros(1)}, leftover / "model.safetensors")
    run_sft(stopped, steps=STEPS)
    assert not leftover.exists()
    assert (stopped / "model" / "config.json").is_file()


def test_the_newest_and_the_best_are_kept(uninterrupted):
    kept = [folder.name for folder in checkpoint.folders(uninterrupted / "checkpoints")]
    state, _ = checkpoint.read_state(uninterrupted / "checkpoints" / kept[0])
    assert kept[:2] == ["step-00000007", "step-00000006"]
    assert checkpoint.step_folder(uninterrupted / "checkpoints", state.best_step).is_dir()
    assert (uninterrupted / "best" / "config.json").is_file()


class Poisoned(SFT):
    """The loss is not a number in some steps, counted by micro-batch."""

    def __init__(self, bad):
        self.bad, self.seen = bad, -1

    def loss(self, log_probs, stream):
        self.seen += 1
        loss = super().loss(log_probs, stream)
        return loss * float("nan") if self.seen in self.bad else loss


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(run_sft, tmp_path):
    """One bad micro-batch of the six of step 1 spoils that step and no other."""
    run_sft(tmp_path / "run", steps=3, objective=Poisoned({8}))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["train/skipped_steps"] for line in lines if "train/skipped_steps" in line]
    assert skipped == [0, 1, 1]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_a_run_of_them_stops(run_sft, tmp_path):
    with pytest.raises(TrainingDiverged, match="not finite in 2 steps in a row, the last was step 2"):
        run_sft(tmp_path / "run", steps=5, objective=Poisoned(set(range(6, 99))), max_skipped_steps=2)
    assert not (tmp_path / "run" / "model").exists()
