"""From a data source to the files of its store: shards of Arrow, written by all processes that need them.

All processes of a machine that open the same store build it together: each walks over the shards of the source and
takes those that no other has taken yet. The file of a shard is complete or absent, so a process that is killed loses
one shard at most, and the next start goes on from there. The statistics are written last: they make a store complete.
"""

import hashlib
import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import time
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from gpt2ft.conversation import ROLES, MessageTree
from gpt2ft.data.reading import DataError, Malformed, ReadContext, listed, show
from gpt2ft.data.sources import Shard, Source
from gpt2ft.data.topic import Topic
from gpt2ft.errors import is_first_on_machine
from gpt2ft.files import synced, write_json
from gpt2ft.system import sync_folder
from gpt2ft.text.template import render_turn
from gpt2ft.text.tokenizer import ChatTokenizer

STATISTICS = "statistics.json"
LEFTOVER_AGE = 24 * 3600.0  # seconds since a file was last written to, after which nobody writes it any more


@dataclass(frozen=True)
class SourceStatistics:
    """Counts of a source: what was read, kept and dropped, in messages."""

    format: str  # what the source was taken for
    conversations: int  # read
    read: int  # a topic's replies included, where they stand beside the source's own
    kept: int  # in at least one row
    dropped: dict[str, int]  # by reason, largest first
    weighed: int  # messages that are learnt by a weight below 1
    content: str  # digest of all tokens, to compare machines
    rendered: str  # a line for people if its texts look rendered by another template


@dataclass(frozen=True)
class Tokenisation:
    """A source, and how it becomes tokens."""

    source: Source
    tokenizer: ChatTokenizer
    topic: Topic | None


def is_complete(folder: Path) -> bool:
    return (folder / STATISTICS).is_file()


