"""From the name of a data source to its conversation trees.

    oasst1, oasst2               the Hugging Face hub, at a pinned revision; `oasst1:validation` is another split
    quickstart                   the small set that comes with gpt2ft; `quickstart:held_out` is for evaluation
    my/trees.jsonl               a file: .jsonl, .jsonl.gz or .parquet

Nothing here knows of tokens.
"""

import difflib
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2ft import quickstart
from gpt2ft.conversation import MessageTree
from gpt2ft.data.oasst import FLAT_KEYS, DataError, Filters, Reading, Totals, read_oasst
from gpt2ft.files import file_digest

__all__ = ["SOURCES", "DataError", "Filters", "HubSource", "Totals", "read_trees", "source_digest"]

FILE_KINDS = (".jsonl", ".jsonl.gz", ".parquet")
ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class HubSource:
    """One split of a dataset on the hub. The revision is a commit, so the data never changes."""

    repo: str
    revision: str
    split: str = "train"
    splits: tuple[str, ...] = ("train", "validation")

    @property
    def place(self) -> str:
        return f"{self.repo}@{self.revision[:8]} {self.split}"


SOURCES = {
    "oasst1": HubSource("OpenAssistant/oasst1", "fdf72ae0827c1cda404aff25b6603abec9e3399b"),
    "oasst2": HubSource("OpenAssistant/oasst2", "179dd21fc55192153d94adb0e0ce8f69e222bf75"),
}
BUNDLED = {"quickstart": quickstart.TREES, "quickstart:held_out": quickstart.HELD_OUT}


def read_trees(
    source: str, filters: Filters, dropped: Counter[str], totals: Totals | None = None
) -> Iterator[MessageTree]:
    """The trees of one source that pass the filters.

    `dropped` (messages by reason) and `totals` are added to, and complete once the iterator is exhausted;
    messages read = messages kept + messages dropped, where a malformed line is not a message read.

    Raises:
        DataError: at once if there is no such source; while iterating if its data are malformed.
    """
    origin = _locate(source)
    name = source if _is_named(source) else _stem(Path(source))
    place = origin.place if isinstance(origin, HubSource) else str(origin)
    reading = Reading(name, place, filters, dropped, totals or Totals())
    return read_oasst(_records(origin, reading), reading)


def source_digest(source: str) -> str:
    """sha256 of a file's content, or of repo, revision and split for the hub, which takes no network."""
    origin = _locate(source)
    if isinstance(origin, HubSource):
        return hashlib.sha256(f"{origin.repo}@{origin.revision}:{origin.split}".encode()).hexdigest()
    return file_digest(origin)


# --- names ----------------------------------------------------------------------------------------------------------


def _is_named(source: str) -> bool:
    return source.partition(":")[0] in (*SOURCES, *BUNDLED)


def _locate(source: str) -> HubSource | Path:
    name, _, split = source.partition(":")
    if name in SOURCES:
        return _hub_split(source, SOURCES[name], split)
    if name in BUNDLED:
        if source not in BUNDLED:
            raise DataError(f"data source {source!r} must be one of {', '.join(BUNDLED)}")
        return _existing_file(source, BUNDLED[source])
    return _existing_file(source, Path(source).expanduser())


def _hub_split(source: str, hub: HubSource, split: str) -> HubSource:
    split = split or hub.split
    if split not in hub.splits:
        splits = " or ".join(hub.splits)
        raise DataError(f"data source {source!r} must name the split {splits}, but names {split!r}")
    return replace(hub, split=split)


def _existing_file(source: str, file: Path) -> Path:
    if not file.exists():
        raise DataError(f"data source {source!r} must be a name or a file, but no such file exists; {_nearest(file)}")
    if not file.is_file() or not file.name.lower().endswith(FILE_KINDS):
        kind = "a folder" if file.is_dir() else "another kind of file"
        raise DataError(f"data source {source!r} must be a file that ends in {', '.join(FILE_KINDS)}, but is {kind}")
    return file


