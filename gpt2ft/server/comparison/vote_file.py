"""The file of votes: one line for each, and every line whole, whoever else writes and whatever fails.

It is opened and locked for each vote, so that several servers may share it and it may be moved away at any time.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from gpt2ft.files import failing_as
from gpt2ft.system import sync_folder

_KEYS = ("prompt", "chosen", "rejected")
_OPENING = b'{"prompt":'  # of a line that was written here


class VoteFile:
    """Preferences in the layout that training reads.

    Attributes:
        count: the votes that were in the file at the start, and those stored since.
    Raises:
        OSError: if it cannot be written.
        ValueError: if it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as file:
            self.count = _count_votes(file, path)
            _mend_end(file, path)
        sync_folder(path.parent)

    def append(self, vote: Mapping[str, Any]) -> None:
        """Store a vote on the disk.

        Raises:
            OSError, ValueError: if it cannot be; the file is then as it was.
        """
        line = json.dumps(vote, ensure_ascii=False).encode() + b"\n"
        with self._locked() as file:
            _mend_end(file, self.path)
            _write(file, line)
        self.count += 1

    @contextmanager
    def _locked(self) -> Iterator[FileIO]:
        with failing_as(f"{self.path} could not be written"), open(self.path, "a+b", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{self.path} must be a file on a disk, but is none")
            lock_descriptor(file.fileno())
            yield file


def _count_votes(file: FileIO, path: Path) -> int:
    """Return the number of votes; raise ValueError if a line is none. The last one may have been cut off by a kill."""
    file.seek(0)
    *lines, last = file.readall().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip() and not _is_vote(line):
            raise ValueError(f"{path} must hold votes, one a line, but line {number} is none: name another file")
    return sum(map(_is_vote, (*lines, last)))


def _mend_end(file: FileIO, path: Path) -> None:
    """End the last line if it is whole, and remove it if a kill has cut it off: it was never reported as stored."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) in (b"", b"\n"):
        return
    file.seek(0)
    content = file.readall()
    begin = content.rfind(b"\n") + 1
    last = content[begin:]
    if _is_vote(last):
        _write(file, b"\n")
    elif last.startswith(_OPENING) or _OPENING.startswith(last):
        file.truncate(begin)
    else:
        raise ValueError(f"{path} must hold votes, one a line, but its last line is none: name another file")


def _write(file: FileIO, line: bytes) -> None:
    """Write a line to the disk, or nothing of it."""
    size = file.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(size)
        raise


def _is_vote(line: bytes) -> bool:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(key in found for key in _KEYS)
