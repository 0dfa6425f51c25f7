"""What must hold before anything of a checkpoint is used: nothing it says is believed unchecked.

Digests find what a disk, a copy or a kill has done to a file. The rest finds what was whole but wrong when it was
written: links, JSON that is too large or too deep, tensors that do not match, values that are not finite.
"""

import json
import math
import stat
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2ft.errors import Gpt2ftError
from gpt2ft.files import file_digest

MAX_JSON_BYTES = 4 * 2**20  # of a JSON file and of the header of a file of tensors: real ones have some kilobytes
MAX_JSON_DEPTH = 32


class CheckpointError(Gpt2ftError):
    """A checkpoint that cannot be used; says which and why."""


def read_json(file: Path) -> Any:
    """The content of a JSON file of ordinary size and depth.

    Raises:
        CheckpointError: if it is none, or cannot be read.
    """
    check_regular(file)
    with _reading(file), open(file, "rb") as handle:
        content = handle.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} must have at most {MAX_JSON_BYTES:,} bytes, but has more")
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise CheckpointError(f"{file} must be nested at most {MAX_JSON_DEPTH} deep, but is nested deeper") from None
    except ValueError as error:
        raise CheckpointError(f"{file} must be a JSON file, but does not parse: {error}") from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for parent in level for child in _children(parent)]
    if level:
        raise CheckpointError(f"{file} must be nested at most {MAX_JSON_DEPTH} deep, but is nested deeper")
    return value


def shown(value: Any) -> str:
    """A value read from a file, for a sentence: short, and on one line."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_regular(file: Path) -> int:
    """Raises CheckpointError unless a regular file has this name itself: no link, folder or pipe. Returns its size."""
    with _reading(file):
        status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file} must be a file, but is {_kind(status)}")
    return status.st_size


def check_folder(folder: Path) -> None:
    """Raises CheckpointError unless a folder has this name itself."""
    with _reading(folder):
        status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{folder} must be a folder, but is {_kind(status)}")


def check_contents(manifest_file: Path, names: Set[str]) -> None:
    """Raises CheckpointError unless a manifest lists these names and each file beside it is as it states."""
    manifest = read_json(manifest_file)
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{manifest_file} must hold an object, but holds {shown(manifest)}")
    if manifest.keys() != names:
        lacking = ", ".join(sorted(names - manifest.keys()))
        extra = ", ".join(shown(name) for name in sorted(manifest.keys() - names)[:3])
        but = " and ".join([*([f"lacks {lacking}"] if lacking else []), *([f"also lists {extra}"] if extra else [])])
        raise CheckpointError(f"{manifest_file} must list {', '.join(sorted(names))}, but {but}")
    for name in sorted(names):
        entry, file = manifest[name], manifest_file.with_name(name)
        if not _is_entry(entry):
            raise CheckpointError(
                f"{manifest_file} must state `bytes` and `sha256` of {name}, but states {shown(entry)}"
            )
        size = check_regular(file)
        if size != entry["bytes"]:
            raise CheckpointError(f"{file} is damaged: the manifest states {entry['bytes']} bytes, but it has {size}")
        with _reading(file):
            digest = file_digest(file)
        if digest != entry["sha256"]:
            raise CheckpointError(f"{file} is damaged: its content is not what the manifest states")


def check_tensors(weights: Path, mean: Path, mean_of_squares: Path) -> None:
    """Raises CheckpointError unless all three hold float32 of the same names and shapes, and only possible values.

    One tensor at a time is looked at, where it lies: files of any size take little memory.
    """
    expected = _layout(weights)
    if not expected:
        raise CheckpointError(f"{weights} must hold the weights that are trained, but holds none")
    for name, tensor in expected.items():
        if not tensor.startswith("F32 "):
            raise CheckpointError(f"{weights}: {shown(name)} must be F32, but is {tensor}")
    for file in (mean, mean_of_squares):
        found = _layout(file)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise CheckpointError(
                    f"{file}: {shown(name)} must be {expected.get(name, 'absent')}, as in {weights.name}, "
                    f"but is {found.get(name, 'absent')}"
                )
    _check_range(weights, -math.inf)
    _check_range(mean, -math.inf)
    _check_range(mean_of_squares, 0.0)


def _layout(file: Path) -> dict[str, str]:
    """What the header of a file of tensors says of each: `F32 [2, 3]`, by name."""
    with _tensors(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no dict)
        return {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in slices.items()}


def _check_range(file: Path, lowest: float) -> None:
    with _tensors(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 (no dict)
            tensor = tensors.get_tensor(name)
            if not tensor.numel():
                continue
            least, most = (float(end) for end in tensor.aminmax())  # both are NaN if one value is
            if not (math.isfinite(least) and math.isfinite(most)):
                raise CheckpointError(f"{file}: {shown(name)} holds values that are not finite")
            if least < lowest:
                raise CheckpointError(f"{file}: {shown(name)} must not be negative, but holds {least:g}")


@contextmanager
def _tensors(file: Path) -> Iterator[Any]:
    """A file of tensors, opened by its header; no tensor is read before it is asked for."""
    from safetensors import SafetensorError, safe_open

    with _reading(file), open(file, "rb") as handle:
        header = int.from_bytes(handle.read(8), "little")
    if header > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} must have a header of at most {MAX_JSON_BYTES:,} bytes, but states {header:,}")
    try:
        with _reading(file), safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise CheckpointError(f"{file} must be a safetensors file, but is not readable: {error}") from error


def _is_entry(entry: Any) -> bool:
    is_shaped = isinstance(entry, Mapping) and entry.keys() == {"bytes", "sha256"}
    return is_shaped and type(entry["bytes"]) is int and isinstance(entry["sha256"], str)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _kind(status: Any) -> str:
    kinds = {stat.S_ISLNK: "a link", stat.S_ISDIR: "a folder", stat.S_ISREG: "a file"}
    return next((kind for is_it, kind in kinds.items() if is_it(status.st_mode)), "a pipe or a device")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Has what fails while reading say in one sentence of what."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
