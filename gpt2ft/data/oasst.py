"""OASST exports, in either layout, as message trees.

    nested   one tree a record:     {message_tree_id, prompt: {message_id, text, role, replies: [{...}, ...]}}
    flat     one message a record:  {message_id, parent_id, text, role, ...}, in any order

A nested tree is first flattened, so that both layouts take the same road: rows, replies by parent, trees.
Every message left out is counted under one reason, the first of `REASONS` that holds for it.
Siblings stand by rank, the unranked last, and then by message id: an order that the rows of a file,
which may come shuffled, cannot change. Trees stand in the order of their roots in the data.
Nothing here recurses, so a conversation may be as deep as it likes.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from gpt2ft.conversation import Message, MessageTree, Role

ROLE_NAMES: dict[str, Role] = {
    "prompter": "user", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant",
    "system": "system",
}  # fmt: skip
FLAT_KEYS = ["message_id", "parent_id", "message_tree_id", "text", "role", "lang", "rank", "deleted", "review_result"]
REASONS = (
    "malformed line", "duplicate message id", "duplicate tree id", "cycle in parent_id",
    "deleted", "wrong language",
    "not reviewed",  # a review said no; a message that nobody reviewed stays
    "empty", "rank above limit",
    "orphan",  # its parent is not in the data
    "bad role order",  # as its parent, an assistant at the root, or a system message elsewhere
    "below a dropped message",
    "no reply",  # what is left of a tree in which no assistant speaks
)  # fmt: skip
_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """Data that cannot be trained on: says where, what must hold and what was found."""


@dataclass(frozen=True)
class Filters:
    """Which messages to keep. `languages` () is all of them; `max_rank` 0 is only the best reply.

    `max_rank` leaves unranked replies alone: OASST ranks only where there were several to compare.
    `on_error` says whether malformed data ends the reading or is left out and counted.
    """

    languages: tuple[str, ...] = ()
    max_rank: int | None = None
    reviewed_only: bool = True
    on_error: Literal["fail", "skip"] = "fail"


@dataclass
class Totals:
    """What was read before any filter: `messages` = kept + dropped, but for the malformed lines."""

    trees: int = 0
    messages: int = 0


@dataclass(frozen=True)
class Reading:
    """One source being read: its name for trees, its place for errors, and the counts so far."""

    source: str
    place: str
    filters: Filters
    dropped: Counter[str]
    totals: Totals

    def refuse(self, where: str, problem: str, reason: str = "malformed line") -> None:
        """Raises a DataError, or with `on_error="skip"` counts one drop."""
        if self.filters.on_error != "skip":
            raise DataError(f"{where}: {problem}")
        self.dropped[reason] += 1


@dataclass(frozen=True, slots=True)
class Row:
    """One message as found. Two rows are equal if their contents are, wherever they stand."""

    message_id: str
    parent_id: str | None
    tree_id: str
    role: Role
    text: str
    rank: int | None
    language: str | None
    deleted: bool
    rejected: bool
    where: str = field(compare=False)


def read_oasst(records: Iterable[tuple[str, dict[str, Any]]], reading: Reading) -> Iterator[MessageTree]:
    """Trees from (where, record) pairs; all drops are counted once the iterator is exhausted.

    Raises:
        DataError: if a record is malformed and `on_error` is "fail", or no record is left to use.
    """
    rows = _unique(_rows(records, reading), reading)
    if not rows:
        raise DataError(f"{reading.place}: must hold OASST trees or messages, but holds none that can be read")
    replies = _replies_by_parent(rows)
    _remove_cycles(rows, replies, reading)
    tops = [row for row in rows.values() if row.parent_id not in rows]  # roots, and orphans: walked to be counted
    reading.totals.trees += sum(row.parent_id is None for row in tops)
    for top in tops:
        messages = _subtree(top, rows, replies, reading)
        if any(message.role == "assistant" for message in messages):
            yield MessageTree(top.tree_id, reading.source, tuple(messages))
        elif messages:
            reading.dropped["no reply"] += len(messages)


# --- from records to rows -------------------------------------------------------------------------------------------


class _Malformed(Exception):
    """What is wrong with a record, before the place is known."""


def _rows(records: Iterable[tuple[str, dict[str, Any]]], reading: Reading) -> Iterator[Row]:
    """The first record decides on the layout; a record of the other one is malformed."""
    layout: str | None = None
    for where, record in records:
        try:
            found = "nested tree" if "prompt" in record else "flat message" if "message_id" in record else layout
            layout = layout or found
            if found is None:
                keys = ", ".join(map(_show, record)) or "no keys"
                raise _Malformed(
                    "must be an OASST tree (`message_tree_id`, `prompt`) or an OASST message "
                    f"(`message_id`, `parent_id`, `role`, `text`), but holds {keys}"
                )
            if found != layout:
                raise _Malformed(f"must be a {layout} like the first record, but is a {found}")
            rows = list(_flatten(record, where)) if found == "nested tree" else [_flat_row(record, where)]
        except _Malformed as malformed:
            reading.refuse(where, str(malformed))
        else:
            reading.totals.messages += len(rows)
            yield from rows


def _flat_row(record: dict[str, Any], where: str) -> Row:
    parent_id = _value(record, "parent_id", str, "a string or null", optional=True)  # some exports omit nulls
    tree_id = _value(record, "message_tree_id", str, "a string or null", optional=True)
    return _row(record, parent_id, tree_id or _value(record, "message_id", str, "a string"), where)


def _flatten(tree: dict[str, Any], where: str) -> Iterator[Row]:
    tree_id = _value(tree, "message_tree_id", str, "a string")
    waiting = [(_value(tree, "prompt", dict, "an object, the root message"), None)]
    while waiting:
        message, parent_id = waiting.pop()
        row = _row(message, parent_id, tree_id, where)
        if message.get("parent_id") not in (None, parent_id):
            above = "null at the root" if parent_id is None else f"{_show(parent_id)}, the message above"
            raise _Malformed(f"`parent_id` must be {above}, but is {_show(message['parent_id'])}{_of(message)}")
        yield row
        replies = _value(message, "replies", list, "a list") if "replies" in message else []
        for reply in replies:
            if not isinstance(reply, dict):
                raise _Malformed(f"`replies` must hold objects, but holds {_show(reply)}{_of(message)}")
            waiting.append((reply, row.message_id))


def _row(message: dict[str, Any], parent_id: str | None, tree_id: str, where: str) -> Row:
    role = _value(message, "role", str, "a string")
    if role not in ROLE_NAMES:
        raise _Malformed(f"`role` must be one of {', '.join(ROLE_NAMES)}, but is {_show(role)}{_of(message)}")
    if isinstance(message.get("rank"), float) and message["rank"].is_integer():
        message = message | {"rank": int(message["rank"])}  # tables with gaps hold whole numbers as floats
    rank = _value(message, "rank", int, "a whole number or null", optional=True)
    if rank is not None and rank < 0:
        raise _Malformed(f"`rank` must be 0 (the best) or more, but is {rank}{_of(message)}")
    return Row(
        message_id=_value(message, "message_id", str, "a string"),
        parent_id=parent_id,
        tree_id=tree_id,
        role=ROLE_NAMES[role],
        text=_value(message, "text", str, "a string").replace("\r\n", "\n").strip(),
        rank=rank,
        language=_value(message, "lang", str, "a string or null", optional=True),
        deleted=_value(message, "deleted", bool, "true, false or null", optional=True) is True,
        rejected=_value(message, "review_result", bool, "true, false or null", optional=True) is False,
        where=where,
    )


def _value(record: dict[str, Any], key: str, kind: type, must_be: str, optional: bool = False) -> Any:
    """The value under `key`, of exactly type `kind` (so true is no number); None where optional and absent."""
    value = record.get(key)
    if value is None and optional:
        return None
    if type(value) is not kind:
        found = _show(value) if key in record else "missing"
        raise _Malformed(f"`{key}` must be {must_be}, but is {found}{_of(record)}")
    if kind is str and _HALF_SURROGATE.search(value):
        raise _Malformed(f"`{key}` must be text, but holds half of a surrogate pair{_of(record)}")
    return value


def _of(record: dict[str, Any]) -> str:
    return f" (message {_show(record['message_id'])})" if "message_id" in record else ""


def _show(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    shown = json.dumps(value, default=repr)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# --- from rows to trees ---------------------------------------------------------------------------------------------


def _unique(rows: Iterable[Row], reading: Reading) -> dict[str, Row]:
    """Rows by message id, in the order of the data. Of equal rows the first stays; so it does under "skip"."""
    unique: dict[str, Row] = {}
    roots: dict[str, Row] = {}
    for row in rows:
        first = unique.get(row.message_id)
        if first == row:
            reading.dropped["duplicate message id"] += 1
        elif first is not None:
            problem = f"`message_id` must be unique, but {_show(row.message_id)} is another message at {first.where}"
            reading.refuse(row.where, problem, "duplicate message id")
        elif row.parent_id is None and (root := roots.setdefault(row.tree_id, row)) is not row:
            problem = f"`message_tree_id` must be unique, but {_show(row.tree_id)} has another root at {root.where}"
            reading.refuse(row.where, problem, "duplicate tree id")
        else:
            unique[row.message_id] = row
    return unique


def _replies_by_parent(rows: dict[str, Row]) -> dict[str, list[Row]]:
    replies = defaultdict(list)
    for row in sorted(rows.values(), key=lambda row: (row.rank is None, row.rank, row.message_id)):
        if row.parent_id is not None:
            replies[row.parent_id].append(row)
    return replies


def _remove_cycles(rows: dict[str, Row], replies: dict[str, list[Row]], reading: Reading) -> None:
    """Refuses the rows that hang in a cycle: no root or orphan leads down to them."""
    waiting = [row for row in rows.values() if row.parent_id not in rows]
    reached = set()
    while waiting:
        row = waiting.pop()
        reached.add(row.message_id)
        waiting += replies.get(row.message_id, ())
    for row in [row for row in rows.values() if row.message_id not in reached]:
        problem = f"`parent_id` must lead up to a root, but from message {_show(row.message_id)} it leads into a cycle"
        reading.refuse(row.where, problem, "cycle in parent_id")
        del rows[row.message_id]


def _subtree(top: Row, rows: dict[str, Row], replies: dict[str, list[Row]], reading: Reading) -> list[Message]:
    """The messages kept of `top` and all below it, depth first; the others are counted."""
    messages: list[Message] = []
    waiting: list[tuple[Row, int | None, bool]] = [(top, None, False)]
    while waiting:
        row, parent, below_dropped = waiting.pop()
        reason = _reason_to_drop(row, rows, reading.filters) or ("below a dropped message" if below_dropped else None)
        if reason:
            reading.dropped[reason] += 1
        else:
            messages.append(Message(row.role, row.text, parent, row.rank))
        index = len(messages) - 1
        waiting.extend((reply, index, reason is not None) for reply in reversed(replies.get(row.message_id, ())))
    return messages


def _reason_to_drop(row: Row, rows: dict[str, Row], filters: Filters) -> str | None:
    """The first reason, in the order of `REASONS`, that lies in the message itself."""
    if row.deleted:
        return "deleted"
    if filters.languages and row.language not in filters.languages:
        return "wrong language"
    if filters.reviewed_only and row.rejected:
        return "not reviewed"
    if not row.text:
        return "empty"
    if row.role == "assistant" and filters.max_rank is not None and (row.rank or 0) > filters.max_rank:
        return "rank above limit"
    if row.parent_id is None:
        return "bad role order" if row.role == "assistant" else None
    if row.parent_id not in rows:
        return "orphan"
    return "bad role order" if row.role in (rows[row.parent_id].role, "system") else None
