"""A second run in the same folder is refused; the lock of one that is gone holds nobody up."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpt2ft
from gpt2ft.errors import SettingsError
from gpt2ft.runs import lock
from gpt2ft.runs.lock import FolderLock

HOLDER = """
import sys
from pathlib import Path
from gpt2ft.runs.lock import FolderLock
held = FolderLock()
held.hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in tmp_path."""
    environment = os.environ | {"PYTHONPATH": str(Path(gpt2ft.__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_another_run_is_refused_until_it_is_gone(holder, tmp_path):
    with pytest.raises(SettingsError, match=rf"another run trains in {tmp_path} \(process {holder.pid} on .*: wait"):
        FolderLock().hold(tmp_path)
    holder.kill()
    holder.wait()
    held = FolderLock()
    held.hold(tmp_path)
    assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    held.release()


def test_a_run_refuses_a_folder_that_another_trains_in(holder, run_sft, tmp_path):
    with pytest.raises(SettingsError, match="another run trains in"):
        run_sft(tmp_path, steps=1)
    assert {entry.name for entry in tmp_path.iterdir()} == {lock.NAME}


def test_a_process_on_another_machine_is_waited_for(holder, tmp_path, monkeypatch, capsys):
    (tmp_path / lock.NAME).write_text(json.dumps({"host": "elsewhere", "process": 7}))
    monkeypatch.setattr(lock, "SECONDS_FOR_ANOTHER_MACHINE", 0.1)
    with pytest.raises(SettingsError, match="process 7 on elsewhere"):
        FolderLock().hold(tmp_path)
    assert "waiting   for the run in" in capsys.readouterr().out
    monkeypatch.setattr(lock, "SECONDS_FOR_ANOTHER_MACHINE", 30.0)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: holder.kill() or holder.wait())
    FolderLock().hold(tmp_path)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    FolderLock().hold(tmp_path)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path} cannot be locked (No locks available): start no second run in it\n"
    )


def test_training_anew_locks_the_new_folder(run_sft, tmp_path, monkeypatch):
    held = []
    hold = FolderLock.hold
    monkeypatch.setattr(FolderLock, "hold", lambda self, folder: held.append(folder) or hold(self, folder))
    run_sft(tmp_path / "run", steps=1)
    run_sft(tmp_path / "run", steps=1, resume="never")
    assert held == [tmp_path / "run"] * 3
    assert (tmp_path / "run.1" / "model").is_dir()
    assert (tmp_path / "run" / lock.NAME).is_file()
