"""Files and folders that are complete or absent, never half-written."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def user_path(name: str) -> Path:
    """A path as people write it; what begins with a ~ that means nothing is taken as it stands."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


@contextmanager
def synced(file: Path) -> Iterator[Path]:
    """Yields a temporary file's name beside `file`; what is written there takes its name once it is on the disk."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    with synced(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(file: Path, tensors: Mapping[str, Any]) -> None:
    """Like `write_text`, for tensors of any device.

    Raises:
        OSError: also where the library reports a full disk in an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with synced(file) as temporary:
        try:
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file} could not be written: {error}") from error
        temporary.chmod(0o666 & ~_umask())  # the library lets the owner alone read it


def _umask() -> int:
    """What new files are denied; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `folder` if the block ends well, and vanishes if not.

    An older `folder` is replaced; a kill between the two renames leaves it under a hidden name. A reader never
    meets half a folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        if folder.exists():
            discarded = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            os.rename(folder, discarded)
            os.rename(temporary, folder)
            shutil.rmtree(discarded)
        else:
            os.rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed while writing into `folder` have left behind."""
    for leftover in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def sync_folder(folder: Path) -> None:
    """Flushes the entries of a folder (names, not contents) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(file: Path) -> str:
    """sha256 of a file's content."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
