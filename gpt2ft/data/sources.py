"""From the name of a data source to its conversation trees.

    oasst1, hh-rlhf, ...         the Hugging Face hub, at a pinned revision; `oasst1:validation` is another split
    quickstart                   the small set that comes with gpt2ft; `quickstart:held_out` is for evaluation
    my/trees.jsonl               a file: .jsonl, .jsonl.gz, .json, .parquet or .arrow
    my/folder                    all such files in it and below it, in the order of their names

Nothing here knows of tokens.
"""

import difflib
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from gpt2ft import quickstart
from gpt2ft.conversation import MessageTree
from gpt2ft.data.formats import AnyFormat, columns_to_read, detect, oasst
from gpt2ft.data.kinds import CONVERSATIONS, DataKind
from gpt2ft.data.reading import DataError, Malformed, ReadContext, Record, Trees, show
from gpt2ft.data.records import FILE_KINDS, Columns, Parsed, RecordBlock, read_file, read_table, stem
from gpt2ft.files import file_digest, user_path
from gpt2ft.settings.sections import FilterSettings


@dataclass(frozen=True)
class HubSource:
    """One split of a dataset on the hub. The revision is a commit, so the data never changes."""

    repo: str
    revision: str
    split: str = "train"
    splits: tuple[str, ...] = ("train",)
    config: str | None = None

    @property
    def place(self) -> str:
        return f"{self.repo}@{self.revision[:8]} {self.split}"

    @property
    def size(self) -> None:
        """Bytes, which are not known before it is loaded."""

    def digest(self) -> str:
        """Return a digest of the revision, which takes no network."""
        config = f"/{self.config}" if self.config else ""
        return hashlib.sha256(f"{self.repo}{config}@{self.revision}:{self.split}".encode()).hexdigest()

    def blocks(self, columns: Columns) -> Iterator[RecordBlock]:
        return read_table(_load(self), self.place, columns)


SOURCES = {
    "oasst1": HubSource(
        "OpenAssistant/oasst1", "fdf72ae0827c1cda404aff25b6603abec9e3399b", splits=("train", "validation")
    ),
    "oasst2": HubSource(
        "OpenAssistant/oasst2", "179dd21fc55192153d94adb0e0ce8f69e222bf75", splits=("train", "validation")
    ),
    "smoltalk": HubSource(
        "HuggingFaceTB/smoltalk", "5feaf2fd3ffca7c237fc38d1861bc30365d48ffa", splits=("train", "test"), config="all"
    ),
    "ultrachat": HubSource(
        "HuggingFaceH4/ultrachat_200k",
        "8049631c405ae6576f93f445c6b8166f76f5505a",
        split="train_sft",
        splits=("train_sft", "test_sft"),
    ),
    "alpaca": HubSource("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017"),
    "dolly": HubSource("databricks/databricks-dolly-15k", "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"),
    # preferences
    "hh-rlhf": HubSource(
        "Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa", splits=("train", "test")
    ),  # helpful and harmless
    "ultrafeedback": HubSource("openbmb/UltraFeedback", "40b436560ca83a8dba36114c22ab3c66e43f6d5e"),
    "ultrafeedback-binarized": HubSource(
        "HuggingFaceH4/ultrafeedback_binarized",
        "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
        split="train_prefs",
        splits=("train_prefs", "test_prefs"),
    ),
}
# In folders written by `save_to_disk`, and in clones of data sets on the hub.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT = re.compile(r"((?:train|test|validation|valid|val|dev|eval)(?:_[a-z]+)?)(?:-\d{5}-of-\d{5})?\.")
BUNDLED = {
    "quickstart": quickstart.TREES,
    "quickstart:held_out": quickstart.HELD_OUT,
    "quickstart:more": quickstart.MORE_TREES,
    "quickstart:more_held_out": quickstart.MORE_HELD_OUT,
    "quickstart:replies": quickstart.REPLIES,  # on one topic, for `data.topic_replies`
    "quickstart:rain": quickstart.RAIN,  # on another
}


