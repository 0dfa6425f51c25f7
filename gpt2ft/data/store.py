"""Tokenised once: conversation trees as memory-mapped Arrow, in a cache folder by content.

A store holds one data source after its filters: a row for every conversation, without what leads to no reply, or of
preferences a row for every prompt with replies to compare. Its folder is named by a digest of everything that
determines the tokens: the data, the filters, the template and the tokenizer.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2ft.data.kinds import CONVERSATIONS, DataKind
from gpt2ft.data.reading import DataError
from gpt2ft.data.sources import Origin, open_source
from gpt2ft.data.token_tree import TokenTree
from gpt2ft.data.tokenise import STATISTICS, SourceStatistics, Tokenisation, build, is_complete
from gpt2ft.data.topic import Topic
from gpt2ft.errors import reason
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.text.template import template_digest
from gpt2ft.text.tokenizer import ChatTokenizer
from gpt2ft.wording import counted

FORMAT_VERSION = 11  # of the stored columns, and of how a source is read and divided into shards

Digests = NDArray[np.uint64]


class TokenStore:
    """The token trees of one source, read from the disk as they are asked for; `notes` say of it what people must know.

    Columns, a row a tree: `id`, `key`, `conversation`, `tokens`, and for each node `lengths`, `parents`, `roles`,
    `weights` (of each target, 0 where it is not supervised), `ranks` (-1: unranked), `messages` (the node's place in
    the whole conversation) and `digests` (of its text).
    """

    def __init__(self, folder: Path, source: str, notes: tuple[str, ...] = ()) -> None:
        import pyarrow as pa

        self.source = source
        self.digest = folder.name
        self._batches = []
        try:
            self.statistics = SourceStatistics(**json.loads((folder / STATISTICS).read_text(encoding="utf-8")))
            for file in sorted(folder.glob("*.arrow")):
                reader = pa.ipc.open_file(pa.memory_map(str(file)))
                self._batches += [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise DataError(f"the tokenised data in {folder} is damaged ({error}): remove that folder") from error
        self.notes = (*notes, *filter(None, [self.statistics.rendered, _note_on_weights(self.statistics.weighed)]))
        self._firsts = [0, *accumulate(batch.num_rows for batch in self._batches)]  # first row of each batch
        sizes = (len(batch.column("lengths").values) for batch in self._batches)
        self._first_nodes = [0, *accumulate(sizes)]  # first node of each batch
        self._views: dict[tuple[int, str], tuple[NDArray[np.int32], NDArray]] = {}

    def __len__(self) -> int:
        return self._firsts[-1]

    def tree(self, row: int, group: int) -> TokenTree:
        """Return the tree of a row, straight from the mapped file; its nodes belong to `group`.

        Supervised nodes have the weight that their data give them, 1 by default.
        """
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
            weights=self._lists(number, "weights")[1][nodes],
            groups=np.full(size, group, np.int32),
            messages=self._lists(number, "messages")[1][nodes],
        )

    def id(self, row: int) -> str:
        number, row_in_batch = self._place(row)
        return self._batches[number].column("id")[row_in_batch].as_py()

    def keys(self) -> Digests:
        """[rows] digest of what makes each row itself: of a conversation, its id, first message and marked turns."""
        return self._column("key")

    def conversations(self) -> Digests:
        """[rows] key of the conversation that each row is of: several preference groups may share one."""
        return self._column("conversation")

    def ranks(self, row: int) -> NDArray[np.int16]:
        """Return [K] ranks of the nodes of a row, -1 where unranked."""
        number, row_in_batch = self._place(row)
        offsets, ranks = self._lists(number, "ranks")
        return ranks[offsets[row_in_batch] : offsets[row_in_batch + 1]]

    def sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return [rows] tokens and [rows] supervised targets."""
        tokens, supervised = zip(*map(_sizes, self._batches), strict=True)
        return np.concatenate(tokens), np.concatenate(supervised)

    def nodes(self, column: str) -> tuple[NDArray, NDArray[np.int64]]:
        """Return all values of a column that has one for each node, and [rows + 1] where those of each row begin."""
        values = [batch.column(column).flatten().to_numpy() for batch in self._batches]
        counts = [np.diff(batch.column(column).offsets.to_numpy()) for batch in self._batches]
        return np.concatenate(values), np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])

    def node_ranges(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return [k] the first node of some rows, as a number among all of the store, and [k] how many they have."""
        firsts, counts = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for number, here, inside in _by_batch(rows, self._firsts):
            offsets, _ = self._lists(number, "lengths")
            firsts[here] = self._first_nodes[number] + offsets[inside]
            counts[here] = offsets[inside + 1] - offsets[inside]
        return firsts, counts

    def nodes_at(self, column: str, numbers: NDArray[np.int64]) -> NDArray:
        """Return [k] what a column that has a value for each node says of those of some numbers."""
        found = np.empty(len(numbers), self._lists(0, column)[1].dtype)
        for number, here, inside in _by_batch(numbers, self._first_nodes):
            found[here] = self._lists(number, column)[1][inside]
        return found

    def _column(self, name: str) -> NDArray:
        return np.concatenate([batch.column(name).to_numpy() for batch in self._batches])

    def _place(self, row: int) -> tuple[int, int]:
        """Return the number of the batch that holds a row, and the place in it."""
        number = bisect_right(self._firsts, row) - 1
        return number, row - self._firsts[number]

    def _lists(self, number: int, column: str) -> tuple[NDArray[np.int32], NDArray]:
        """Return a column of lists in one batch: where each list begins, and all values."""
        if (number, column) not in self._views:
            lists = self._batches[number].column(column)
            self._views[number, column] = (lists.offsets.to_numpy(), lists.values.to_numpy())
        return self._views[number, column]


def _by_batch(numbers: NDArray[np.int64], firsts: list[int]) -> Iterator[tuple[int, NDArray, NDArray]]:
    """Yield each batch that holds some of the numbers, where these stand, and their places in it.

    Args:
        firsts: the first number that each batch holds, and the end of the last.
    """
    batches = np.searchsorted(firsts, numbers, side="right") - 1
    for batch in np.unique(batches).tolist():
        here = np.flatnonzero(batches == batch)
        yield batch, here, numbers[here] - firsts[batch]


def _sizes(batch: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return tokens and supervised targets of each row of a record batch."""
    offsets = batch.column("lengths").offsets.to_numpy()
    lengths, weights = (batch.column(name).values.to_numpy() for name in ("lengths", "weights"))
    sums = [np.cumsum(values, dtype=np.int64) for values in (lengths, (lengths - 1) * (weights > 0))]
    tokens, targets = (np.diff(np.concatenate([[0], sum])[offsets]) for sum in sums)
    return tokens, targets


def _note_on_weights(weighed: int) -> str:
    """Return a line for people on the messages that weigh less than 1, "" where there are none."""
    if not weighed:
        return ""
    return (
        f"{counted(weighed, 'message')} of a weight below 1: the training loss is the mean by weight; supervised "
        "tokens and the held-out loss count each message once"
    )


def open_store(
    name: str,
    filters: FilterSettings,
    tokenizer: ChatTokenizer,
    cache: Path,
    topic: Topic | None = None,
    kind: DataKind = CONVERSATIONS,
    digest: Callable[[Origin], str] | None = None,
) -> TokenStore:
    """Return the store of a source, from the cache or built now.

    Args:
        topic: its replies take the place of the source's own; of preferences, they are better than these.
        digest: gives the digest of what the source holds; one process may do so for several.

    Raises:
        DataError: if the source cannot be read, or nothing of it is left to train on.
    """
    source = open_source(name, kind, filters)
    try:
        data = digest(source.origin) if digest else source.origin.digest()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {reason(error)}") from error
    determined_by = [FORMAT_VERSION, kind.name, data, filters.model_dump(), topic and topic.digest]
    determined_by += [template_digest(), tokenizer.digest]
    folder = cache / "trees" / hashlib.sha256(json.dumps(determined_by).encode()).hexdigest()[:32]
    try:
        if not is_complete(folder):
            build(Tokenisation(source, tokenizer, topic), folder)
    except OSError as error:
        raise DataError(
            f"the cache folder {cache} cannot be written ({reason(error)}): set `data.cache` to another"
        ) from error
    return TokenStore(folder, name, source.origin.notes)
