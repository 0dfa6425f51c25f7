"""Tokenised once: conversation trees as memory-mapped Arrow, in a cache folder by content.

A store holds one data source after its filters, without what leads to no reply; of preferences, a row for every
prompt with replies to compare. Its folder is named by a digest of everything that determines the tokens: the data, the
filters, the template and the tokenizer.

All processes of a machine that ask for the same store build it together: each walks over the shards of the source
and takes those that nobody has taken yet. A shard is a file, complete or absent, so that whoever is killed loses
one shard at most, and the next start goes on from there.
"""

import fcntl
import hashlib
import json
import os
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2ft.conversation import ROLES, MessageTree
from gpt2ft.data.preference_groups import preference_groups
from gpt2ft.data.reading import DataError, ReadContext, show
from gpt2ft.data.sources import Shard, Source, open_source
from gpt2ft.data.token_tree import TokenTree, is_supervised
from gpt2ft.data.topic import Topic
from gpt2ft.errors import speaks_for_its_machine
from gpt2ft.files import sync_folder, write_json
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.text.template import render_turn, template_digest
from gpt2ft.text.tokenizer import ChatTokenizer

FORMAT = 7  # of the stored columns, and of how a source is read and cut into shards

Digests = NDArray[np.uint64]


@dataclass(frozen=True)
class SourceStatistics:
    """What a source held and what became of it, in messages."""

    format: str  # what the source was taken for
    conversations: int  # read
    read: int  # with the replies that a topic sets against the source's own
    kept: int  # in at least one row
    dropped: dict[str, int]  # by reason, largest first
    content: str  # digest of all tokens, to compare machines


