"""Tools of every reader of data: counts of what was dropped, and refusals that name their place.

Every message left out is counted under one reason, the first of `REASONS` that holds for it.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpt2ft.conversation import MessageTree, Role, tidy
from gpt2ft.errors import Gpt2ftError
from gpt2ft.settings.sections import FilterSettings

Record = dict[str, Any]  # one line, row or array element of a data file

ROLE_NAMES: dict[str, Role] = {
    "prompter": "user", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "chatbot": "assistant",
    "model": "assistant", "ai": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
RECORD_REASONS = (  # each stands for a record, of whose messages nothing is known
    "malformed line",  # or row, or element of an array
    "repeated key",
    "another layout",
    "key that is not read",
    "marked as bad",
    "missing or wrong value",
)
REASONS = (
    *RECORD_REASONS, "duplicate message id", "duplicate tree id", "cycle in parent_id",
    "deleted", "wrong language",
    "not reviewed",  # a review said no; a message that nobody reviewed stays
    "empty", "rank above limit",
    "orphan",  # its parent is not in the data
    "bad role order",  # as its parent, an assistant at the root, or a system message elsewhere
    "joined to the turn above",  # of the same role: nothing of its text is lost
    "below a dropped message",
    "beside the path kept for the topic",
    "does not end in a reply", "prompts that differ",  # of preferences, as all below but the last
    "neither best nor worst",  # where these are labelled by their ranks
    "marked as not to be learnt",  # and leads to no reply that is, or is to be compared
    "reply without a rank", "same text as a better reply", "tied with all others", "nothing to compare it with",
    "in no pair",
    "no reply",  # in a tree of which no assistant turn is left, or below the last one
)  # fmt: skip
_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(Gpt2ftError):
    """Data that cannot be trained on; the message names the place, what must hold and what was found."""


class Malformed(Exception):
    """Complaint about a record, before its place is known.

    Attributes:
        reason: under which it is counted, one of `RECORD_REASONS`.
    """

    def __init__(self, problem: str, reason: str = "missing or wrong value") -> None:
        super().__init__(problem)
        self.reason = reason


@dataclass
class Totals:
    """Counts of all that was read, before any filter: `messages` = kept + dropped, but for whole records."""

    trees: int = 0
    messages: int = 0


@dataclass(frozen=True)
class ReadContext:
    """A source, or a shard of one, being read: its name for trees, the filters, and the counts so far."""

    source: str
    filters: FilterSettings
    dropped: Counter[str] = field(default_factory=Counter)
    totals: Totals = field(default_factory=Totals)

    def refuse(self, where: str, problem: str, reason: str = "malformed line") -> None:
        """Raise a DataError, or with `on_error="skip"` count one drop."""
        if self.filters.on_error != "skip":
            raise DataError(f"{where}: {problem}")
        self.dropped[reason] += 1

    def refused_records(self) -> int:
        return sum(self.dropped[reason] for reason in RECORD_REASONS)

    def add(self, other: "ReadContext") -> None:
        """Take over the counts of another."""
        self.dropped.update(other.dropped)
        self.totals.trees += other.totals.trees
        self.totals.messages += other.totals.messages


Trees = Callable[[ReadContext], Iterator[MessageTree]]  # reads some trees of a source, counting in the context


def value(record: Record, key: str, kind: type, must_be: str, optional: bool = False) -> Any:
    """Return the value under `key`, of exactly type `kind` (so true is no number); None where optional and absent.

    Raises:
        Malformed: if it is anything else, or text that no file can hold.
    """
    found = record.get(key)
    if found is None and optional:
        return None
    if type(found) is not kind:
        raise Malformed(f"`{key}` must be {must_be}, but is {show(found) if key in record else 'missing'}{of(record)}")
    if kind is str and not found.isascii() and _HALF_SURROGATE.search(found):
        raise Malformed(f"`{key}` must be text, but holds half of a surrogate pair{of(record)}")
    return found


def text_of(record: Record, key: str = "text") -> str:
    """Return the text under `key` with plain line ends and without space around it."""
    return tidy(value(record, key, str, "a string"))


def role_of(record: Record, key: str = "role") -> Role:
    """Return the role under `key`, in any of its spellings, with or without capitals."""
    name = value(record, key, str, "a string")
    role = ROLE_NAMES.get(name) or ROLE_NAMES.get(name.strip().lower())
    if role is None:
        raise Malformed(f"`{key}` must be one of {', '.join(ROLE_NAMES)}, but is {show(name)}{of(record)}")
    return role


def objects(record: Record, key: str) -> Iterator[Record]:
    """Yield the objects in the list under `key`."""
    for item in value(record, key, list, "a list"):
        if not isinstance(item, dict):
            raise Malformed(f"`{key}` must hold objects, but holds {show(item)}{of(record)}")
        yield item


def of(record: Record) -> str:
    """Name the message that is meant, where it has an id."""
    return f" (message {show(record['message_id'])})" if "message_id" in record else ""


def listed(reasons: Mapping[str, int]) -> str:
    """Write counts by reason in one line."""
    return ", ".join(f"{reason} {number:,}" for reason, number in reasons.items())


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question for the known name most like `name`; empty if none is."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {show(found[0])}?" if found else ""


def show(value: Any) -> str:
    """Write a value in the words of an error."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    shown = json.dumps(value, default=repr)
    return shown if len(shown) <= 60 else shown[:57] + "..."
