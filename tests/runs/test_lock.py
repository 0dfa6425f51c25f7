"""A second run in the same folder is refused; the lock of one that is gone holds nobody up."""

import errno
import json
import os
import signal
import socket

import pytest
from processes import start

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
    with start(["python", "-c", HOLDER, tmp_path]) as process:
        process.wait_for("held\n")
        yield process


def holder_in(folder):
    return json.loads((folder / lock.NAME).read_text())


def test_another_run_is_refused_until_it_is_gone(holder, tmp_path):
    with pytest.raises(SettingsError) as refused:
        FolderLock().hold(tmp_path)
    for fact in (tmp_path, holder.pid, socket.gethostname(), "`--output`"):
        assert str(fact) in str(refused.value)
    assert holder_in(tmp_path)["process"] == holder.pid
    holder.send_signal(signal.SIGKILL)
    holder.finish(code=-signal.SIGKILL)
    held = FolderLock()
    held.hold(tmp_path)
    assert holder_in(tmp_path) == {"host": socket.gethostname(), "process": os.getpid()}
    held.release()


def test_a_run_refuses_a_folder_that_another_trains_in(holder, run_sft, tmp_path):
    with pytest.raises(SettingsError, match=f"process {holder.pid}"):
        run_sft(tmp_path, steps=1)
    assert {entry.name for entry in tmp_path.iterdir()} == {lock.NAME}


def test_a_process_on_another_machine_is_waited_for(holder, tmp_path, monkeypatch, capsys):
    (tmp_path / lock.NAME).write_text(' {"host": "elsewhere", "process": 7}')
    monkeypatch.setattr(lock, "SECONDS_FOR_ANOTHER_MACHINE", 0.1)
    monkeypatch.setattr(lock, "SECONDS_BETWEEN_LOOKS", 0.01)
    with pytest.raises(SettingsError, match="process 7 on elsewhere"):
        FolderLock().hold(tmp_path)
    assert "waiting" in capsys.readouterr().out
    monkeypatch.setattr(lock, "SECONDS_FOR_ANOTHER_MACHINE", 30.0)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: holder.kill())
    FolderLock().hold(tmp_path)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def none(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "lock_descriptor", none)
    FolderLock().hold(tmp_path)
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {tmp_path} ")
    assert "No locks available" in warning


def test_any_other_failure_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(lock, "lock_descriptor", broken)
    with pytest.raises(OSError, match="Input/output error"):
        FolderLock().hold(tmp_path)


def test_an_earlier_run_of_the_same_process_gives_its_lock_up(tmp_path):
    earlier, later = FolderLock(), FolderLock()
    earlier.hold(tmp_path)
    later.hold(tmp_path)
    del earlier
    with start(["python", "-c", HOLDER, tmp_path]) as process:
        assert "another run trains" in process.finish(code=1).stderr
    later.release()
    with start(["python", "-c", HOLDER, tmp_path]) as process:
        process.wait_for("held\n")


def test_training_anew_locks_the_new_folder(run_sft, tmp_path, monkeypatch):
    held = []
    hold = FolderLock.hold
    monkeypatch.setattr(FolderLock, "hold", lambda self, folder: held.append(folder) or hold(self, folder))
    run_sft(tmp_path / "run", steps=1)
    run_sft(tmp_path / "run", steps=1, resume="never")
    assert held == [tmp_path / "run"] * 3
    assert (tmp_path / "run.1" / "model").is_dir()
    assert (tmp_path / "run" / lock.NAME).is_file()