class TokenStore:
    """The token trees of one source, read from the disk as they are asked for.

    Columns, a row a tree: `id`, `key`, `conversation`, `tokens`, and for each node `lengths`, `parents`, `roles`,
    `ranks` (-1: unranked), `messages` (the node's place in the whole conversation) and `digests` (of its text).
    """

    def __init__(self, folder: Path, source: str) -> None:
        import pyarrow as pa

        self.source = source
        self.digest = folder.name
        self._batches = []
        try:
            self.statistics = SourceStatistics(**json.loads((folder / "statistics.json").read_text(encoding="utf-8")))
            for file in sorted(folder.glob("*.arrow")):
                reader = pa.ipc.open_file(pa.memory_map(str(file)))
                self._batches += [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise DataError(f"the tokenised data in {folder} is damaged ({error}): remove that folder") from error
        self._firsts = [0, *accumulate(batch.num_rows for batch in self._batches)]  # first row of each batch
        self._views: dict[tuple[int, str], tuple[NDArray[np.int32], NDArray]] = {}

    def __len__(self) -> int:
        return self._firsts[-1]

    def tree(self, row: int, group: int) -> TokenTree:
        """The unsupervised tree of a row, straight from the mapped file; its nodes belong to `group`."""
        number, row_in_batch = self._place(row)
        token_offsets, tokens = self._lists(number, "tokens")
        node_offsets, lengths = self._lists(number, "lengths")
        nodes = slice(node_offsets[row_in_batch], node_offsets[row_in_batch + 1])
        size = nodes.stop - nodes.start
        return TokenTree(
            tokens=tokens[token_offsets[row_in_batch] : token_offsets[row_in_batch + 1]],
            lengths=lengths[nodes],
            parents=self._lists(number, "parents")[1][nodes],
            roles=self._lists(number, "roles")[1][nodes],
            weights=np.zeros(size, np.float32),
            groups=np.full(size, group, np.int32),
            messages=self._lists(number, "messages")[1][nodes],
        )

    def id(self, row: int) -> str:
        number, row_in_batch = self._place(row)
        return self._batches[number].column("id")[row_in_batch].as_py()

    def keys(self) -> Digests:
        """What makes a row the same one wherever it is met: of a conversation, a digest of its id and first message."""
        return self._column("key")

    def conversations(self) -> Digests:
        """The same of the whole conversation that a row is of: several preference groups may share one."""
        return self._column("conversation")

    def ranks(self, row: int) -> NDArray[np.int16]:
        """[K] of the nodes of a row, -1 where unranked."""
        number, row_in_batch = self._place(row)
        offsets, ranks = self._lists(number, "ranks")
        return ranks[offsets[row_in_batch] : offsets[row_in_batch + 1]]

    def sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and supervised targets of each row."""
        tokens, scored = zip(*map(_sizes, self._batches), strict=True)
        return np.concatenate(tokens), np.concatenate(scored)

    def nodes(self, column: str) -> tuple[NDArray, NDArray[np.int64]]:
        """All values of a column that has one for each node, and [rows + 1] where those of each row begin."""
        values = [batch.column(column).flatten().to_numpy() for batch in self._batches]
        counts = [np.diff(batch.column(column).offsets.to_numpy()) for batch in self._batches]
        return np.concatenate(values), np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])

    def _column(self, name: str) -> NDArray:
        return np.concatenate([batch.column(name).to_numpy() for batch in self._batches])

    def _place(self, row: int) -> tuple[int, int]:
        """The number of the batch that holds a row, and where it stands in it."""
        number = bisect_right(self._firsts, row) - 1
        return number, row - self._firsts[number]

    def _lists(self, number: int, column: str) -> tuple[NDArray[np.int32], NDArray]:
        """A column of lists in one batch: where each list begins, and all values."""
        if (number, column) not in self._views:
            lists = self._batches[number].column(column)
            self._views[number, column] = (lists.offsets.to_numpy(), lists.values.to_numpy())
        return self._views[number, column]


def _sizes(batch: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and supervised targets of each row of a record batch."""
    offsets = batch.column("lengths").offsets.to_numpy()
    lengths, roles = (batch.column(name).values.to_numpy() for name in ("lengths", "roles"))
    sums = [np.cumsum(values, dtype=np.int64) for values in (lengths, (lengths - 1) * is_supervised(roles))]
    tokens, scored = (np.diff(np.concatenate([[0], sum])[offsets]) for sum in sums)
    return tokens, scored


def open_store(
    name: str,
    filters: FilterSettings,
    tokenizer: ChatTokenizer,
    cache: Path,
    topic: Topic | None = None,
    as_preferences: bool = False,
) -> TokenStore:
    """The store of a source, from the cache or built now.

    Args:
        topic: whose replies take the place of the source's own; of preferences, are better than these.
        as_preferences: whether a row is a prompt with replies to compare instead of a conversation.

    Raises:
        DataError: if the source cannot be read, or nothing of it is left to train on.
    """
    source = open_source(name, as_preferences)
    try:
        determined_by = [FORMAT, source.origin.digest(), filters.model_dump(), template_digest(), tokenizer.digest]
        determined_by += [topic.digest] if topic else []
        determined_by += ["preferences"] if as_preferences else []
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error}") from error
    digest = hashlib.sha256(json.dumps(determined_by).encode()).hexdigest()[:32]
    folder = cache / "trees" / digest
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            _build(_Work(source, filters, tokenizer, topic), folder)
    except OSError as error:
        raise DataError(f"the cache folder {cache} cannot be written ({error}): set `data.cache` to another") from error
    return TokenStore(folder, name)


# --- building, together with whoever else does ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What is tokenised, and how."""

    source: Source
    filters: FilterSettings
    tokenizer: ChatTokenizer
    topic: Topic | None

    def rows(self, tree: MessageTree, context: ReadContext) -> tuple[MessageTree, list[list[int]]]:
        """The tree as it is learnt from, and the messages of each row that it becomes; what is in none is counted."""
        if self.source.as_preferences:
            if self.topic:
                tree = self.topic.against_own(tree, context.dropped)
                context.totals.messages += sum(message.rank == 0 for message in tree.messages)  # the topic's own
            return tree, preference_groups(tree, context.dropped)
        tree = self.topic.applied_to(tree, context.dropped) if self.topic else tree
        useful = tree.leading_to_reply()
        context.dropped["no reply"] += len(tree.messages) - len(useful)
        return tree, [useful] if useful else []


