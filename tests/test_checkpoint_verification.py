"""Every way in which a checkpoint can be wrong is refused by the name of the file. The format is written by hand."""

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
    """The message with which a checkpoint is refused: one line, which names what is wrong by its path."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.verify(folder)
    message = str(caught.value)
    assert message.count("\n") == 0
    assert message.startswith(str(folder))
    assert len(message) < 600 + len(str(folder))
    return message.replace(f"{folder}/", "").replace(str(folder), "FOLDER")


def assert_names(message, *facts):
    assert [fact for fact in facts if fact not in message] == [], message


def test_a_checkpoint_written_by_hand_is_read(tmp_path):
    folder = write(tmp_path)
    checkpoint.verify(folder)
    state, identity = checkpoint.read_state(folder)
    assert (state.step, state.updates, state.best_loss, identity) == (4, 2, 2.5, {"seed": 0})
    assert checkpoint.read_weights(folder)["a"].tolist() == [[1, 1, 1], [1, 1, 1]]
    checkpoint.verify(write(tmp_path, step=100_000_000, best_loss=None, best_step=None, evaluated_step=None))
    checkpoint.verify(write(tmp_path, step=0, updates=0, skipped_in_a_row=0, best_step=0, evaluated_step=0))


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"updates": -1}, "-1"),
        ({"updates": 5}, "5"),
        ({"updates": 4}, "4"),  # with a skipped step there are 3 at most
        ({"updates": "3"}, "'3'"),
        ({"updates": True}, "True"),
        ({"updates": None}, "None"),
        ({"skipped_in_a_row": 1.0}, "1.0"),
        ({"step": "4"}, "'4'"),
        ({"step": -4}, "-4"),
        ({"best_loss": float("nan")}, "nan"),
        ({"best_loss": float("inf")}, "inf"),
        ({"best_loss": [1] * 9}, "[1, 1"),
        ({"best_loss": None}, "null"),
        ({"best_step": 6}, "6"),
        ({"evaluated_step": {}}, "{}"),
        ({"evaluations_since_best": 5}, "5"),
        ({"evaluations_since_best": None}, "None"),
        ({"evaluated_step": 10**99}, f"1{'0' * 79}..."),
    ],
)
def test_a_state_in_which_no_run_can_be(state, found, tmp_path):
    (name,) = state
    assert_names(refusal(write(tmp_path, saved={"state": STATE | state})), "state.json", f"`state.{name}`", found)


@pytest.mark.parametrize(
    ("saved", "facts"),
    [
        ({"format": 2}, ["format", "but has 2"]),
        ({"format": "1"}, ["format", "but has '1'"]),
        ({"format": True}, ["format", "but has True"]),
        ({"state": []}, ["`state`", *STATE, "[]"]),
        ({"state": STATE | {"epoch": 1}}, ["`state`", *STATE]),
        ({"state": {}}, ["`state`", *STATE]),
        ({"identity": None}, ["`identity`"]),
        ({"also": 1}, ["`identity`"]),
    ],
)
def test_a_state_file_of_another_make(saved, facts, tmp_path):
    assert_names(refusal(write(tmp_path, saved=saved)), "state.json", *facts)


NAN, INF = float("nan"), torch.inf


@pytest.mark.parametrize(
    ("file", "tensors", "facts"),
    [
        ("model", {"a": torch.tensor([1.0, NAN])}, ["model.safetensors", "'a'", "nan"]),
        ("model", {"a": torch.full((2, 3), NAN)}, ["model.safetensors", "'a'", "nan"]),
        ("exp_avg", {"a": torch.full((2, 3), -INF)}, ["exp_avg.safetensors", "'a'", "-inf"]),
        ("exp_avg_sq", {"a": torch.full((2, 3), INF)}, ["exp_avg_sq.safetensors", "'a'", "inf"]),
        ("exp_avg_sq", {"a": torch.full((2, 3), -1.5)}, ["exp_avg_sq.safetensors", "'a'", "not negative", "-1.5"]),
        ("model", {"a": torch.ones(2, 3).half()}, ["model.safetensors", "'a'", "float16"]),
        ("exp_avg", {"a": torch.ones(2, 3).double()}, ["exp_avg.safetensors", "'a'", "float64"]),
        ("exp_avg", {"a": torch.ones(3, 2)}, ["exp_avg.safetensors", "'a'", "[2, 3]", "[3, 2]"]),
        ("exp_avg", {"c": torch.ones(1)}, ["exp_avg.safetensors", "'c'", "absent", "[1]"]),
        ("model", {"c": torch.ones(1)}, ["exp_avg.safetensors", "'c'", "[1]", "absent"]),
    ],
)
def test_tensors_that_no_run_has(file, tensors, facts, tmp_path):
    assert_names(refusal(write(tmp_path, tensors={f"{file}.safetensors": tensors})), *facts)


def test_negative_weights_and_means_are_ordinary(tmp_path):
    negative = {"a": torch.full((2, 3), -1.5)}
    checkpoint.verify(write(tmp_path, tensors={"model.safetensors": negative, "exp_avg.safetensors": negative}))


@pytest.mark.parametrize("header", [(4, b"\x80\x04K."), (2**62, b"{}"), (2, b"{}"), (10**9, b"{}")])
def test_tensors_in_disguise(header, tmp_path):
    folder, (length, content) = write(tmp_path), header
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content)
    stamp(folder)
    assert refusal(folder).startswith("model.safetensors must ")


LISTED = [*TENSORS, "state.json"]


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"", ["JSON"]),
        (b"\xff", ["JSON"]),
        (b"[" * 100_000, ["JSON"]),
        (b"[" * 33 + b"1" + b"]" * 33, ["32 deep"]),
        (b"[]" + b" " * 2**22, ["4,194,304 bytes"]),
        (b'["model.safetensors"]', [*LISTED, "['model.safetensors']"]),
        (b'{"../\\ud800": 1}', [*LISTED, "'../\\ud800'"]),
    ],
)
def test_a_manifest_that_is_none(content, facts, tmp_path):
    folder = write(tmp_path)
    (folder / "manifest.json").write_bytes(content)
    assert_names(refusal(folder), "manifest.json", *facts)


def entries_that_differ(size, digest):
    yield from (None, [], "x", {}, {"bytes": size}, {"sha256": digest}, {"bytes": size, "sha256": digest, "also": 1})
    yield from ({"bytes": wrong, "sha256": digest} for wrong in (size + 1, str(size), float(size), -1, True, None))
    yield from ({"bytes": size, "sha256": wrong} for wrong in ("f" * 64, digest.upper(), "", None))


def test_a_manifest_that_does_not_state_what_is_there(tmp_path):
    folder = write(tmp_path)
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for entry in entries_that_differ(*manifest["state.json"].values()):
        file.write_text(json.dumps(manifest | {"state.json": entry}))
        assert_names(refusal(folder), "state.json", "damaged", ascii(entry)[:80])


def test_links_are_not_followed(tmp_path):
    folder = write(tmp_path / "checkpoints")
    outside = tmp_path / "outside"
    shutil.copytree(folder, outside)
    for name in (*TENSORS, "state.json", "manifest.json"):
        (folder / name).unlink()
        (folder / name).symlink_to(outside / name)
        assert_names(refusal(folder), f"{name} must be a file", "a link")
        (folder / name).unlink()
        shutil.copy(outside / name, folder / name)
    checkpoint.verify(folder)
    shutil.rmtree(folder)
    folder.symlink_to(outside)
    assert_names(refusal(folder), "FOLDER must be a folder", "a link")


def test_what_is_no_file_is_not_opened(tmp_path):
    folder = write(tmp_path)
    for make, found in ((os.mkfifo, "a pipe"), (os.mkdir, "a folder")):
        for name in ("state.json", "manifest.json"):
            whole = (folder / name).read_bytes()
            (folder / name).unlink()
            make(folder / name)
            assert_names(refusal(folder), f"{name} must be a file", found)
            (folder / name).unlink() if make is os.mkfifo else (folder / name).rmdir()
            (folder / name).write_bytes(whole)


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
    with pytest.raises(CheckpointError, match=r"of 1 checkpoint in .* none is whole: pass `--resume never`"):
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


def test_pruning_keeps_the_newest_the_best_those_for_verification_and_what_is_not_its_own(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000001.bak").mkdir()
    (tmp_path / "step-00000000").symlink_to(tmp_path / "step-1")
    others = ["step-00000000", "step-00000001.bak", "step-1"]
    checkpoint.prune(tmp_path, keep=2, best_step=1, also={3, 9})
    assert names(tmp_path) == sorted([*others, *(f"step-0000000{step}" for step in (1, 3, 4, 5))])
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
