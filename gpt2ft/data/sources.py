"""From the name of a data source to its conversation trees.

    oasst1, hh-rlhf, ...         the Hugging Face hub, at a pinned revision; `oasst1:validation` is another split
    owner/name                   any other data set there: owner/name[/config][:split][@revision]
    quickstart                   the small set that comes with gpt2ft; `quickstart:held_out` is for evaluation
    my/trees.jsonl               a file, see file_source.py
    my/folder                    all such files in it and below it, in the order of their names

Nothing here knows of tokens.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from gpt2ft import quickstart
from gpt2ft.conversation import MessageTree
from gpt2ft.data.blocks import Parsed, RecordBlock, kind_of, stem
from gpt2ft.data.columns import Columns
from gpt2ft.data.file_source import Files, is_data, open_files
from gpt2ft.data.formats import AnyFormat, detect, oasst
from gpt2ft.data.hub_source import SOURCES, HubSource, any_source, known_source
from gpt2ft.data.kinds import CONVERSATIONS, DataKind
from gpt2ft.data.reading import DataError, Malformed, ReadContext, Trees, show
from gpt2ft.data.rendered_text import note_on
from gpt2ft.files import user_path
from gpt2ft.hub import hub_name
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.wording import counted

BUNDLED = {
    "quickstart": quickstart.TREES,
    "quickstart:held_out": quickstart.HELD_OUT,
    "quickstart:more": quickstart.MORE_TREES,
    "quickstart:more_held_out": quickstart.MORE_HELD_OUT,
    "quickstart:replies": quickstart.REPLIES,  # on one topic, for `data.topic_replies`
    "quickstart:rain": quickstart.RAIN,  # on another
    "quickstart:everyday": quickstart.EVERYDAY,  # texts, for the recipe `base`
}


_NO_FILTERS = FilterSettings()
_FIRST = 100  # records or trees that are looked at to tell what a source is like

Origin = HubSource | Files


@dataclass(frozen=True)
class Shard:
    """Some trees of a source, which any process can read alone."""

    size: int  # bytes, as far as known
    trees: Trees


@dataclass(frozen=True)
class Source:
    """One data source: its name, where it lies, the kind of data it is read as, and the settings it is read by."""

    name: str
    origin: Origin
    kind: DataKind = CONVERSATIONS
    filters: FilterSettings = _NO_FILTERS

    @cached_property
    def format(self) -> AnyFormat:
        """Format of the first record that has one.

        Raises:
            DataError: if none has.
        """
        lenient = ReadContext(self.name, FilterSettings(on_error="skip"))
        if self._columns.names_any:
            first = islice(chain.from_iterable(block.parse(lenient) for block in self.origin.blocks(list)), _FIRST)
            self._columns.check(list(dict.fromkeys(key for _, record in first for key in record)), self.origin.place)
        problem = ""
        for where, record in self._records(lenient):
            try:
                return detect(record, self.kind.formats)
            except Malformed as malformed:
                problem = problem or f"but at {where} it {malformed}{self._about_header}"
        if lenient.dropped:
            strict = ReadContext(self.name, FilterSettings())
            deque(self._records(strict), maxlen=0)  # names the first that cannot be read
        raise DataError(f"{self.origin.place}: must hold conversations, {problem or 'but holds none'}")

    @property
    def description(self) -> str:
        """Name of the format, and the number of files of a folder."""
        several = isinstance(self.origin, Files) and self.origin.is_folder
        return self.format.name + (f" in {counted(len(self.origin.files), 'file')}" if several else "")

    @property
    def _about_header(self) -> str:
        is_table = isinstance(self.origin, Files) and kind_of(self.origin.files[0]) in (".csv", ".tsv")
        return "; the first line of the file must name its columns" if is_table else ""

    @property
    def rendered(self) -> str:
        """A line for people if the first texts look like conversations that another template has rendered, else ""."""
        if isinstance(self.format, oasst.FlatMessages):
            return ""
        lenient = ReadContext(self.name, FilterSettings(on_error="skip"))
        trees = chain.from_iterable(_trees(block, self.format, lenient) for block in self._blocks())
        return note_on([message.text for tree in islice(trees, _FIRST) for message in tree.messages])

    @cached_property
    def _columns(self) -> Columns:
        return Columns(self.filters, self.kind.formats)

    def _blocks(self) -> Iterator[RecordBlock]:
        for block in self.origin.blocks(self._columns.to_read):
            yield replace(block, parse=partial(self._columns.parse, block.parse))

    def _records(self, context: ReadContext) -> Parsed:
        return chain.from_iterable(block.parse(context) for block in self._blocks())

    def shards(self) -> Iterator[Shard]:
        """Yield the source in shards, the same in every process. Drops that belong to no one shard count in the first.

        Raises:
            DataError: if the source cannot be read, or is malformed in a way that concerns all shards.
        """
        format = self.format
        if not isinstance(format, oasst.FlatMessages):
            yield from (Shard(block.size, partial(_trees, block, format)) for block in self._blocks())
            return
        counted = ReadContext(self.name, self.filters)
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
            context.refuse(where, str(malformed), malformed.reason)
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
            problem = f"must be {format.name} like the first record, but holds {keys}"
            context.refuse(where, problem, "another layout")


def open_source(name: str, kind: DataKind = CONVERSATIONS, filters: FilterSettings = _NO_FILTERS) -> Source:
    """Return the source of that name.

    Raises:
        DataError, NetworkError: if there is none.
    """
    key, _, split = name.partition(":")
    own = filters.model_copy(update={"columns": ()})  # where the layout is known
    if key in SOURCES:
        return Source(name, known_source(name, SOURCES[key], split), kind, own)
    if key in BUNDLED:
        if name not in BUNDLED:
            raise DataError(f"data source {name!r} must be one of {', '.join(BUNDLED)}")
        return Source(name, Files(str(BUNDLED[name]), (BUNDLED[name],)), kind, own)
    path = user_path(name)
    if any((folder / "config.json").is_file() for folder in (path, path / "model")):
        raise DataError(f"data source {name!r} is a model and no data: name it where the model belongs")
    if os.path.exists(path):
        return Source(stem(path), open_files(name, path, filters.documents), kind, filters)
    if not kind_of(path) and (on_hub := hub_name(name)):
        return Source(name, any_source(name, on_hub), kind, filters)
    raise DataError(f"data source {name!r} must be a name or a file, but no such file exists{_meant(path)}")


def read_trees(source: str, filters: FilterSettings) -> Iterator[MessageTree]:
    """Return the trees of one source that pass the filters.

    Raises:
        DataError: at once if there is no such source; while iterating if its data are malformed.
    """
    opened = open_source(source, filters=filters)
    context = ReadContext(opened.name, filters)
    return chain.from_iterable(shard.trees(context) for shard in opened.shards())


def _meant(file: Path) -> str:
    """Return what a name that is none may stand for, or all names."""
    from gpt2ft.settings.suggestions import nearest_path

    beside = sorted(file.parent.iterdir()) if file.parent.is_dir() else []
    names = (*SOURCES, *BUNDLED)
    meant = nearest_path(file, [*(other for other in beside if is_data(other) or other.is_dir()), *names])
    return meant or f"; the names are {', '.join(names)}"