def _build(work: _Work, folder: Path) -> None:
    """Tokenises what nobody else does; the last to be done puts the store together."""
    shards_folder = folder.with_name(f"{folder.name}.shards")
    lock = folder.with_name(f"{folder.name}.lock")
    files: list[Path] = []
    with _locked(lock, fcntl.LOCK_SH):
        if not folder.is_dir():
            shards_folder.mkdir(exist_ok=True)
            files = _tokenise(work, shards_folder)
    with _locked(lock, fcntl.LOCK_EX):  # once nobody is at work any more
        if folder.is_dir():
            return
        if not files or not all(file.exists() for file in files):  # one that took a shard was killed meanwhile
            files = _tokenise(work, shards_folder)
        write_json(shards_folder / "statistics.json", asdict(_statistics(work.source, files)))
        for file in shards_folder.iterdir():
            if file not in files and file.name != "statistics.json":
                file.unlink()
        sync_folder(shards_folder)
        os.rename(shards_folder, folder)
        sync_folder(folder.parent)


@contextmanager
def _locked(file: Path, mode: int) -> Iterator[bool]:
    """Holds a lock on a file, which ends with the process at the latest. False if it is not to be had at once."""
    with open(file, "a") as handle:
        try:
            fcntl.flock(handle, mode)
        except BlockingIOError:
            yield False
        else:
            yield True


def _tokenise(work: _Work, folder: Path) -> list[Path]:
    """Writes the shards that are absent and not in work elsewhere. Returns the files of all shards."""
    files = []
    for number, shard in enumerate(_with_progress(work)):
        file = folder / f"{number:06}.arrow"
        files.append(file)
        if not file.exists():
            with _locked(file.with_suffix(".lock"), fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
                if mine and not file.exists():
                    _write_shard(file, shard, work)
    return files


def _write_shard(file: Path, shard: Shard, work: _Work) -> None:
    import pyarrow as pa

    context = ReadContext(work.source.name, work.filters)
    columns = _Columns(work.tokenizer, work.source.as_preferences)
    kept = 0
    for tree in shard.trees(context):
        said, rows = work.rows(tree, context)
        kept += len(set().union(*rows))
        try:
            for indices in rows:
                columns.add(said, indices)
        except ValueError as error:
            opening = show(tree.messages[0].text)
            raise DataError(f"{work.source.origin.place}: a conversation that opens with {opening}: {error}") from error
    batch = columns.batch()
    counts = {
        "trees": context.totals.trees,
        "read": context.totals.messages + context.dropped["malformed line"],
        "kept": kept,
        "dropped": dict(context.dropped),
        "content": columns.content(),
    }
    schema = batch.schema.with_metadata({"statistics": json.dumps(counts)})
    temporary = file.with_suffix(".tmp")
    with pa.OSFile(str(temporary), "wb") as handle, pa.ipc.new_file(handle, schema) as writer:
        writer.write_batch(batch.cast(schema) if batch.num_rows else batch)
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def _statistics(source: Source, files: Sequence[Path]) -> SourceStatistics:
    import pyarrow as pa

    trees, read, kept, dropped, contents = 0, 0, 0, Counter[str](), []
    for file in files:
        with pa.memory_map(str(file)) as handle:
            counts = json.loads(pa.ipc.open_file(handle).schema.metadata[b"statistics"])
        trees += counts["trees"]
        read += counts["read"]
        kept += counts["kept"]
        dropped.update(counts["dropped"])
        contents.append(counts["content"])
    reasons = {reason: number for reason, number in dropped.most_common() if number}
    if not kept:
        told = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())
        wanted = "no replies that can be compared" if source.as_preferences else "nothing to train on"
        raise DataError(f"{source.origin.place} holds {wanted}" + (f"; dropped: {told}" if told else ""))
    content = hashlib.sha256("".join(contents).encode()).hexdigest()
    return SourceStatistics(source.description, trees, read, kept, reasons, content)


