"""Tokenised once: conversation trees as memory-mapped Arrow, in a cache folder by content.

A store holds one data source after its filters, pruned of what leads to no assistant turn. Its folder is
named by a digest of everything that determines the tokens: the data, the filters, the template and the
tokenizer. Several processes may ask for the same store at the same time: one builds it, the others wait.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2ft.conversation import ROLES, MessageTree
from gpt2ft.data.oasst import DataError, Filters
from gpt2ft.data.sources import read_trees, source_digest
from gpt2ft.data.token_tree import ASSISTANT, TokenTree, prune
from gpt2ft.files import complete_folder, write_json
from gpt2ft.text.template import render_turns, template_digest
from gpt2ft.text.tokenizer import ChatTokenizer

FORMAT = 1  # of the stored columns
BATCH = 1000  # trees tokenised and written together


@dataclass(frozen=True)
class Ledger:
    """What a source held and what became of it, in messages."""

    read: int
    kept: int
    dropped: dict[str, int]  # by reason, largest first


class TokenStore:
    """The token trees of one source, read from the disk as they are asked for.

    Columns, a row a tree: `id`, `tokens`, and for each node `lengths`, `parents`, `roles`, `ranks` (-1: unranked)
    and `messages` (the node's place in the whole conversation).
    """

    def __init__(self, folder: Path, source: str) -> None:
        import pyarrow as pa

        self.source = source
        self.digest = folder.name
        try:
            self.ledger = Ledger(**json.loads((folder / "ledger.json").read_text(encoding="utf-8")))
            reader = pa.ipc.open_file(pa.memory_map(str(folder / "trees.arrow")))
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise DataError(f"the tokenised data in {folder} is damaged ({error}): remove that folder") from error
        self._firsts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])  # first row of each batch

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def tree(self, row: int, group: int) -> TokenTree:
        """The unsupervised tree of a row; its nodes belong to `group`."""
        node_lengths = self._values("lengths", row)
        return TokenTree(
            tokens=self._values("tokens", row),
            lengths=node_lengths,
            parents=self._values("parents", row),
            roles=self._values("roles", row),
            weights=np.zeros(len(node_lengths), np.float32),
            groups=np.full(len(node_lengths), group, np.int32),
            messages=self._values("messages", row),
        )

    def key(self, row: int) -> tuple[str, bytes]:
        """What makes a conversation the same one wherever it is met: its id and its first message."""
        batch, row_in_batch = self._place(row)
        first_message = self._values("tokens", row)[: self._values("lengths", row)[0]]
        return batch.column("id")[row_in_batch].as_py(), first_message.tobytes()

    def sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and supervised targets of each row."""
        tokens, scored = zip(*map(_sizes, self._batches), strict=True)
        return np.concatenate(tokens), np.concatenate(scored)

    def _place(self, row: int) -> tuple[Any, int]:
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return self._batches[number], row - int(self._firsts[number])

    def _values(self, column: str, row: int) -> NDArray:
        """One list of a row, straight from the mapped file."""
        batch, row_in_batch = self._place(row)
        lists = batch.column(column)
        start, end = lists.offsets[row_in_batch].as_py(), lists.offsets[row_in_batch + 1].as_py()
        return lists.values.to_numpy()[start:end]


def _sizes(batch: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and supervised targets of each row of a record batch."""
    offsets = batch.column("lengths").offsets.to_numpy()
    lengths, roles = (batch.column(name).values.to_numpy() for name in ("lengths", "roles"))
    sums = [np.cumsum(values, dtype=np.int64) for values in (lengths, (lengths - 1) * (roles == ASSISTANT))]
    tokens, scored = (np.diff(np.concatenate([[0], sum])[offsets]) for sum in sums)
    return tokens, scored


def cache_root(setting: str | None) -> Path:
    """`data.cache`, else $GPT2FT_CACHE, else ~/.cache/gpt2ft."""
    return Path(setting or os.environ.get("GPT2FT_CACHE") or Path.home() / ".cache" / "gpt2ft").expanduser()


def open_store(source: str, filters: Filters, tokenizer: ChatTokenizer, cache: Path) -> TokenStore:
    """The store of a source, from the cache or built now.

    Raises:
        DataError: if the source cannot be read, or nothing of it is left to train on.
    """
    from filelock import FileLock

    try:
        determined_by = [FORMAT, source_digest(source), asdict(filters), template_digest(), tokenizer.digest]
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error}") from error
    digest = hashlib.sha256(json.dumps(determined_by).encode()).hexdigest()[:32]
    folder = cache / "trees" / digest
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _build(source, filters, tokenizer, folder)
    except OSError as error:
        raise DataError(f"the cache folder {cache} cannot be written ({error}): set `data.cache` to another") from error
    return TokenStore(folder, source)


def _flushed(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def _build(source: str, filters: Filters, tokenizer: ChatTokenizer, folder: Path) -> None:
    import pyarrow as pa

    dropped: Counter[str] = Counter()
    kept = 0
    id_type = pa.uint16() if len(tokenizer) <= 1 << 16 else pa.uint32()
    node_types = {"lengths": pa.int32(), "parents": pa.int32(), "roles": pa.int8(), "ranks": pa.int16()}
    columns = {"id": pa.string(), "tokens": pa.list_(id_type)} | {n: pa.list_(t) for n, t in node_types.items()}
    schema = pa.schema(columns | {"messages": pa.list_(pa.int32())})
    trees = _with_progress(read_trees(source, filters, dropped), f"tokenising {source}")
    with complete_folder(folder) as temporary:
        with pa.OSFile(str(temporary / "trees.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            while batch := list(islice(trees, BATCH)):
                rows = []
                for tree, nodes in zip(batch, _tokenise(batch, tokenizer), strict=True):
                    pruned = prune(nodes)
                    remaining = 0 if pruned is None else len(pruned.lengths)
                    dropped["no reply"] += len(tree.messages) - remaining
                    kept += remaining
                    if pruned is not None:
                        rows.append(_row(tree, pruned))
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
        _flushed(temporary / "trees.arrow")
        if not kept:
            reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.most_common() if number)
            raise DataError(f"{source} holds nothing to train on" + (f"; dropped: {reasons}" if reasons else ""))
        ledger = Ledger(kept + dropped.total(), kept, {reason: n for reason, n in dropped.most_common() if n})
        write_json(temporary / "ledger.json", asdict(ledger))


def _tokenise(trees: list[MessageTree], tokenizer: ChatTokenizer) -> Iterator[TokenTree]:
    turns = [(message.role, message.text) for tree in trees for message in tree.messages]
    rendered = iter(render_turns(tokenizer, turns))
    for tree in trees:
        ids = list(islice(rendered, len(tree.messages)))
        size = len(ids)
        yield TokenTree(
            tokens=np.concatenate([np.array(node, np.int64) for node in ids]),
            lengths=np.array([len(node) for node in ids], np.int32),
            parents=np.array([-1 if m.parent is None else m.parent for m in tree.messages], np.int32),
            roles=np.array([ROLES.index(m.role) for m in tree.messages], np.int8),
            weights=np.zeros(size, np.float32),
            groups=np.zeros(size, np.int32),
            messages=np.arange(size, dtype=np.int32),
        )


def _row(tree: MessageTree, nodes: TokenTree) -> dict[str, object]:
    ranks = [tree.messages[message].rank for message in nodes.messages]
    return {
        "id": tree.id,
        "tokens": nodes.tokens,
        "lengths": nodes.lengths,
        "parents": nodes.parents,
        "roles": nodes.roles,
        "ranks": [-1 if rank is None else rank for rank in ranks],
        "messages": nodes.messages,
    }


def _with_progress(trees: Iterator[MessageTree], label: str) -> Iterator[MessageTree]:
    from tqdm import tqdm

    yield from tqdm(trees, desc=label, unit=" trees", disable=not sys.stderr.isatty(), leave=False)
