"""Files of data: one, or those of a folder and its subfolders in the order of their names.

A folder holds records or documents: of .txt and .md files beside others (README.md, LICENSE.txt), nothing is read.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

from gpt2ft.data.blocks import FILE_KINDS, TEXT_KINDS, Columns, RecordBlock, kind_of
from gpt2ft.data.reading import DataError
from gpt2ft.data.records import read_file
from gpt2ft.files import file_digest

KINDS_FOR_PEOPLE = f"{', '.join(TEXT_KINDS)} (each also with .gz), .parquet or .arrow"
_DOCUMENTS = (".txt", ".md")
_MOST_NAMED = 5  # files that are not read
# In folders written by `save_to_disk`, and in clones of data sets on the hub.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT = re.compile(r"((?:train|test|validation|valid|val|dev|eval)(?:_[a-z]+)?)(?:-\d{5}-of-\d{5})?\.", re.I)


@dataclass(frozen=True)
class Files:
    """One file, or the files of a folder and its subfolders in the order of their names."""

    place: str
    files: tuple[Path, ...]
    is_folder: bool = False
    documents: Literal["file", "line"] = "file"  # what is one in files of text
    not_read: tuple[Path, ...] = ()  # other files of the folder

    @cached_property
    def size(self) -> int | None:
        """Bytes, where the blocks will add up to them."""
        plain = all(file.name.lower().endswith(TEXT_KINDS) for file in self.files)
        return sum(file.stat().st_size for file in self.files) if plain else None

    def digest(self) -> str:
        """Return the sha256 of the contents; the names of single files do not matter, but for how they are read."""
        digests = [file_digest(file) + _reading_of(file) for file in self.files]
        says_it_all = len(digests) == 1 and not _reading_of(self.files[0])
        return digests[0] if says_it_all else hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def blocks(self, columns: Columns) -> Iterator[RecordBlock]:
        return chain.from_iterable(read_file(file, columns, self.documents) for file in self.files)

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for people on the files that are not read."""
        if not self.not_read:
            return ()
        names = [str(file.relative_to(self.place)) for file in self.not_read]
        more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
        return (f"not read: {', '.join(names[:_MOST_NAMED])}{more}",)


def open_files(source: str, path: Path, documents: Literal["file", "line"]) -> Files:
    """Return the files of a path.

    Raises:
        DataError: if it holds no data, or those of several splits.
    """
    if not path.is_dir():
        if not is_data(path):
            raise DataError(
                f"data source {source!r} must be a file that ends in {KINDS_FOR_PEOPLE}, but is another kind of file"
            )
        return Files(str(path), (path,), documents=documents)
    files, others = _files_in(path)
    if not files:
        raise DataError(
            f"data source {source!r} must be a folder with files that end in {KINDS_FOR_PEOPLE}, but holds none"
        )
    return Files(str(path), files, True, documents, others)


def is_data(file: Path) -> bool:
    return file.is_file() and file.name.lower().endswith(FILE_KINDS) and not file.name.startswith(".")


def _reading_of(file: Path) -> str:
    """Return what tells files of the same content apart: nothing where that says it all."""
    kind = kind_of(file)
    return "" if kind in (".jsonl", ".parquet", ".arrow") else ".txt" if kind in _DOCUMENTS else kind


def _files_in(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the data files of a folder and those that are not read; hidden files, metadata, and what `datasets` caches
    beside a table are neither.

    Raises:
        DataError: if a file is missing that the folder of a saved data set names, or files are of several splits.
    """
    visible = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    cached: set[Path] = set()
    for state in (file for file in visible if file.name == "state.json"):
        saved = {state.parent / name for name in _saved(state)}
        for file in sorted(saved):
            if not file.is_file():
                raise DataError(f"{file}: must be there, as {state.name} names it, but is missing")
        cached.update(set(state.parent.glob("*.arrow")) - saved if saved else ())
    visible = [file for file in visible if file.name not in METADATA and file not in cached]
    data = [file for file in visible if is_data(file)]
    records = [file for file in data if kind_of(file) not in _DOCUMENTS]
    files = records or data
    splits = sorted({_split(file, folder) for file in files} - {""})
    if len(splits) > 1:
        raise DataError(
            f"{folder}: must hold one split, but holds {', '.join(splits)}: name the folder or files of one"
        )
    return tuple(files), tuple(file for file in visible if file not in set(files))


def _split(file: Path, folder: Path) -> str:
    """Return the split that a file is of, by the folders below `folder` or by its own name; "" for all others."""
    if (file.parent.parent / "dataset_dict.json").is_file():
        return file.parent.name
    folders = (f"{name}." for name in file.relative_to(folder).parts[:-1])
    named = next(filter(None, map(_SPLIT.match, (*folders, file.name))), None)
    return named[1].lower() if named else ""


def _saved(state: Path) -> list[str]:
    """Return the names of the tables beside a state.json that `save_to_disk` has written, none if it is another's.

    Raises:
        DataError: if the data set is some rows of its tables only, as old versions of `datasets` saved it.
    """
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in found["_data_files"]]
    except (ValueError, KeyError, TypeError):
        return []
    if found.get("_indices_data_files"):
        raise DataError(
            f"{state}: must name no `_indices_data_files`, but does: load and save it with a newer `datasets`"
        )
    return names