class _Columns:
    """The columns of one shard, in flat lists: a million tokens a second leave no time for an array per tree."""

    def __init__(self, tokenizer: ChatTokenizer, by_group: bool) -> None:
        self.tokenizer = tokenizer
        self.by_group = by_group  # whether several rows are of one conversation
        self.ids: list[str] = []
        self.keys: list[int] = []
        self.conversations: list[int] = []
        self.tokens: list[int] = []
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.roles: list[int] = []
        self.ranks: list[int] = []
        self.messages: list[int] = []
        self.digests: list[int] = []
        self.tokens_until = [0]  # [rows + 1]
        self.nodes_until = [0]

    def add(self, tree: MessageTree, indices: Sequence[int]) -> None:
        """Takes some messages of a tree as a row, each with the one above it."""
        place = {index: node for node, index in enumerate(indices)}
        first = len(self.digests)
        for index in indices:
            message = tree.messages[index]
            ids = render_turn(self.tokenizer, message.role, message.text)
            self.tokens += ids
            self.lengths.append(len(ids))
            self.parents.append(-1 if message.parent is None else place[message.parent])
            self.roles.append(_ROLE_NUMBERS[message.role])
            self.ranks.append(-1 if message.rank is None else message.rank)
            self.digests.append(_digest(message.text))
        self.messages += indices
        self.ids.append(tree.id)
        conversation = _digest(tree.id, tree.messages[0].text)
        self.conversations.append(conversation)
        self.keys.append(_digest(str(conversation), *map(str, self.digests[first:])) if self.by_group else conversation)
        self.tokens_until.append(len(self.tokens))
        self.nodes_until.append(len(self.lengths))

    def batch(self) -> Any:
        import pyarrow as pa

        id_type = np.uint16 if len(self.tokenizer) <= 1 << 16 else np.uint32

        def lists(values: list[int], kind: type, until: list[int]) -> Any:
            return pa.ListArray.from_arrays(np.array(until, np.int32), np.array(values, kind))

        by_node = {
            "lengths": lists(self.lengths, np.int32, self.nodes_until),
            "parents": lists(self.parents, np.int32, self.nodes_until),
            "roles": lists(self.roles, np.int8, self.nodes_until),
            "ranks": lists(self.ranks, np.int16, self.nodes_until),
            "messages": lists(self.messages, np.int32, self.nodes_until),
            "digests": lists(self.digests, np.uint64, self.nodes_until),
        }
        first = {
            "id": pa.array(self.ids, pa.string()),
            "key": np.array(self.keys, np.uint64),
            "conversation": np.array(self.conversations, np.uint64),
            "tokens": lists(self.tokens, id_type, self.tokens_until),
        }
        return pa.RecordBatch.from_pydict(first | by_node)

    def content(self) -> str:
        """A digest of the tokens and of how they hang together."""
        values = (self.tokens, self.lengths, self.parents, self.roles, self.ranks)
        return hashlib.sha256(b"".join(np.array(column, np.int64).tobytes() for column in values)).hexdigest()


_ROLE_NUMBERS = {role: number for number, role in enumerate(ROLES)}


def _digest(*texts: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest(), "little")


def _with_progress(work: _Work) -> Iterator[Shard]:
    from tqdm import tqdm

    silent = not (sys.stderr.isatty() and speaks_for_its_machine())
    size = work.source.origin.size
    with tqdm(
        total=size, desc=f"tokenising {work.source.name}", unit="B", unit_scale=True, disable=silent, leave=False
    ) as bar:
        for shard in work.source.shards(work.filters):
            yield shard
            bar.update(shard.size)
