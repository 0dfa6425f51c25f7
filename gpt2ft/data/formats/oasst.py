"""OASST exports, in either layout, as message trees.

    nested   one tree a record:     {message_tree_id, prompt: {message_id, text, role, replies: [{...}, ...]}}
    flat     one message a record:  {message_id, parent_id, text, role, ...}, in any order

A nested tree is first flattened, so that both layouts take the same road: rows, replies by parent, trees.
Siblings stand by rank, the unranked last, and then by message id: an order that the rows of a file,
which may come shuffled, cannot change. Trees stand in the order of their roots in the data.
Nothing here recurses, so a conversation may be as deep as it likes. Nested trees are read one at a time. Of flat
messages, which may lie anywhere, an index is held in memory and the texts in a temporary file.
"""

import sys
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from gpt2ft.conversation import Message, MessageTree, Role
from gpt2ft.data.formats.keys import (
    FILTERED,
    MARKS,
    RECORD_MARKS,
    fact_of,
    language_of,
    record_weight,
    refuse_unread,
    weight_of,
)
from gpt2ft.data.reading import Malformed, ReadContext, Record, Trees, objects, of, role_of, show, text_of, value
from gpt2ft.settings.sections import FilterSettings

_ROOTS_IN_A_SHARD = 2000
_LAST_RANK = 2**15 - 1
_READ = ("message_id", "parent_id", "message_tree_id", "text", "role", "rank", *FILTERED, *MARKS)
_PASSED_OVER = ("labels", "emojis", "events")  # what was thought of a message, and when
_KNOWN = frozenset(_READ + _PASSED_OVER)
_KNOWN_IN_TREES = _KNOWN | {"replies"}


class NestedTrees:
    """One tree a record."""

    name = "OASST trees"
    keys = ("message_tree_id", "prompt")
    columns = ("message_tree_id", "prompt", *RECORD_MARKS)
    passed_over = ()

    def matches(self, record: Record) -> bool:
        return isinstance(record.get("prompt"), dict) or ("prompt" in record and "message_tree_id" in record)

    def tree(self, record: Record, where: str, context: ReadContext) -> MessageTree | None:
        """Return the tree in a record, or None if nothing of it is left.

        Raises:
            Malformed: if the record cannot be read.
        """
        weight = record_weight(record)
        refuse_unread(record, self.columns)
        texts: list[str] = []
        rows = _flatten(record, where, texts)
        found = [replace(row, weight=row.weight * weight) if row.role == "assistant" else row for row in rows]
        context.totals.messages += len(found)
        context.totals.trees += 1
        unique = _unique(found, context)
        return _Forest(unique, _replies_by_parent(unique), texts).tree(found[0], context)


class FlatMessages:
    """One message a record: trees can only be put together once all are read."""

    name = "OASST messages"
    keys = ("message_id", "role", "text")
    columns = _READ
    passed_over = _PASSED_OVER

    def matches(self, record: Record) -> bool:
        return "message_id" in record or {"role", "text"} <= record.keys()

    def gather(self, records: Iterable[tuple[str, Record]], context: ReadContext) -> list[Trees]:
        """Read all records, counting in `context`, and return their trees in shards.

        Raises:
            DataError: if a record is malformed and `on_error` is "fail".
        """
        texts = _TextsOnDisk()
        rows = _unique(_flat_rows(records, texts, context), context)
        replies = _replies_by_parent(rows)
        _remove_cycles(rows, replies, context)
        tops = [row for row in rows.values() if row.parent_id not in rows]  # roots, and orphans: walked to be counted
        context.totals.trees += sum(row.parent_id is None for row in tops)
        forest = _Forest(rows, replies, texts)
        starts = range(0, max(1, len(tops)), _ROOTS_IN_A_SHARD)
        return [partial(forest.trees, tops[at : at + _ROOTS_IN_A_SHARD]) for at in starts]


TREES, MESSAGES = NestedTrees(), FlatMessages()


