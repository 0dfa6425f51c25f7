"""One run at a time in an output folder: a lock of the kernel's, which goes when the process that holds it does."""

import errno
import json
import os
import socket
import sys
import time
from pathlib import Path

from gpt2ft.errors import SettingsError

NAME = ".lock"
SECONDS_FOR_ANOTHER_MACHINE = 120.0  # servers of files take a while to give up the locks of one that is gone
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """Held from `hold` on, until `release`, or until this object or its process goes."""

    def __init__(self) -> None:
        self._handle: int | None = None

    def __del__(self) -> None:
        self.release()

    def hold(self, folder: Path) -> None:
        """Locks a folder, instead of the one that was locked before.

        A process on another machine is waited for: it may be gone with its machine, which the server of files does not
        know yet. File systems without locks are warned of.

        Raises:
            SettingsError: if another process holds it; says which.
        """
        self.release()
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _is_locked(handle, folder):
                _wait_for(handle, folder)
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _is_locked(handle: int, folder: Path) -> bool:
    """Whether nobody else has it now, which nobody can know where there are no locks."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return True
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in UNSUPPORTED:
            raise
        print(f"warning: {folder} cannot be locked ({error.strerror}): start no second run in it", file=sys.stderr)
    return True


def _wait_for(handle: int, folder: Path) -> None:
    host, process = _holder(handle)
    is_elsewhere = host not in ("", socket.gethostname())
    if is_elsewhere:
        print(f"waiting   for the run in {folder} on {host} to end, or to be given up", flush=True)
    until = time.monotonic() + (SECONDS_FOR_ANOTHER_MACHINE if is_elsewhere else 0.0)
    while not _is_locked(handle, folder):
        if time.monotonic() >= until:
            raise SettingsError(
                f"another run trains in {folder} (process {process or 'unknown'} on {host or 'some machine'}): "
                "wait until it has ended, or use another `--output`"
            )
        time.sleep(min(0.5, SECONDS_FOR_ANOTHER_MACHINE))


def _holder(handle: int) -> tuple[str, str]:
    """Host and process; empty where they are not written yet."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        return str(holder["host"]), str(holder["process"])
    except (ValueError, KeyError, TypeError):
        return "", ""
