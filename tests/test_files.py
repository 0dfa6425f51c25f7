"""Files and folders are complete or absent, whatever happens in between."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from processes import run
from safetensors import SafetensorError
from safetensors.torch import load_file

from gpt2ft.files import (
    cache_root,
    complete_folder,
    discard,
    file_digest,
    remove_leftovers,
    restore_replaced,
    sync_folder,
    synced,
    write_json,
    write_safetensors,
    write_text,
)

REPOSITORY = Path(__file__).parents[1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_text_replaces_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "note.txt"
    for text in ["tea\n", "", "Thé — 茶\r\n\n"]:
        write_text(file, text)
        assert file.read_bytes() == text.encode()
    assert names(tmp_path) == ["note.txt"]


def test_write_text_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "note.txt"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half a surrogate \ud800")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="full"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["note.txt"]


def full_disk(*_, **__):
    raise OSError("the disk is full")


def test_write_json_is_readable_by_people_and_machines(tmp_path):
    write_json(tmp_path / "a.json", {"tea": ["茶", 1.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"tea": ["茶", 1.5, None]}
    assert "茶" in text
    assert text.endswith("}\n")


def test_write_safetensors_takes_any_layout(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(2, requires_grad=True), "c": torch.zeros(0)}
    write_safetensors(tmp_path / "w.safetensors", tensors)
    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert names(tmp_path) == ["w.safetensors"]


def test_write_safetensors_reports_the_disk_as_the_disk(tmp_path, monkeypatch):
    def refuse(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    file = tmp_path / "w.safetensors"
    write_safetensors(file, {"a": torch.ones(2)})
    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(OSError, match=r"w\.safetensors could not be written: .*No space"):
        write_safetensors(file, {"a": torch.zeros(2)})
    assert load_file(file)["a"].tolist() == [1, 1]
    assert names(tmp_path) == ["w.safetensors"]


def test_complete_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "run"
    with complete_folder(target) as folder:
        (folder / "a").write_text("1")
        assert folder.parent == target.parent  # so that the rename stays on one disk
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(target.parent) == ["run"]


def test_complete_folder_replaces_an_older_one(tmp_path):
    for name in ["old", "new"]:
        with complete_folder(tmp_path / "run") as folder:
            (folder / name).mkdir()
            assert names(folder) == [name]
    assert names(tmp_path / "run") == ["new"]
    assert names(tmp_path) == ["run"]


def write_and_be_interrupted(target):
    with complete_folder(target) as folder:
        (folder / "b").write_text("2")
        raise KeyboardInterrupt


@pytest.mark.parametrize("older", [False, True])
def test_complete_folder_that_fails_changes_nothing(tmp_path, older):
    if older:
        with complete_folder(tmp_path / "run") as folder:
            (folder / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt):
        write_and_be_interrupted(tmp_path / "run")
    assert names(tmp_path) == (["run"] if older else [])
    assert not older or names(tmp_path / "run") == ["a"]


def test_complete_folder_survives_a_kill(tmp_path):
    script = (
        "import os, pathlib, sys\n"
        "from gpt2ft.files import complete_folder\n"
        "with complete_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a').write_text('1')\n"
        "    os._exit(9)\n"
    )
    target = tmp_path / "run"
    run(["python", "-c", script, target], code=9)
    assert not target.exists()
    with complete_folder(target) as folder:
        (folder / "b").write_text("2")
    assert names(target) == ["b"]


def killed_while_replacing(target, monkeypatch):
    """Kills between the two renames: as the second begins."""

    class Killed(BaseException):
        pass

    renames = []

    def rename(source, destination):
        renames.append(source)
        if len(renames) >= 2:
            raise Killed
        whole(source, destination)

    whole = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            write_anew(target)


def write_anew(target):
    with complete_folder(target) as folder:
        (folder / "new").touch()


def test_processes_of_the_same_number_in_two_containers_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with synced(tmp_path / "note") as ours:
        ours.write_text("ours")
        with synced(tmp_path / "note") as theirs:
            theirs.write_text("theirs")
        assert (tmp_path / "note").read_text() == "theirs"
    assert (tmp_path / "note").read_text() == "ours"
    with complete_folder(tmp_path / "run") as ours:
        (ours / "a").touch()
        with complete_folder(tmp_path / "run") as theirs:
            (theirs / "b").touch()
        assert names(tmp_path / "run") == ["b"]
    assert names(tmp_path / "run") == ["a"]
    assert names(tmp_path) == ["note", "run"]


def test_a_folder_that_was_being_replaced_at_a_kill_is_given_back(tmp_path, monkeypatch):
    with complete_folder(tmp_path / "run") as folder:
        (folder / "old").touch()
    killed_while_replacing(tmp_path / "run", monkeypatch)
    assert not (tmp_path / "run").exists()
    assert len(names(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["old"]


def test_what_stands_there_is_not_overwritten_by_what_was_replaced(tmp_path):
    for name in ("run", ".run.7.old", ".run.old", ".run.x.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / ".link.tmp").symlink_to(tmp_path / "run")
    restore_replaced(tmp_path)
    assert len(names(tmp_path)) == 5
    remove_leftovers(tmp_path)
    assert names(tmp_path) == names(tmp_path / "run") == ["run"]


def test_a_rename_that_fails_is_taken_back(tmp_path, monkeypatch):
    with complete_folder(tmp_path / "run") as folder:
        (folder / "old").touch()
    whole, refused = os.rename, []

    def rename(source, destination):
        if str(source).endswith(".tmp") and not refused:
            refused.append(source)
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        whole(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match=r"^/.*/run could not be written: No space left on device$") as caught:
        write_anew(tmp_path / "run")
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["old"]


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, PermissionError), (errno.EROFS, OSError)])
def test_what_the_system_refuses_is_told_of_the_file_it_was_for(number, kind, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(kind, match=rf"^/.*/a\.txt could not be written: {os.strerror(number)}$") as caught:
        write_text(tmp_path / "a.txt", "a")
    assert caught.value.errno == number
    monkeypatch.setattr(os, "rename", refuse)
    (tmp_path / "run").mkdir()
    with pytest.raises(kind, match=rf"^/.*/run could not be removed: {os.strerror(number)}$"):
        discard(tmp_path / "run")
    assert names(tmp_path) == ["run"]


def test_digest_is_sha256_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"tea" * 100_000)
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"tea" * 100_000).hexdigest()


def test_sync_folder_needs_a_folder(tmp_path):
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "absent")


def test_tensors_may_be_read_by_whoever_may_read_other_new_files(tmp_path):
    write_text(tmp_path / "a.txt", "a")
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.txt").stat().st_mode


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2FT_CACHE", str(tmp_path / "environment"))
    assert cache_root(str(tmp_path / "setting")) == tmp_path / "setting"
    assert cache_root(None) == tmp_path / "environment"
    monkeypatch.delenv("GPT2FT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "gpt2ft"
    assert cache_root("~/teapot") == tmp_path / "teapot"