@dataclass(frozen=True)
class Files:
    """One file, or the files of a folder and its subfolders in the order of their names."""

    place: str
    files: tuple[Path, ...]
    is_folder: bool = False

    @cached_property
    def size(self) -> int | None:
        """Bytes, where the blocks will add up to them."""
        plain = all(file.name.lower().endswith((".jsonl", ".json")) for file in self.files)
        return sum(file.stat().st_size for file in self.files) if plain else None

    def digest(self) -> str:
        """Return the sha256 of the contents; the names of single files do not matter."""
        digests = [file_digest(file) for file in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def blocks(self, columns: Columns) -> Iterator[RecordBlock]:
        return chain.from_iterable(read_file(file, columns) for file in self.files)


Origin = HubSource | Files


@dataclass(frozen=True)
class Shard:
    """Some trees of a source, which any process can read alone."""

    size: int  # bytes, as far as known
    trees: Trees


@dataclass(frozen=True)
class Source:
    """One data source: its name, where it lies, and the kind of data it is read as."""

    name: str
    origin: Origin
    kind: DataKind = CONVERSATIONS
    ignore_keys: tuple[str, ...] = ()  # at every level of a record

    @cached_property
    def format(self) -> AnyFormat:
        """Format of the first record that has one.

        Raises:
            DataError: if none has.
        """
        lenient = ReadContext(self.name, FilterSettings(on_error="skip"))
        problem = ""
        for where, record in self._records(lenient):
            try:
                return detect(record, self.kind.formats)
            except Malformed as malformed:
                problem = problem or f"but at {where} it {malformed}"
        if lenient.dropped:
            strict = ReadContext(self.name, FilterSettings())
            deque(self._records(strict), maxlen=0)  # names the first that cannot be read
        raise DataError(f"{self.origin.place}: must hold conversations, {problem or 'but holds none'}")

    @property
    def description(self) -> str:
        """Name of the format, and the number of files of a folder."""
        several = isinstance(self.origin, Files) and self.origin.is_folder
        return self.format.name + (f" in {len(self.origin.files)} files" if several else "")

    def _blocks(self) -> Iterator[RecordBlock]:
        columns = partial(columns_to_read, formats=self.kind.formats, ignored=self.ignore_keys)
        for block in self.origin.blocks(columns):
            yield replace(block, parse=partial(_without, self.ignore_keys, block.parse)) if self.ignore_keys else block

    def _records(self, context: ReadContext) -> Parsed:
        return chain.from_iterable(block.parse(context) for block in self._blocks())

    def shards(self, filters: FilterSettings) -> Iterator[Shard]:
        """Yield the source in shards, the same in every process. Drops that belong to no one shard count in the first.

        Raises:
            DataError: if the source cannot be read, or is malformed in a way that concerns all shards.
        """
        format = self.format
        if not isinstance(format, oasst.FlatMessages):
            yield from (Shard(block.size, partial(_trees, block, format)) for block in self._blocks())
            return
        counted = ReadContext(self.name, filters)
        records = (found for block in self._blocks() for found in _of_format(block, format, counted))
        gathered = format.gather(records, counted)
        size = (self.origin.size or 0) // len(gathered)
        yield Shard(size, partial(_first_trees, gathered[0], counted))
        yield from (Shard(size, trees) for trees in gathered[1:])


def _trees(block: RecordBlock, format: Any, context: ReadContext) -> Iterator[MessageTree]:
    """Yield the trees of a block of records, each of which is one."""
    for where, record in _of_format(block, format, context):
        try:
            tree = format.tree(record, where, context)
        except Malformed as malformed:
            context.refuse(where, str(malformed))
        else:
            if tree is not None:
                yield tree


def _first_trees(trees: Trees, counted: ReadContext, context: ReadContext) -> Iterator[MessageTree]:
    context.add(counted)
    return trees(context)


def _of_format(block: RecordBlock, format: AnyFormat, context: ReadContext) -> Parsed:
    for where, record in block.parse(context):
        if format.matches(record):
            yield where, record
        else:
            keys = ", ".join(map(show, record)) or "no keys"
            context.refuse(where, f"must be {format.name} like the first record, but holds {keys}")


def _without(keys: Sequence[str], parse: Callable[[ReadContext], Parsed], context: ReadContext) -> Parsed:
    for where, record in parse(context):
        _remove(record, keys)
        yield where, record


def _remove(record: Record, keys: Sequence[str]) -> None:
    """Take these keys out of a record and of all that it holds."""
    waiting: list[Any] = [record]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            for key in keys:
                found.pop(key, None)
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found


def open_source(name: str, kind: DataKind = CONVERSATIONS, ignore_keys: tuple[str, ...] = ()) -> Source:
    """Return the source of that name.

    Raises:
        DataError: if there is none.
    """
    key, _, split = name.partition(":")
    if key in SOURCES:
        return Source(name, _hub_split(name, SOURCES[key], split), kind, ignore_keys)
    if key in BUNDLED:
        if name not in BUNDLED:
            raise DataError(f"data source {name!r} must be one of {', '.join(BUNDLED)}")
        return Source(name, Files(str(BUNDLED[name]), (BUNDLED[name],)), kind, ignore_keys)
    path = user_path(name)
    return Source(stem(path), Files(str(path), _files(name, path), path.is_dir()), kind, ignore_keys)


def read_trees(source: str, filters: FilterSettings) -> Iterator[MessageTree]:
    """Return the trees of one source that pass the filters.

    Raises:
        DataError: at once if there is no such source; while iterating if its data are malformed.
    """
    opened = open_source(source, ignore_keys=filters.ignore_keys)
    context = ReadContext(opened.name, filters)
    return chain.from_iterable(shard.trees(context) for shard in opened.shards(filters))


# --- names ----------------------------------------------------------------------------------------------------------


def _hub_split(source: str, hub: HubSource, split: str) -> HubSource:
    split = split or hub.split
    if split not in hub.splits:
        splits = " or ".join(hub.splits)
        raise DataError(f"data source {source!r} must name the split {splits}, but names {split!r}")
    return replace(hub, split=split)


def _files(source: str, path: Path) -> tuple[Path, ...]:
    if not os.path.exists(path):
        raise DataError(f"data source {source!r} must be a name or a file, but no such file exists; {_nearest(path)}")
    kinds = ", ".join(FILE_KINDS)
    if path.is_dir():
        files = _files_in(path)
        if not files:
            raise DataError(f"data source {source!r} must be a folder with files that end in {kinds}, but holds none")
        return files
    if not _is_data(path):
        raise DataError(f"data source {source!r} must be a file that ends in {kinds}, but is another kind of file")
    return (path,)


def _is_data(file: Path) -> bool:
    return file.is_file() and file.name.lower().endswith(FILE_KINDS) and not file.name.startswith(".")


def _files_in(folder: Path) -> tuple[Path, ...]:
    """Return the data files of a folder: neither hidden ones, nor metadata, nor what `datasets` caches beside a table.

    Raises:
        DataError: if a file is missing that the folder of a saved data set names, or files are of several splits.
    """
    visible = [
        file for file in folder.rglob("*") if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    cached: set[Path] = set()
    for state in (file for file in visible if file.name == "state.json"):
        saved = {state.parent / name for name in _saved(state)}
        for file in sorted(saved):
            if not file.is_file():
                raise DataError(f"{file}: must be there, as {state.name} names it, but is missing")
        cached.update(set(state.parent.glob("*.arrow")) - saved if saved else ())
    files = sorted(file for file in visible if _is_data(file) and file.name not in METADATA and file not in cached)
    splits = sorted({_split(file) for file in files} - {""})
    if len(splits) > 1:
        raise DataError(
            f"{folder}: must hold one split, but holds {', '.join(splits)}: name the folder or files of one"
        )
    return tuple(files)


def _split(file: Path) -> str:
    """Return the split that a file is of, as `datasets` names folders and the hub names files; "" for all others."""
    if (file.parent.parent / "dataset_dict.json").is_file():
        return file.parent.name
    named = _SPLIT.match(file.name)
    return named[1] if named else ""


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


def _nearest(file: Path) -> str:
    beside = sorted(file.parent.iterdir()) if file.parent.is_dir() else []
    candidates = {other.name: str(other) for other in beside if _is_data(other) or other.is_dir()}
    candidates |= {name: name for name in (*SOURCES, *BUNDLED)}
    near = difflib.get_close_matches(file.name, candidates, n=1)
    return f"did you mean {candidates[near[0]]!r}?" if near else f"the names are {', '.join((*SOURCES, *BUNDLED))}"


# --- the hub --------------------------------------------------------------------------------------------------------


def _load(hub: HubSource) -> Any:
    import datasets

    try:
        dataset = datasets.load_dataset(hub.repo, hub.config, revision=hub.revision, split=hub.split)
        _check_revision(hub, dataset.cache_files)
    except Exception as error:  # a network and a cache fail in many classes; each ends here, with its own words
        cache, cause = datasets.config.HF_DATASETS_CACHE, " ".join(str(error).split())
        raise DataError(
            f"{hub.place}: must be on the hub or in the cache ({cache}), but could not be loaded: {cause}; without "
            f"network, download the files of the split {hub.split!r} elsewhere, from "
            f"https://huggingface.co/datasets/{hub.repo}/tree/{hub.revision}, and give their path in data.train or "
            "data.eval instead of the name"
        ) from error
    return dataset


def _check_revision(hub: HubSource, cache_files: Sequence[dict[str, str]]) -> None:
    """Without network, `datasets` takes whatever revision is in its cache; its folder is named by the commit."""
    for cache_file in cache_files:
        found = Path(cache_file["filename"]).parent.name
        if found != hub.revision:
            raise DataError(f"the cache holds revision {found} instead of {hub.revision}")
