"""Windows, which nobody has here: with its answers everything but training works, and training says what it needs."""

import ast
import errno
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import gpt2ft
from gpt2ft import files, system
from gpt2ft.distributed.launch_checks import LaunchError
from gpt2ft.settings.layers import over
from gpt2ft.settings.scripts import SFTSettings
from gpt2ft.text.display import _Pipe

PACKAGE = Path(gpt2ft.__file__).parent
OF_ONE_SYSTEM = {"fcntl", "termios", "resource", "pwd", "grp", "tty", "pty", "msvcrt", "winreg", "ctypes"}
ABSENT_ON_WINDOWS = {  # attributes of os and signal
    *("sched_getaffinity", "fork", "getuid", "geteuid", "getpgid", "killpg", "setsid", "uname", "wait", "mkfifo"),
    *("O_DIRECTORY", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "SIGPIPE", "SIGALRM", "SIGQUIT", "pthread_kill"),
}
AS_ON_WINDOWS = """
import os, signal, sys
import accelerate, asyncio, concurrent.futures.thread, datasets, fastapi, multiprocessing.connection, psutil, pyarrow
import prompt_toolkit.shortcuts, torch.distributed.fsdp, tensorboard, tiktoken, tqdm, uvicorn, yaml, rich
from torch.utils import tensorboard as _
missing, absent = (set(words.split(",")) for words in sys.argv[1:3])
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in missing:
            raise ImportError(f"no module named {name}")
sys.meta_path.insert(0, Missing())
for name in missing & {*sys.modules}:
    del sys.modules[name]
for module in (os, signal):
    for name in absent & {*vars(module)}:
        delattr(module, name)
sys.platform = "win32"
import importlib, pkgutil
import gpt2ft
for module in pkgutil.walk_packages(gpt2ft.__path__, "gpt2ft."):
    if module.name != "gpt2ft.__main__":
        importlib.import_module(module.name)
from gpt2ft.__main__ import SCRIPTS, run_script
for name in SCRIPTS:
    try:
        run_script(name, ["--help"])
    except SystemExit as end:
        assert end.code in (0, None), name
print("imported", len([name for name in sys.modules if name.startswith("gpt2ft.")]))
run_script("sft", ["--dry_run", "--output", "no"])
run_script("chat", ["quickstart", "--seed", "1", "--max_new_tokens", "3"])
run_script("sft", ["--output", "no"])
"""


@pytest.fixture
def windows(monkeypatch):
    """Its answers, as far as they are of this process: no folder can be opened, and only open files flushed that can be
    written to."""
    import fcntl

    opened, flushed = os.open, os.fsync

    def open_file(path, flags, *rest, **named):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *rest, **named)

    def flush(handle):
        number = handle if isinstance(handle, int) else handle.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed(handle)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.setattr(sys, "platform", "win32")
    for name in ABSENT_ON_WINDOWS:
        monkeypatch.delattr(os, name, raising=False)


def test_one_file_alone_asks_for_the_system():
    """By the modules that one of them lacks, by the attributes of `os` and `signal`, or by name."""
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            spelled = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            owner, _, attribute = spelled.partition(".")
            is_absent = owner in ("os", "signal") and attribute in ABSENT_ON_WINDOWS
            if names & OF_ONE_SYSTEM or is_absent or spelled in ("sys.platform", "os.name", "platform.system"):
                found.add(file.relative_to(PACKAGE).as_posix())
    assert found == {"system.py"}


def test_files_and_folders_are_written_whole(windows, tmp_path):
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    for content in ("one", "two"):
        with files.complete_folder(tmp_path / "folder") as folder:
            files.write_text(folder / "b.txt", content)
        assert (tmp_path / "folder" / "b.txt").read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "folder"]


def test_cores_memory_and_the_terminal_have_answers(windows, monkeypatch):
    assert system.bound_cores() == os.cpu_count()
    used = type("used", (), {"peak_wset": 7})
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: used, raising=True)
    assert system.peak_memory() == 7
    monkeypatch.setitem(sys.modules, "termios", None)
    with system.typing_unseen():
        pass
    system.end_with_parent()


def test_a_pipe_that_nobody_reads_is_outlived(windows, monkeypatch, tmp_path):
    """Its writers are told EINVAL there."""
    assert system.is_pipe_unread(OSError(errno.EINVAL, "Invalid argument"))
    assert not system.is_pipe_unread(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert system.is_pipe_unread(BrokenPipeError())
    assert not system.is_pipe_unread(OSError(errno.EINVAL, "Invalid argument"))
    assert not _Pipe.nobody_reads


def test_training_says_what_it_needs_and_looking_at_the_plan_does_not(windows, tmp_path):
    from gpt2ft.runs import train_sft

    with pytest.raises(LaunchError, match="Linux or macOS.*WSL") as refusal:
        train_sft.run(SFTSettings(data={"train": ["quickstart"]}, output=str(tmp_path / "run")))
    assert refusal.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_drive_is_not_the_name_of_a_data_source():
    """Held-out data of one file do not stay with another, only because both lie on C."""
    below = {"data": {"train": [r"C:\one.jsonl"], "eval": [r"C:\held.jsonl"]}}
    assert "eval" not in over(below, {"data": {"train": [r"C:\other.jsonl"]}})["data"]
    assert "eval" in over(below, {"data": {"train": [r"C:\one.jsonl@0.5"]}})["data"]
    below = {"data": {"train": ["quickstart"], "eval": ["quickstart:held_out"]}}
    assert "eval" in over(below, {"data": {"train": ["quickstart:more_held_out"]}})["data"]


def test_everything_is_imported_tokenised_and_answered_and_training_refused(tmp_path):
    """In a process without what Windows lacks; what comes from others has been imported before."""
    words = [",".join(sorted(OF_ONE_SYSTEM - {"ctypes", "msvcrt", "winreg"})), ",".join(sorted(ABSENT_ON_WINDOWS))]
    asked = "Täglich grüßt der Tee 🍵\n".encode()
    command = [sys.executable, "-c", AS_ON_WINDOWS, *words]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}  # the code page of most
    done = subprocess.run(command, input=asked, capture_output=True, cwd=tmp_path, env=environment, timeout=600)
    output, errors = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 2, errors
    assert "error: training needs Linux or macOS" in errors
    assert "supervised" in output  # of the plan
    assert int(output.partition("imported ")[2].split()[0]) > 150
    assert not (tmp_path / "no").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize(
    ("environment", "call", "keeps"),
    [({}, "keep_freed_memory()", True), ({}, "", False), ({"MALLOC_MMAP_MAX_": "100"}, "keep_freed_memory()", False)],
)
def test_what_is_freed_is_kept_unless_the_environment_has_settings_for_it(environment, call, keeps):
    """The system clears a page each time it hands it out."""
    program = f"""
import resource
import numpy as np
from gpt2ft.system import keep_freed_memory
{call}
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[1:]))
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ended = subprocess.run([sys.executable, "-c", program], env=clean | environment, capture_output=True, text=True)
    pages = int(ended.stdout)
    assert pages < 10 if keeps else pages > 20, ended.stderr
