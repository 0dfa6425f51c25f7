"""Files and folders that are complete or absent, never half-written."""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2ft.system import sync_folder


def user_path(name: str) -> Path:
    """Return a path with its ~ expanded; a ~ that names nobody is taken as it stands."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def cache_root(setting: str | None) -> Path:
    """Return the folder of what can be made again: `data.cache`, else $GPT2FT_CACHE, else ~/.cache/gpt2ft."""
    return user_path(setting or os.environ.get("GPT2FT_CACHE") or str(Path.home() / ".cache" / "gpt2ft"))


@contextmanager
def failing_as(sentence: str) -> Iterator[None]:
    """Give an error of the system (a full disk, missing rights) a sentence that says what it was about.

    Its class and `errno` stay.
    """
    try:
        yield
    except OSError as error:
        if error.strerror is None or type(error).__module__ != "builtins":  # it has a sentence of its own
            raise
        told = type(error)(f"{sentence}: {error.strerror}")
        told.errno = error.errno
        raise told from error


@contextmanager
def synced(file: Path) -> Iterator[Path]:
    """Yield the name of a temporary file, which takes the name `file` once its content is on the disk."""
    temporary = _hidden(file, "tmp")
    with failing_as(f"{file} could not be written"):
        try:
            yield temporary
            with open(temporary, "r+b") as handle:  # Windows flushes only what can be written to
                os.fsync(handle.fileno())
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def read_text(file: Path) -> str:
    """Return the text of a file in UTF-8, without the byte order mark that some editors put before it.

    Raises:
        ValueError: if it is no UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text, but is not at byte {error.start}; copy it again") from error


def read_json(file: Path) -> Any:
    """Return the value in a JSON file that came from elsewhere; raise ValueError if it holds none."""
    text = read_text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{file} must be JSON, but is cut short or damaged{place}; copy it again") from error


def write_text(file: Path, text: str) -> None:
    """Write a file in UTF-8; a reader meets the old content or the new."""
    with synced(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON, as `write_text` does."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(file: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors of any device, as `write_text` does.

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
    """Return the permissions that new files are denied. They can only be read by setting them."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` if the block ends well, and vanishes if not.

    An older `folder` is replaced. A kill between the two renames leaves it under a hidden name, from which
    `restore_replaced` takes it back. A reader never meets half a folder.
    """
    temporary = _hidden(folder, "tmp")
    with failing_as(f"{folder} could not be written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        yield temporary
        with failing_as(f"{folder} could not be written"):
            sync_folder(temporary)
            if folder.exists():
                _replace(folder, temporary)
            else:
                os.rename(temporary, folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(folder: Path, new: Path) -> None:
    """Rename twice, as no system call replaces a folder; if the second fails, the first is taken back."""
    discarded = _hidden(folder, "old")
    os.rename(folder, discarded)
    try:
        os.rename(new, folder)
    except BaseException:
        os.rename(discarded, folder)
        raise
    shutil.rmtree(discarded)


def discard(folder: Path) -> None:
    """Remove a folder; a kill in the middle leaves no part of it under its name."""
    discarded = _hidden(folder, "tmp")
    with failing_as(f"{folder} could not be removed"):
        os.rename(folder, discarded)
        shutil.rmtree(discarded)


def _hidden(path: Path, ending: str) -> Path:
    """Return a name beside `path` that no other process uses: ids of processes are the same in several containers."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.{ending}")


def restore_replaced(parent: Path) -> None:
    """Give folders their name back that a process was replacing when it was killed, with nothing in their place."""
    for old in parent.glob(".*.old"):
        name = re.fullmatch(r"\.(.+)\.[0-9a-f]+\.old", old.name)
        if name and not os.path.lexists(parent / name[1]):
            os.rename(old, parent / name[1])


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while writing into `folder` have left behind."""
    restore_replaced(folder)
    for leftover in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def file_digest(file: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