def _nearest(file: Path) -> str:
    beside = sorted(file.parent.iterdir()) if file.parent.is_dir() else []
    candidates = {other.name: str(other) for other in beside if other.name.lower().endswith(FILE_KINDS)}
    candidates |= {name: name for name in (*SOURCES, *BUNDLED)}
    near = difflib.get_close_matches(file.name, candidates, n=1)
    return f"did you mean {candidates[near[0]]!r}?" if near else f"the names are {', '.join((*SOURCES, *BUNDLED))}"


def _stem(file: Path) -> str:
    return next(file.name[: -len(kind)] for kind in FILE_KINDS if file.name.lower().endswith(kind))


# --- records: (where it stands, the record) -------------------------------------------------------------------------


def _records(origin: HubSource | Path, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(origin, HubSource):
        return _numbered(_hub_batches(origin), reading.place)
    if origin.name.lower().endswith(".parquet"):
        return _numbered(_parquet_batches(origin), reading.place)
    return _json_lines(origin, reading)


def _json_lines(file: Path, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """Blank lines hold nothing and are passed over."""
    try:
        with gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{reading.place}:{number}"
                record = _parse(line) if line.strip() else None
                if isinstance(record, dict):
                    yield where, record
                elif record is not None:
                    reading.refuse(where, record)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{reading.place}: must be a whole and readable file, but is not: {error}") from error


def _parse(line: bytes) -> dict[str, Any] | str:
    """The object on a line, or what is wrong with the line."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"must be UTF-8 text, but is not at byte {error.start + 1}"
    except RecursionError:
        return "must not nest this deep; write long conversations as flat messages with `parent_id`"
    except json.JSONDecodeError as error:
        return f"must be one JSON object, but does not parse: {error.msg} at column {error.colno}"
    except ValueError as error:
        return f"must be one JSON object, but does not parse: {error}"
    return record if isinstance(record, dict) else f"must be a JSON object, but is {json.dumps(record)[:60]}"


def _numbered(batches: Iterable[list[dict[str, Any]]], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = (row for batch in batches for row in batch)
    for number, row in enumerate(rows, start=1):
        yield f"{place}: row {number}", row


def _columns(names: list[str]) -> list[str]:
    """Of a table of flat messages only what is read: its labels and the like take longer than the rest."""
    return [name for name in names if name in FLAT_KEYS] if "message_id" in names else names


def _parquet_batches(file: Path) -> Iterator[list[dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(ROWS_PER_BATCH, columns=_columns(table.schema_arrow.names)):
                yield batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: must be a whole and readable parquet file, but is not: {error}") from error


def _hub_batches(hub: HubSource) -> Iterator[list[dict[str, Any]]]:
    import datasets

    try:
        dataset = datasets.load_dataset(hub.repo, revision=hub.revision, split=hub.split)
        _check_revision(hub, dataset.cache_files)
    except Exception as error:  # a network and a cache fail in many classes; each ends here, with its own words
        cache, cause = datasets.config.HF_DATASETS_CACHE, " ".join(str(error).split())
        raise DataError(
            f"{hub.place}: must be on the hub or in the cache ({cache}), but could not be loaded: {cause}; without "
            f"network, download the .parquet file of the split {hub.split!r} elsewhere, from "
            f"https://huggingface.co/datasets/{hub.repo}/tree/{hub.revision}, and give its path in data.train or "
            "data.eval instead of the name"
        ) from error
    dataset = dataset.select_columns(_columns(dataset.column_names)).with_format("arrow")
    for batch in dataset.iter(ROWS_PER_BATCH):
        yield batch.to_pylist()


def _check_revision(hub: HubSource, cache_files: list[dict[str, str]]) -> None:
    """Without network, `datasets` takes whatever revision is in its cache; its folder is named by the commit."""
    for cache_file in cache_files:
        found = Path(cache_file["filename"]).parent.name
        if found != hub.revision:
            raise DataError(f"the cache holds revision {found} instead of {hub.revision}")
