"""One conversation a record, written as a list of turns: the rules that all such formats share.

- Turns of one role that follow each other are joined by a blank line.
- An assistant turn before the first user turn is dropped, and so is an empty system turn.
- An empty turn, or a system turn that is not the first, ends the conversation: it and what follows are dropped.
- What leads to no reply is dropped.
- A `system` text beside the turns is the system turn, once, should the turns open with it as well. Other content that
  no format reads (`history`, `tools`) is an error, because it would be lost.
- A record that holds `chosen` and `rejected` replies is no conversation to learn from, whatever stands beside them:
  data sets disagree on whether their `messages` are the prompt alone or end in a reply.

All of it is counted. A conversation without an id of its own is named by its content, so that the same one is
recognised wherever it is met.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpt2ft.conversation import MessageTree, Role, tidy
from gpt2ft.data.reading import Malformed, ReadContext, Record, value

Turns = Sequence[tuple[Role, str]]

_SYSTEM = ("system", "system_prompt")
_NOT_READ = ("history", "tools", "functions")
_PREFERENCE = ("chosen", "rejected")
BESIDE_THE_TURNS = _SYSTEM + _NOT_READ


@dataclass(frozen=True)
class Format:
    """A record layout with one tree a record."""

    name: str  # for people
    keys: tuple[str, ...]  # that every record of this layout has
    tree: Callable[[Record, str, ReadContext], MessageTree | None]  # of a record and its place; raises Malformed
    also: tuple[str, ...] = ()  # other columns of a table that are read

    @property
    def columns(self) -> tuple[str, ...]:
        return self.keys + self.also + BESIDE_THE_TURNS + _PREFERENCE

    def matches(self, record: Record) -> bool:
        return all(key in record for key in self.keys)


def conversation(turns: Callable[[Record], Turns]) -> Callable[[Record, str, ReadContext], MessageTree | None]:
    """Return the function that makes a conversation of a record, or None if nothing of it is left.

    Args:
        turns: reads the turns of a record, or raises Malformed.
    """

    def tree(record: Record, where: str, context: ReadContext) -> MessageTree | None:
        refuse_preference(record)
        found = with_system_turn(record, turns(record)) or [("user", "")]  # an empty record counts as an empty turn
        context.totals.trees += 1
        context.totals.messages += len(found)
        kept = clean(found, context)
        return MessageTree.from_turns(content_id(kept), context.source, kept) if kept else None

    return tree


def refuse_preference(record: Record) -> None:
    """Raise Malformed if the record holds a chosen and a rejected reply."""
    if all(record.get(key) is not None for key in _PREFERENCE):
        raise Malformed(
            "must be a conversation to learn from, but is a preference (`chosen` and `rejected`), which launch/dpo.py "
            "trains on"
        )


def with_system_turn(record: Record, turns: Turns) -> list[tuple[Role, str]]:
    """Return the turns of a record, tidied, behind the system text that stands beside them unless they open with it.

    Raises:
        Malformed: if the record holds other content that no format reads.
    """
    system = [("system", tidy(text)) for text in _system_texts(record)]
    tidied = [(role, tidy(text)) for role, text in turns]
    return tidied if tidied[: len(system)] == system else system + tidied


def _system_texts(record: Record) -> list[str]:
    for key in _NOT_READ:
        if record.get(key):
            raise Malformed(f"`{key}` must be empty or absent, as it is not read and would be lost")
    texts = (value(record, key, str, "a string or null", optional=True) for key in _SYSTEM)
    return [text for text in texts if text]


def clean(turns: Turns, context: ReadContext) -> list[tuple[Role, str]]:
    """Return the turns that stay, by the rules above."""
    dropped = context.dropped
    alternating = joined(turns)
    if len(alternating) < len(turns):
        dropped["joined to the turn above"] += len(turns) - len(alternating)
    kept: list[tuple[Role, str]] = []
    for number, (role, text) in enumerate(alternating):
        if role == "system" and not kept and not text:
            dropped["empty"] += 1
        elif role == "assistant" and all(above == "system" for above, _ in kept):
            dropped["bad role order"] += 1
        elif not text or (role == "system" and kept):
            dropped["bad role order" if text else "empty"] += 1
            dropped["below a dropped message"] += len(alternating) - number - 1
            break
        else:
            kept.append((role, text))
    while kept and kept[-1][0] not in ("assistant", "text"):
        kept.pop()
        dropped["no reply"] += 1
    return kept


def joined(turns: Turns) -> list[tuple[Role, str]]:
    """Return the turns, those of one role that follow each other as one."""
    found: list[tuple[Role, str]] = []
    for role, text in turns:
        if found and found[-1][0] == role:
            found[-1] = (role, "\n\n".join(filter(None, (found[-1][1], text))))
        else:
            found.append((role, text))
    return found


def content_id(turns: Turns) -> str:
    """Return a digest of the content, as an id."""
    digest = hashlib.blake2b(digest_size=12)
    for role, text in turns:
        digest.update(f"{role}\0{text}\0".encode())
    return digest.hexdigest()