def build(work: Tokenisation, folder: Path) -> None:
    """Tokenise the shards that no other process has taken, and return once the store is complete.

    Raises:
        DataError: if the source cannot be read or nothing of it is kept, in every process that builds.
        OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    files = _tokenise(work, folder)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        for file in (file for file in files if not file.exists()):
            with _lock_of(file):  # free once the process that works on the shard has written it, or is gone
                pass
        if not all(file.exists() for file in files):
            _tokenise(work, folder, timeout=-1)
        statistics = None if is_complete(folder) else _statistics(work.source, files)
        for file in folder.iterdir():
            if file not in files and file.name != STATISTICS:
                file.unlink(missing_ok=True)  # a lock, or an unfinished file of a process that was killed
        if statistics:
            sync_folder(folder)
            write_json(folder / STATISTICS, asdict(statistics))
            sync_folder(folder)


def _sweep(stores: Path) -> None:
    """Remove unfinished files of processes that were killed, from all stores: nobody may ever go on with theirs."""
    for leftover in stores.glob("*/.*.tmp"):
        with suppress(OSError):  # another process has removed it, or another user owns it
            if time() - leftover.stat().st_mtime > LEFTOVER_AGE:
                leftover.unlink()


def _lock_of(file: Path) -> FileLock:
    return FileLock(file.with_suffix(".lock"))


def _tokenise(work: Tokenisation, folder: Path, timeout: float = 0.0) -> list[Path]:
    """Write the shards that are absent; those in work elsewhere are waited for up to `timeout` (-1: to their end).

    Returns:
        The files of all shards.
    """
    files = []
    for number, shard in enumerate(_with_progress(work)):
        file = folder / f"{number:06}.arrow"
        files.append(file)
        if file.exists():
            continue
        try:
            with _lock_of(file).acquire(timeout):
                if not file.exists():
                    _write_shard(file, shard, work)
        except Timeout:
            pass
    return files


def _with_progress(work: Tokenisation) -> Iterator[Shard]:
    from tqdm import tqdm

    silent = not (sys.stderr.isatty() and is_first_on_machine())
    bar = tqdm(
        total=work.source.origin.size,
        desc=f"tokenising {work.source.name}",
        unit="B",
        unit_scale=True,
        disable=silent,
        leave=False,
    )
    with bar:
        for shard in work.source.shards():
            yield shard
            bar.update(shard.size)


def _write_shard(file: Path, shard: Shard, work: Tokenisation) -> None:
    import pyarrow as pa

    kind, context = work.source.kind, ReadContext(work.source.name, work.source.filters)
    columns = _Columns(work.tokenizer, kind.rows_share_conversations)
    kept = 0
    for read in shard.trees(context):
        try:
            tree, rows = kind.rows(read, work.topic, context)
            kept += len(set().union(*rows))
            for indices in rows:
                columns.add(tree, indices)
        except (ValueError, Malformed) as error:
            opening = show(read.messages[0].text)
            raise DataError(f"{work.source.origin.place}: a conversation that opens with {opening}: {error}") from error
    batch = columns.batch()
    counts = {
        "trees": context.totals.trees,
        "read": context.totals.messages + context.refused_records(),
        "kept": kept,
        "dropped": dict(context.dropped),
        "weighed": sum(0 < weight < 1 for weight in columns.by_node["weights"]),
        "content": columns.content(),
    }
    schema = batch.schema.with_metadata({"statistics": json.dumps(counts)})
    with synced(file) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        writer.write_batch(batch.cast(schema) if batch.num_rows else batch)


def _statistics(source: Source, files: Sequence[Path]) -> SourceStatistics:
    import pyarrow as pa

    counts, dropped = [], Counter[str]()
    for file in files:
        with pa.memory_map(str(file)) as handle:
            counts.append(json.loads(pa.ipc.open_file(handle).schema.metadata[b"statistics"]))
        dropped.update(counts[-1]["dropped"])
    trees, read, kept, weighed = (sum(c[name] for c in counts) for name in ("trees", "read", "kept", "weighed"))
    reasons = {reason: number for reason, number in dropped.most_common() if number}
    if not kept:
        found = f"; dropped: {listed(reasons)}" if reasons else ""
        raise DataError(f"{source.origin.place} holds {source.kind.nothing}{found}")
    content = hashlib.sha256("".join(count["content"] for count in counts).encode()).hexdigest()
    return SourceStatistics(source.description, trees, read, kept, reasons, weighed, content, source.rendered)


_BY_NODE = {
    "lengths": np.int32, "parents": np.int32, "roles": np.int8, "weights": np.float32, "ranks": np.int16,
    "messages": np.int32, "digests": np.uint64,
}  # fmt: skip
_ROLE_NUMBERS = {role: number for number, role in enumerate(ROLES)}


class _Columns:
    """The columns of one shard, in flat lists: a million tokens a second leave no time for an array per tree."""

    def __init__(self, tokenizer: ChatTokenizer, rows_share_conversations: bool) -> None:
        self.tokenizer = tokenizer
        self.rows_share_conversations = rows_share_conversations
        self.ids: list[str] = []
        self.keys: list[int] = []
        self.conversations: list[int] = []
        self.tokens = array("I")
        self.by_node: dict[str, list[Any]] = {name: [] for name in _BY_NODE}
        self.tokens_until = [0]  # [rows + 1]
        self.nodes_until = [0]

    def add(self, tree: MessageTree, indices: Sequence[int]) -> None:
        """Take some messages of a tree as a row, each with the one above it."""
        place = {index: node for node, index in enumerate(indices)}
        lengths, parents, roles, weights, ranks, messages, digests = self.by_node.values()
        first = len(digests)
        marks = []
        for index in indices:
            message = tree.messages[index]
            ids = render_turn(self.tokenizer, message.role, message.text)
            self.tokens.extend(ids)
            lengths.append(len(ids))
            parents.append(-1 if message.parent is None else place[message.parent])
            roles.append(_ROLE_NUMBERS[message.role])
            weights.append(message.weight * message.is_supervised)
            if message.weight != 1:
                marks.append(f"{index} {message.weight!r}")
            ranks.append(-1 if message.rank is None else message.rank)
            digests.append(_digest(message.text))
        messages += indices
        self.ids.append(tree.id)
        key = conversation = _digest(tree.id, tree.messages[0].text)
        if self.rows_share_conversations:
            is_bad = any(tree.messages[index].label is False for index in indices)  # one reply may be called both
            key = _digest(str(conversation), *map(str, digests[first:]), *["undesirable"] * is_bad)
        elif marks:  # the same turns may stand in several records, each of which has others to learn
            key = _digest(str(conversation), *marks)
        self.conversations.append(conversation)
        self.keys.append(key)
        self.tokens_until.append(len(self.tokens))
        self.nodes_until.append(len(lengths))

    def batch(self) -> Any:
        """Return the columns as an Arrow record batch."""
        import pyarrow as pa

        def lists(values: Sequence[float], kind: type, until: list[int]) -> Any:
            return pa.ListArray.from_arrays(np.array(until, np.int32), np.array(values, kind))

        id_type = np.uint16 if len(self.tokenizer) <= 1 << 16 else np.uint32
        by_row = {
            "id": pa.array(self.ids, pa.string()),
            "key": np.array(self.keys, np.uint64),
            "conversation": np.array(self.conversations, np.uint64),
            "tokens": lists(self.tokens, id_type, self.tokens_until),
        }
        by_node = {name: lists(self.by_node[name], kind, self.nodes_until) for name, kind in _BY_NODE.items()}
        return pa.RecordBatch.from_pydict(by_row | by_node)

    def content(self) -> str:
        """Return a digest of the tokens, of how they hang together and of what they count."""
        names = ("lengths", "parents", "roles", "weights", "ranks")
        columns = (np.array(self.tokens, np.int64), *(np.array(self.by_node[name], _BY_NODE[name]) for name in names))
        return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()


def _digest(*texts: str) -> int:
    """Return 64 bits that tell texts apart."""
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest(), "little")
