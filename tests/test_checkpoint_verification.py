"""What must hold of a checkpoint, and how it is said where it does not. The format is written by hand here."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from gpt2ft import checkpoint
from gpt2ft.checkpoint import CheckpointError

STATE = {
    "step": 4,
    "updates": 2,
    "skipped_in_a_row": 1,
    "best_loss": 2.5,
    "best_step": 2,
    "evaluated_step": 2,
}
TENSORS = ("model.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors")


def write(root, step=4, tensors=None, saved=None, **state):
    """A checkpoint that its manifest fits. `tensors` replaces those of some files, `saved` parts of state.json."""
    folder = root / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for name in TENSORS:
        save_file({"a": torch.ones(2, 3), "b": torch.zeros(0)} | (tensors or {}).get(name, {}), folder / name)
    content = {"format": 1, "state": STATE | {"step": step} | state, "identity": {"seed": 0}} | (saved or {})
    (folder / "state.json").write_text(json.dumps(content))
    stamp(folder)
    return folder


def stamp(folder):
    manifest = {}
    for name in (*TENSORS, "state.json"):
        content = (folder / name).read_bytes()
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.verify(folder)
    said = str(caught.value)
    assert said.count("\n") == 0
    return said.replace(str(folder), "FOLDER")


def test_a_checkpoint_written_by_hand_is_read(tmp_path):
    folder = write(tmp_path)
    checkpoint.verify(folder)
    state, identity = checkpoint.read_state(folder)
    assert (state.step, state.updates, state.best_loss, identity) == (4, 2, 2.5, {"seed": 0})
    assert checkpoint.read_weights(folder)["a"].tolist() == [[1, 1, 1], [1, 1, 1]]
    checkpoint.verify(write(tmp_path, step=100_000_000, best_loss=None, best_step=None, evaluated_step=None))
    checkpoint.verify(write(tmp_path, step=0, updates=0, skipped_in_a_row=0, best_step=0, evaluated_step=0))


COUNT = "must be a whole number"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"updates": -1}, f"`state.updates` {COUNT} up to 4, but is -1"),
        ({"updates": 5}, f"`state.updates` {COUNT} up to 4, but is 5"),
        ({"updates": 4}, "`state.updates` must be at most 3, but is 4"),
        ({"updates": "3"}, f"`state.updates` {COUNT} up to 4, but is '3'"),
        ({"updates": True}, f"`state.updates` {COUNT} up to 4, but is True"),
        ({"updates": None}, f"`state.updates` {COUNT} up to 4, but is None"),
        ({"skipped_in_a_row": 1.0}, f"`state.skipped_in_a_row` {COUNT} up to 4, but is 1.0"),
        ({"step": "4"}, f"`state.step` {COUNT} that is not negative, but is '4'"),
        ({"step": -4}, f"`state.step` {COUNT} that is not negative, but is -4"),
        ({"best_loss": float("nan")}, "`state.best_loss` must be a finite number, but is nan"),
        ({"best_loss": float("inf")}, "`state.best_loss` must be a finite number, but is inf"),
        ({"best_loss": [1] * 9}, "`state.best_loss` must be a finite number, but is a list of 9"),
        ({"best_loss": None}, "`state.best_loss` and `state.best_step` must both be there, but one is null"),
        ({"best_step": 6}, f"`state.best_step` {COUNT} up to 4, but is 6"),
        ({"evaluated_step": {}}, f"`state.evaluated_step` {COUNT} up to 4, but is a dict of 0"),
        ({"evaluated_step": 10**99}, f"`state.evaluated_step` {COUNT} up to 4, but is 1{'0' * 79}..."),
        ({"epoch": 1}, f"`state` must hold {', '.join(STATE)}, but holds a list of 7"),
    ],
)
def test_a_state_in_which_no_run_can_be(state, said, tmp_path):
    folder = write(tmp_path)
    saved = json.loads((folder / "state.json").read_text())
    saved["state"] |= state
    (folder / "state.json").write_text(json.dumps(saved))
    stamp(folder)
    assert refusal(folder) == f"FOLDER/state.json: {said}"


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"format": 2}, "state.json has checkpoint format 2, but this version reads 1"),
        ({"format": "1"}, "state.json must hold an object with a `format`, but holds a dict of 3"),
        ({"state": []}, f"state.json: `state` must hold {', '.join(STATE)}, but holds a list of 0"),
        ({"identity": None}, "state.json: `identity` must be an object, but is None"),
        ({"also": 1}, "state.json must hold `format`, `state` and `identity`, but holds a list of 4"),
    ],
)
def test_a_state_file_of_another_make(saved, said, tmp_path):
    assert refusal(write(tmp_path, saved=saved)) == f"FOLDER/{said}"


@pytest.mark.parametrize(
    ("file", "tensors", "said"),
    [
        ("model", {"a": torch.tensor([1.0, float("nan")])}, "exp_avg.safetensors: 'a' must be F32 [2], as in "),
        ("model", {"a": torch.full((2, 3), float("nan"))}, "model.safetensors: 'a' holds values that are not finite"),
        ("exp_avg", {"a": torch.full((2, 3), -torch.inf)}, "exp_avg.safetensors: 'a' holds values that are not finite"),
        ("exp_avg_sq", {"a": torch.full((2, 3), torch.inf)}, "exp_avg_sq.safetensors: 'a' holds values that are not "),
        ("exp_avg_sq", {"a": torch.full((2, 3), -1.5)}, "exp_avg_sq.safetensors: 'a' must not be negative, but "),
        ("model", {"a": torch.ones(2, 3).half()}, "model.safetensors: 'a' must be F32, but is F16 [2, 3]"),
        ("exp_avg", {"a": torch.ones(2, 3).double()}, "exp_avg.safetensors: 'a' must be F32 [2, 3], as in "),
        ("exp_avg", {"c": torch.ones(1)}, "exp_avg.safetensors: 'c' must be absent, as in model.safetensors, but is "),
        ("model", {"c": torch.ones(1)}, "exp_avg.safetensors: 'c' must be F32 [1], as in model.safetensors, but is "),
    ],
)  # fmt: skip
def test_tensors_that_no_run_has(file, tensors, said, tmp_path):
    assert refusal(write(tmp_path, tensors={f"{file}.safetensors": tensors})).startswith(f"FOLDER/{said}")


def test_tensors_in_disguise(tmp_path):
    folder = write(tmp_path)
    (folder / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"\x80\x04K.")
    stamp(folder)
    assert "FOLDER/model.safetensors must be a safetensors file, but is not readable: " in refusal(folder)
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    stamp(folder)
    assert refusal(folder).endswith("a header of at most 4,194,304 bytes, but states 4,611,686,018,427,387,904")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "must be a JSON file, but does not parse: "),
        (b"\xff", "must be a JSON file, but does not parse: "),
        (b"[" * 100_000, "must be nested at most 32 deep, but is nested deeper"),
        (b"[" * 33 + b"1" + b"]" * 33, "must be nested at most 32 deep, but is nested deeper"),
        (b"[]" + b" " * 2**22, "must have at most 4,194,304 bytes, but has more"),
        (b'["model.safetensors"]', "must hold an object, but holds a list of 1"),
        (b'{"../\\ud800": 1}', "must list exp_avg.safetensors, exp_avg_sq.safetensors, model.safetensors, state.json, "
         "but lacks exp_avg.safetensors, exp_avg_sq.safetensors, model.safetensors, state.json and also lists "
         "'../\\ud800'"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(content, said, tmp_path):
    folder = write(tmp_path)
    (folder / "manifest.json").write_bytes(content)
    assert refusal(folder).startswith(f"FOLDER/manifest.json {said}")


@pytest.mark.parametrize(
    "entry", [None, [], {"bytes": 1}, {"bytes": "1", "sha256": "f"}, {"bytes": True, "sha256": ""}]
)
def test_a_manifest_that_states_nothing_of_a_file(entry, tmp_path):
    folder = write(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"state.json": entry}))
    assert "manifest.json must state `bytes` and `sha256` of state.json, but states " in refusal(folder)


def test_links_are_not_followed(tmp_path):
    folder = write(tmp_path / "checkpoints")
    outside = tmp_path / "outside"
    shutil.copytree(folder, outside)
    for name in (*TENSORS, "state.json", "manifest.json"):
        (folder / name).unlink()
        (folder / name).symlink_to(outside / name)
        assert refusal(folder) == f"FOLDER/{name} must be a file, but is a link"
        (folder / name).unlink()
        shutil.copy(outside / name, folder / name)
    checkpoint.verify(folder)
    shutil.rmtree(folder)
    folder.symlink_to(outside)
    assert refusal(folder) == "FOLDER must be a folder, but is a link"


def test_what_is_no_file_is_not_opened(tmp_path):
    folder = write(tmp_path)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert refusal(folder) == "FOLDER/manifest.json must be a file, but is a pipe or a device"


# --- which one is taken -----------------------------------------------------------------------------------------------


def test_the_newest_is_that_of_the_latest_step(tmp_path):
    for step in (99_999_999, 100_000_000, 3):
        write(tmp_path, step, best_loss=None, best_step=None, evaluated_step=None)
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == [
        "step-100000000",
        "step-99999999",
        "step-00000003",
    ]
    assert checkpoint.find_newest(tmp_path, verbose=True).name == "step-100000000"


def removed_half_way(folder):
    (folder / "manifest.json").unlink()
    (folder / "exp_avg.safetensors").unlink()


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def a_file_instead(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def a_dangling_link_instead(folder):
    shutil.rmtree(folder)
    folder.symlink_to(folder.parent / "nothing")


SPOILT = [removed_half_way, emptied, a_file_instead, a_dangling_link_instead]
RENAMED = ["step-4", "step-00000004.bak", "step-00000005", "step-0000000004"]
SPOILT += [lambda folder, name=name: folder.rename(folder.with_name(name)) for name in RENAMED]


@pytest.mark.parametrize("spoil", SPOILT, ids=[*(f.__name__ for f in SPOILT[:4]), *RENAMED])
def test_the_one_before_is_taken_and_without_one_the_run_does_not_start_anew(spoil, tmp_path, capsys):
    older, newest = write(tmp_path, 3), write(tmp_path, 4)
    spoil(newest)
    assert checkpoint.find_newest(tmp_path, verbose=True) == older
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {tmp_path}/step-")
    assert told.endswith("; trying the checkpoint before it\n")
    assert told.count("\n") == 1
    shutil.rmtree(older)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints in .* is whole: pass `--resume never`"):
        checkpoint.find_newest(tmp_path, verbose=False)


def test_no_checkpoint_at_all_is_a_start(tmp_path):
    (tmp_path / ".step-00000004.1.tmp").mkdir()
    assert checkpoint.find_newest(tmp_path, verbose=True) is None
    assert checkpoint.find_newest(tmp_path / "absent", verbose=True) is None


def test_a_folder_that_cannot_be_read_is_no_start(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file cannot be read: Not a directory"):
        checkpoint.find_newest(tmp_path / "file", verbose=True)
    (tmp_path / "link").symlink_to(tmp_path / "a disk that is not mounted")
    with pytest.raises(CheckpointError, match="link is a link to nothing"):
        checkpoint.find_newest(tmp_path / "link", verbose=True)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        checkpoint.find_newest(tmp_path, verbose=True)


# --- which ones are kept ----------------------------------------------------------------------------------------------


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_pruning_keeps_the_newest_and_the_best_and_what_is_not_its_own(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000001.bak").mkdir()
    (tmp_path / "step-00000000").symlink_to(tmp_path / "step-1")
    others = ["step-00000000", "step-00000001.bak", "step-1"]
    checkpoint.prune(tmp_path, keep=2, best_step=1)
    assert names(tmp_path) == sorted([*others, *(f"step-0000000{step}" for step in (1, 4, 5))])
    with pytest.raises(ValueError, match="`keep` must be at least 1, but is 0"):
        checkpoint.prune(tmp_path, keep=0, best_step=None)


def written_at(folder, second):
    os.utime(folder / "manifest.json", (second, second))


def test_what_was_just_written_does_not_give_way_to_a_damaged_one_that_was_passed_over(tmp_path):
    """The run went on from step 3, because 6 was damaged, and has saved step 4."""
    for number, step in enumerate((3, 6, 4)):
        written_at(write(tmp_path, step), number)
    (tmp_path / "step-00000006" / "model.safetensors").unlink()
    checkpoint.prune(tmp_path, keep=1, best_step=None)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]
    assert checkpoint.find_newest(tmp_path, verbose=True).name == "step-00000004"
    written_at(write(tmp_path, 7), 3)
    checkpoint.prune(tmp_path, keep=1, best_step=None)
    assert names(tmp_path) == ["step-00000007"]


def test_a_clock_that_was_set_back_costs_nothing_but_room(tmp_path):
    for number, step in enumerate((2, 4, 6)):
        written_at(write(tmp_path, step), 100 - number)
    checkpoint.prune(tmp_path, keep=1, best_step=None)
    assert names(tmp_path) == ["step-00000002", "step-00000006"]


def test_a_kill_while_pruning_leaves_nothing_that_has_a_checkpoints_name(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    for step in (1, 2):
        write(tmp_path, step)
    monkeypatch.setattr(os, "rmdir", killed)
    with pytest.raises(Killed):
        checkpoint.prune(tmp_path, keep=1, best_step=None)
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["step-00000002"]
    assert len(names(tmp_path)) == 2
