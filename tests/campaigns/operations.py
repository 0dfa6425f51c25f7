"""Count what a process does to files below a folder, and have something happen at one of these operations.

Operations are calls of Python's: open for writing, write, fsync, rename, replace, unlink, rmdir, mkdir, chmod; a file's
content, also that of tensors, comes in two halves. What the process only reads does not count.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

NAMES = ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "chmod")


class Operations:
    """From `watch` on, for the rest of the process: `before` and `after` are called with (number, name, path).

    What `before` raises is raised in place of the operation.
    """

    def __init__(self, root: Path, before: Callable, after: Callable) -> None:
        self.root, self.before, self.after = str(root), before, after
        self.number = 0
        self.is_inside = False  # of an operation: those that it consists of do not count

    def watch(self) -> None:
        for name in NAMES:
            setattr(os, name, self._watched(name, getattr(os, name)))
        whole_open, whole_save = io.open, safetensors.torch.save_file

        def open_(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if mode[0] not in "wax" or not self._is_ours(file):
                return whole_open(file, mode, *arguments, **options)
            handle = self._perform("open", file, lambda: whole_open(file, mode, *arguments, **options))
            return InHalves(handle, lambda half, write: self._perform(f"write {half}", file, write))

        def save_file(tensors: Any, file: Any, metadata: Any = None) -> None:
            if not self._is_ours(file):
                return whole_save(tensors, file, metadata)
            content = safetensors.torch.save(tensors, metadata)
            half = len(content) // 2
            self._perform("save_file 1/2", file, lambda: Path(file).write_bytes(content[:half]))
            return self._perform("save_file 2/2", file, lambda: whole_save(tensors, file, metadata))

        io.open = open_
        __builtins__["open"] = open_
        safetensors.torch.save_file = save_file

    def _watched(self, name: str, operation: Callable) -> Callable:
        def watched(*arguments: Any, **options: Any) -> Any:
            reads = name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR)
            if reads or not self._is_ours(arguments[0], options.get("dir_fd")):
                return operation(*arguments, **options)
            return self._perform(name, arguments[0], lambda: operation(*arguments, **options))

        return watched

    def _is_ours(self, path: Any, folder: int | None = None) -> bool:
        """Return True for a path, a path within an open folder, or an open file below the root."""
        if self.is_inside:
            return False
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        return os.fspath(path).startswith(self.root)

    def _perform(self, name: str, path: Any, operation: Callable) -> Any:
        self.number += 1
        self.before(self.number, name, path)
        self.is_inside = True
        try:
            result = operation()
        finally:
            self.is_inside = False
        self.after(self.number, name, path)
        return result


class InHalves:
    """A file opened for writing; each write of its content is two, the first of which reaches the system."""

    def __init__(self, handle: Any, perform: Callable) -> None:
        self.handle, self.perform = handle, perform

    def write(self, content: Any) -> int:
        half = len(content) // 2
        self.perform("1/2", lambda: (self.handle.write(content[:half]), self.handle.flush()))
        self.perform("2/2", lambda: (self.handle.write(content[half:]), self.handle.flush()))
        return len(content)

    def __enter__(self) -> "InHalves":
        return self

    def __exit__(self, *error: Any) -> None:
        self.handle.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)
