"""Differences between operating systems: no other file asks which one it runs on, or uses what one of them lacks.

Linux and macOS train; WSL is Linux. Windows tokenises, chats, serves and exports. It does not train: there a run could
not be told to stop and save (it has no SIGTERM), nor flush the entries of a folder, nor rename one with an open file.
"""

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# That ask a run to save and end; Windows has no SIGUSR1.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def training_problem() -> str | None:
    """Return why nothing can be trained on this system, and what to do; None if it can."""
    if sys.platform != "win32":
        return None
    return "training needs Linux or macOS: on Windows start it in WSL (`wsl --install`); chat and serve run without"


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder (names, not contents) to the disk, where the system opens folders."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def bound_cores() -> int:
    """Return the number of cores that this process is bound to; all where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next, unless the environment has settings of its own for it.

    It gives tensors of over 32 MiB back to the system, which clears each page of the next one: an eighth of the time of
    a step of 124M parameters on a CPU.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent dies, for launchers that do not pass it on. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def speak_utf8() -> None:
    """Have stdin, stdout and stderr be UTF-8 where they are not a terminal: on Windows they are in the local code
    page, which knows few characters."""
    if sys.platform == "win32":
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8")


def is_pipe_unread(error: OSError) -> bool:
    """Return True if a pipe could not be written to because nobody reads it."""
    return isinstance(error, BrokenPipeError) or (sys.platform == "win32" and error.errno == errno.EINVAL)


@contextmanager
def typing_unseen() -> Iterator[None]:
    """Keep what is typed within the block from being shown; it waits for the next prompt. Not on Windows."""
    try:
        import termios
    except ImportError:
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    unseen = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, unseen)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
