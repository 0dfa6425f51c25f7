"""Lock an output folder for one run at a time, by a lock of the system's that goes when its process does."""

import errno
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

from filelock import lock_descriptor

from gpt2ft.errors import SettingsError
from gpt2ft.text.display import print_row

NAME = ".lock"
SECONDS_FOR_ANOTHER_MACHINE = 120.0  # file servers take a while to give up the locks of a machine that is gone
SECONDS_BETWEEN_LOOKS = 0.5
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """A lock that is held from `hold` on, until `release`, or until this object or its process goes."""

    _of_this_process: ClassVar[WeakSet["FolderLock"]] = WeakSet()

    def __init__(self) -> None:
        self._handle: int | None = None
        self._of_this_process.add(self)

    def __del__(self) -> None:
        self.release()

    def hold(self, folder: Path) -> None:
        """Lock a folder, instead of the one that was locked before.

        A process on another machine is waited for: it may be gone with its machine, and the file server not know it
        yet. An earlier run of this process gives up its lock: it has ended, if only its traceback is still held. A
        folder whose file system has no locks is warned of.

        Raises:
            SettingsError: if another process holds it, naming host and process.
        """
        self.release()
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            for other in list(self._of_this_process):
                if other._handle is not None and os.path.sameopenfile(other._handle, handle):
                    other.release()
            _lock(handle, folder)
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            holder = {"host": socket.gethostname(), "process": os.getpid()}
            os.write(handle, f" {json.dumps(holder)}".encode())  # on Windows nobody else can read the first byte
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle

    def release(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        if not lock_descriptor(handle, blocking=False):
            _wait_for(handle, folder)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        print(f"warning: {folder} cannot be locked ({error.strerror}): start no second run in it", file=sys.stderr)


def _wait_for(handle: int, folder: Path) -> None:
    host, process = _holder(handle)
    is_elsewhere = host not in ("", socket.gethostname())
    if is_elsewhere:
        print_row("waiting", f"for the run in {folder} on {host} to end, or to be given up")
    deadline = time.monotonic() + (SECONDS_FOR_ANOTHER_MACHINE if is_elsewhere else 0.0)
    while not lock_descriptor(handle, blocking=False):
        if time.monotonic() >= deadline:
            raise SettingsError(
                f"another run trains in {folder} (process {process or 'unknown'} on {host or 'some machine'}): "
                "wait until it has ended, or use another `--output`"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _holder(handle: int) -> tuple[str, str]:
    """Return host and process, empty where they are not written yet."""
    os.lseek(handle, 1, os.SEEK_SET)
    try:
        holder = json.loads(os.read(handle, 4096))
        return str(holder["host"]), str(holder["process"])
    except (ValueError, KeyError, TypeError):
        return "", ""