# --- from records to rows -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """One message as found. Two rows are equal if their contents are, wherever they stand."""

    message_id: str
    parent_id: str | None
    tree_id: str
    role: Role
    rank: int | None
    language: str | None
    deleted: bool
    rejected: bool
    weight: float
    text_hash: int
    has_text: bool
    text: int = field(compare=False)  # its number among the texts
    where: str = field(compare=False)


class _TextsOnDisk:
    """Texts by number, as in a list, in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="gpt2ft-")  # noqa: SIM115 (lives as long as the trees are read)
        self._ends = array("Q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, text: str) -> None:
        self._ends.append(self._ends[-1] + self._file.write(text.encode()))

    def __getitem__(self, number: int) -> str:
        self._file.seek(self._ends[number])
        return self._file.read(self._ends[number + 1] - self._ends[number]).decode()


def _flat_rows(records: Iterable[tuple[str, Record]], texts: _TextsOnDisk, context: ReadContext) -> Iterator[_Row]:
    for where, record in records:
        try:
            refuse_unread(record, _KNOWN)
            parent_id = value(record, "parent_id", str, "a string or null", optional=True)  # some exports omit nulls
            tree_id = value(record, "message_tree_id", str, "a string or null", optional=True)
            row = _row(record, parent_id, tree_id or value(record, "message_id", str, "a string"), where, texts)
        except Malformed as malformed:
            context.refuse(where, str(malformed), malformed.reason)
        else:
            context.totals.messages += 1
            yield row


def _flatten(tree: Record, where: str, texts: list[str]) -> Iterator[_Row]:
    tree_id = value(tree, "message_tree_id", str, "a string")
    waiting = [(value(tree, "prompt", dict, "an object, the root message"), None)]
    while waiting:
        message, parent_id = waiting.pop()
        refuse_unread(message, _KNOWN_IN_TREES)
        row = _row(message, parent_id, tree_id, where, texts)
        if message.get("parent_id") not in (None, parent_id):
            above = "null at the root" if parent_id is None else f"{show(parent_id)}, the message above"
            raise Malformed(f"`parent_id` must be {above}, but is {show(message['parent_id'])}{of(message)}")
        yield row
        if "replies" in message:
            waiting += [(reply, row.message_id) for reply in objects(message, "replies")]


def _row(
    message: Record, parent_id: str | None, tree_id: str, where: str, texts: MutableSequence[str] | _TextsOnDisk
) -> _Row:
    """Return the row of a message, whose text is put to the others."""
    language = language_of(message)
    text = text_of(message)
    role = role_of(message)
    row = _Row(
        message_id=value(message, "message_id", str, "a string"),
        parent_id=parent_id,
        tree_id=sys.intern(tree_id),
        role=role,
        rank=_rank(message),
        language=language and sys.intern(language),
        deleted=fact_of(message, "deleted") is True,
        rejected=fact_of(message, "review_result") is False,
        weight=weight_of(message, role),
        text_hash=hash(text),
        has_text=bool(text),
        text=len(texts),
        where=where,
    )
    texts.append(text)
    return row


def _rank(message: Record) -> int | None:
    if isinstance(message.get("rank"), float) and message["rank"].is_integer():
        message = message | {"rank": int(message["rank"])}  # tables with gaps hold whole numbers as floats
    rank = fact_of(message, "rank", int, "a whole number or null")
    if rank is not None and not 0 <= rank <= _LAST_RANK:
        raise Malformed(f"`rank` must be from 0 (the best) to {_LAST_RANK:,}, but is {rank}{of(message)}")
    return rank


# --- from rows to trees ---------------------------------------------------------------------------------------------


def _unique(rows: Iterable[_Row], context: ReadContext) -> dict[str, _Row]:
    """Return rows by message id, in the order of the data. Of equal rows the first stays; so it does under "skip"."""
    unique: dict[str, _Row] = {}
    roots: dict[str, _Row] = {}
    for row in rows:
        first = unique.get(row.message_id)
        if first == row:
            context.dropped["duplicate message id"] += 1
        elif first is not None:
            problem = f"`message_id` must be unique, but {show(row.message_id)} is another message at {first.where}"
            context.refuse(row.where, problem, "duplicate message id")
        elif row.parent_id is None and (root := roots.setdefault(row.tree_id, row)) is not row:
            problem = f"`message_tree_id` must be unique, but {show(row.tree_id)} has another root at {root.where}"
            context.refuse(row.where, problem, "duplicate tree id")
        else:
            unique[row.message_id] = row
    return unique


def _replies_by_parent(rows: Mapping[str, _Row]) -> dict[str, list[_Row]]:
    replies = defaultdict(list)
    for row in sorted(rows.values(), key=lambda row: (row.rank is None, row.rank, row.message_id)):
        if row.parent_id is not None:
            replies[row.parent_id].append(row)
    return replies


def _remove_cycles(rows: dict[str, _Row], replies: Mapping[str, list[_Row]], context: ReadContext) -> None:
    """Refuse the rows that hang in a cycle: no root or orphan leads down to them."""
    waiting = [row for row in rows.values() if row.parent_id not in rows]
    reached = set()
    while waiting:
        row = waiting.pop()
        reached.add(row.message_id)
        waiting += replies.get(row.message_id, ())
    for row in [row for row in rows.values() if row.message_id not in reached]:
        problem = f"`parent_id` must lead up to a root, but from message {show(row.message_id)} it leads into a cycle"
        context.refuse(row.where, problem, "cycle in parent_id")
        del rows[row.message_id]


@dataclass(frozen=True)
class _Forest:
    """Rows by message id, the replies to each, and where the texts are."""

    rows: Mapping[str, _Row]
    replies: Mapping[str, list[_Row]]
    texts: Sequence[str] | _TextsOnDisk

    def trees(self, tops: Sequence[_Row], context: ReadContext) -> Iterator[MessageTree]:
        found = (self.tree(top, context) for top in tops)
        return (tree for tree in found if tree is not None)

    def tree(self, top: _Row, context: ReadContext) -> MessageTree | None:
        """Return the tree under a root; under an orphan nothing is left of it."""
        messages = self._messages(top, context)
        if any(message.role == "assistant" for message in messages):
            return MessageTree(top.tree_id, context.source, tuple(messages))
        context.dropped["no reply"] += len(messages)
        return None

    def _messages(self, top: _Row, context: ReadContext) -> list[Message]:
        """Return the messages kept of `top` and all below it, depth first; the others are counted."""
        messages: list[Message] = []
        waiting: list[tuple[_Row, int | None, bool]] = [(top, None, False)]
        while waiting:
            row, parent, below_dropped = waiting.pop()
            reason = self._reason_to_drop(row, context.filters) or ("below a dropped message" if below_dropped else "")
            if reason:
                context.dropped[reason] += 1
            else:
                messages.append(Message(row.role, self.texts[row.text], parent, row.rank, row.weight))
            index = len(messages) - 1
            replies = reversed(self.replies.get(row.message_id, ()))
            waiting.extend((reply, index, bool(reason)) for reply in replies)
        return messages

    def _reason_to_drop(self, row: _Row, filters: FilterSettings) -> str | None:
        """Return the first reason, in the order of `REASONS`, that lies in the message itself."""
        if row.deleted:
            return "deleted"
        if filters.languages and row.language not in filters.languages:
            return "wrong language"
        if filters.reviewed_only and row.rejected:
            return "not reviewed"
        if not row.has_text:
            return "empty"
        if row.role == "assistant" and filters.max_rank is not None and (row.rank or 0) > filters.max_rank:
            return "rank above limit"
        if row.parent_id is None:
            return "bad role order" if row.role == "assistant" else None
        if row.parent_id not in self.rows:
            return "orphan"
        return "bad role order" if row.role in (self.rows[row.parent_id].role, "system") else None
