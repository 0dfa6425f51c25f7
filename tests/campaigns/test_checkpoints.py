"""Samples of the campaigns against checkpoints, and whether they see what they look for."""

import shutil
from pathlib import Path

import damaged
import killed_saves
import pytest
from damaged import KINDS
from processes import run
from small_checkpoints import save

from gpt2ft import checkpoint

HERE = Path(__file__).parent


def campaign(name, *arguments):
    """In a process of its own, with one thread: what has run before must not be there in its children."""
    done = run(["python", f"tests/campaigns/{name}.py", *arguments], seconds=900)
    assert done.stdout.endswith("all held\n")
    return done.stdout


def test_damaged_checkpoints_are_named_and_passed_over():
    assert damaged.run(2 * len(KINDS), seed=1) == []


@pytest.mark.parametrize("check", ["check_manifest", "read_state", "check_tensors"])
def test_without_one_of_the_checks_damage_is_seen(check, monkeypatch):
    def nothing(path, *_):
        digits = path.name.removeprefix("step-")
        return checkpoint.TrainState(step=int(digits) if digits.isdigit() else 0), {}

    monkeypatch.setattr(checkpoint, check, nothing)
    assert damaged.run(len(KINDS), seed=1) != []


def test_what_writes_or_takes_memory_is_seen(monkeypatch):
    found = checkpoint.find_newest

    def writes(root, verbose):
        (root.parent / "outside" / "x").write_text(str(root.stat().st_ctime_ns))
        return found(root, verbose)

    monkeypatch.setattr(damaged, "MOST_MEMORY", -1)
    monkeypatch.setattr(checkpoint, "find_newest", writes)
    problems = damaged.run(3, seed=1)
    assert sum(problem.endswith("something was written or removed") for problem in problems) == 3
    assert problems[-1].startswith("memory grew by ")


def test_saves_that_are_killed():
    said = campaign("killed_saves", 15, 1, "--every", 25)
    assert "15 kills" in said


def test_a_save_that_is_not_whole_is_seen(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    ended = killed_saves.Ended(was_killed=True, saved=2, begun=3, at="rename", said="", operations=0)
    assert killed_saves.judge(tmp_path, 1, ended) == []
    shutil.rmtree(tmp_path / "step-00000002")
    assert killed_saves.judge(tmp_path, 1, ended) == [
        "the newest is that of step 1, but should be one of [2, 3]",
        "only 1 are left",
    ]
    save(tmp_path, 2, width=5)
    assert killed_saves.judge(tmp_path, 1, ended)[0].startswith("not whole: ")
    (tmp_path / "step-00000002" / "state.json").unlink()
    assert any("state.json is missing" in problem for problem in killed_saves.judge(tmp_path, 1, ended))


def test_a_checkpoint_that_was_being_replaced_at_a_kill_is_there_at_the_next_start(tmp_path, accelerator):
    """Without it the run would start anew in silence: it was the only one."""
    from gpt2ft.runs.output import Output
    from gpt2ft.settings.scripts import SFTSettings

    output = Output(str(tmp_path / "run"))
    folder = save(output.checkpoints, 1)
    folder.rename(folder.with_name(f".{folder.name}.7.old"))
    shutil.copytree(folder.with_name(f".{folder.name}.7.old"), folder.with_name(f".{folder.name}.7.tmp"))
    assert checkpoint.find_newest(output.checkpoints, verbose=True) is None
    settings = SFTSettings(data={"train": ["quickstart"]}, output=str(output.folder))
    output.claim(settings)
    assert checkpoint.find_newest(output.checkpoints, verbose=True) == folder
    output.begin(settings, {}, accelerator)
    assert [path.name for path in output.checkpoints.iterdir()] == [folder.name]


@pytest.mark.long
def test_runs_that_are_killed():
    said = campaign("killed_runs", 2, 1, "--steps", 4, "--only", "LoRA")
    assert "2 kills" in said


@pytest.mark.campaign
def test_all_of_them():
    assert damaged.run(1000, seed=2) == []
    campaign("killed_saves", 300, 2)
    campaign("killed_runs", 25, 2)
