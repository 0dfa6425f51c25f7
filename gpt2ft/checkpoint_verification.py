"""Checks of a checkpoint before anything in it is used.

Digests find files that a disk, a copy or a kill has damaged. The other checks find files that were wrong when they were
written: links, JSON that is too large or too deep, tensors that do not match, values that are not finite. A check that
fails raises a CheckpointError that names the file.
"""

import json
import math
import stat
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpt2ft.errors import Gpt2ftError
from gpt2ft.files import file_digest

MAX_JSON_BYTES = 4 * 2**20  # real ones have some kilobytes
MAX_JSON_DEPTH = 32


class CheckpointError(Gpt2ftError):
    """A checkpoint that cannot be used."""


def check_kind(path: Path, kind: str) -> int:
    """Check that a path is a file or a folder itself, and return its size: a link may lead anywhere, a pipe blocks.

    Args:
        kind: "a file" or "a folder".
    """
    with _reading(path):
        status = path.lstat()
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"}
    found = kinds.get(stat.S_IFMT(status.st_mode), "a pipe or a device")
    if found != kind:
        raise CheckpointError(f"{path} must be {kind}, but is {found}")
    return status.st_size


def read_json(file: Path) -> Any:
    """Return the content of a JSON file of ordinary size and depth."""
    if check_kind(file, "a file") > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} must have at most {MAX_JSON_BYTES:,} bytes, but has more")
    try:
        with _reading(file):
            value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} must be a JSON file, but does not parse: {error}") from error
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise CheckpointError(f"{file} must be nested at most {MAX_JSON_DEPTH} deep, but is nested deeper")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_deeper(child, levels - 1) for child in children)


def shown(value: Any) -> str:
    """Return a value read from a file as it can stand in a message: short, and on one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def manifest_entry(file: Path) -> dict[str, Any]:
    """Return size and digest of a file, as a manifest states them."""
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def check_manifest(manifest_file: Path, names: Set[str]) -> None:
    """Check that a manifest lists exactly these names, and that each file beside it is as it states."""
    manifest = read_json(manifest_file)
    if not isinstance(manifest, dict) or manifest.keys() != names:
        raise CheckpointError(f"{manifest_file} must list {', '.join(sorted(names))}, but holds {shown(manifest)}")
    for name in sorted(names):
        stated, file = manifest[name], manifest_file.with_name(name)
        size = check_kind(file, "a file")
        has_size = isinstance(stated, dict) and stated.get("bytes") == size  # if not, it may be too large to digest
        with _reading(file):
            found = manifest_entry(file) if has_size else {"bytes": size}
        if repr(found) != repr(stated):  # == takes 1.0 and True for 1
            raise CheckpointError(f"{file} is damaged: the manifest states {shown(stated)}, but it has {shown(found)}")


def check_tensors(weights: Path, mean: Path, mean_of_squares: Path) -> None:
    """Check that all three hold finite float32 of the same names and shapes, and that no square is negative."""
    expected = _shapes(weights)
    if not expected:
        raise CheckpointError(f"{weights} must hold the weights that are trained, but holds none")
    for file, found in ((mean, _shapes(mean)), (mean_of_squares, _shapes(mean_of_squares, lowest=0.0))):
        for name in sorted(expected.keys() | found.keys()):
            wanted, shape = expected.get(name, "absent"), found.get(name, "absent")
            if shape != wanted:
                raise CheckpointError(f"{file}: {shown(name)} must be {wanted}, as in {weights.name}, but is {shape}")


def _shapes(file: Path, lowest: float = -torch.finfo(torch.float32).max) -> dict[str, list[int]]:
    """Return the shape of each tensor by name; refuse what is not float32, not finite or below `lowest`.

    Tensors are looked at one by one, where they lie on the disk: a file of any size takes little memory.
    """
    from safetensors import SafetensorError, safe_open

    shapes = {}
    try:
        with _reading(file), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no dict)
                tensor = tensors.get_tensor(name)
                if tensor.dtype != torch.float32:
                    raise CheckpointError(f"{file}: {shown(name)} must be float32, but is {tensor.dtype}")
                least, most = map(float, tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
                if not lowest <= least <= most < math.inf:  # NaN in one value makes both ends NaN
                    must = "must be finite" if lowest else "must be finite and not negative"
                    raise CheckpointError(f"{file}: {shown(name)} {must}, but reaches from {least:g} to {most:g}")
                shapes[name] = list(tensor.shape)
    except SafetensorError as error:
        raise CheckpointError(f"{file} must be a safetensors file, but is not readable: {error}") from error
    return shapes


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn an OSError within the block into a CheckpointError that names the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
