"""One conversation a record, written as a list of turns: the rules that all such formats share.

- Turns of one role that follow each other are joined by a blank line.
- An assistant turn before the first user turn is dropped, and so is an empty system turn.
- An empty turn, or a system turn that is not the first, ends the conversation: it and what follows are dropped.
- What leads to no reply is dropped.
- A `system` text beside the turns is the system turn. Other content that no format reads (`history`, `tools`) is an
  error, because it would be lost.

All of it is counted. A conversation without an id of its own is named by its content, so that the same one is
recognised wherever it is met.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpt2ft.conversation import MessageTree, Role, tidy
from gpt2ft.data.reading import Malformed, Reading, Record, value

Turns = Sequence[tuple[Role, str]]

_SYSTEM = ("system", "system_prompt")
_NOT_READ = ("history", "tools", "functions")
BESIDE_THE_TURNS = _SYSTEM + _NOT_READ


@dataclass(frozen=True)
class Format:
    """One conversation a record.

    `name` says what the data are, for people. A record that has all of `keys` is one. `turns` gives its turns or
    raises Malformed. Of a table, the columns `keys` and `also` are read.
    """

    name: str
    keys: tuple[str, ...]
    turns: Callable[[Record], Turns]
    also: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return self.keys + self.also + BESIDE_THE_TURNS

    def matches(self, record: Record) -> bool:
        return all(key in record for key in self.keys)

    def tree(self, record: Record, where: str, reading: Reading) -> MessageTree | None:
        """The conversation in a record, or None if nothing of it is left.

        Raises:
            Malformed: if the record cannot be read.
        """
        beside = beside_the_turns(record)
        turns = [(role, tidy(text)) for role, text in (*beside, *self.turns(record))] or [("user", "")]
        reading.totals.trees += 1
        reading.totals.messages += len(turns)
        kept = clean(turns, reading)
        return MessageTree.from_turns(content_id(kept), reading.source, kept) if kept else None


def beside_the_turns(record: Record) -> Turns:
    """The system turn that stands beside the others, if there is one.

    Raises:
        Malformed: if something else stands there that no format reads.
    """
    for key in _NOT_READ:
        if record.get(key):
            raise Malformed(f"`{key}` must be empty or absent, as it is not read and would be lost")
    texts = (value(record, key, str, "a string or null", optional=True) for key in _SYSTEM)
    return [("system", text) for text in texts if text]


def clean(turns: Turns, reading: Reading) -> list[tuple[Role, str]]:
    """The turns that stay, by the rules above."""
    dropped = reading.dropped
    joined: list[tuple[Role, str]] = []
    for role, text in turns:
        if joined and joined[-1][0] == role:
            joined[-1] = (role, "\n\n".join(filter(None, (joined[-1][1], text))))
            dropped["joined to the turn above"] += 1
        else:
            joined.append((role, text))
    kept: list[tuple[Role, str]] = []
    for number, (role, text) in enumerate(joined):
        if role == "system" and not kept and not text:
            dropped["empty"] += 1
        elif role == "assistant" and all(above == "system" for above, _ in kept):
            dropped["bad role order"] += 1
        elif not text or (role == "system" and kept):
            dropped["bad role order" if text else "empty"] += 1
            dropped["below a dropped message"] += len(joined) - number - 1
            break
        else:
            kept.append((role, text))
    while kept and kept[-1][0] not in ("assistant", "text"):
        kept.pop()
        dropped["no reply"] += 1
    return kept


def content_id(turns: Turns) -> str:
    """A name made of the content alone."""
    digest = hashlib.blake2b(digest_size=12)
    for role, text in turns:
        digest.update(f"{role}\0{text}\0".encode())
    return digest.hexdigest()
