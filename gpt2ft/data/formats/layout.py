"""Layouts with one tree a record, and the rules for what stands in a record beside the turns.

- A `system` text is the system turn, once, should the turns open with it as well.
- A record that is marked as not to be learnt (`label: false`) is refused; its weight is that of each of its replies.
- So is content that no layout reads (`history`, `tools`), unless it only repeats turns.
- A record that holds `chosen` and `rejected` replies is no conversation to learn from, whatever stands beside them:
  data sets disagree on whether their `messages` are the prompt alone or end in a reply.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

from gpt2ft.conversation import SUPERVISED_ROLES, MessageTree, tidy
from gpt2ft.data.formats.chat_messages import chat_messages
from gpt2ft.data.formats.keys import READ_OF_ALL, reason_to_drop, record_weight, refuse_keys, unread
from gpt2ft.data.formats.turns import Turn, Turns, clean, content_id, messages_of
from gpt2ft.data.reading import Malformed, ReadContext, Record, value

Transcript = tuple[Turns, int | None]  # a conversation, and the rank of the reply that it ends in

_SYSTEM = ("system", "system_prompt")
_PREFERENCE = ("chosen", "rejected")


@dataclass(frozen=True)
class Format:
    """A record layout with one tree a record."""

    name: str  # for people
    keys: tuple[str, ...]  # that every record of this layout has
    transcripts: Callable[[Record], list[Transcript]]  # raises Malformed
    build: Callable[[Sequence[Transcript], ReadContext], MessageTree | None]  # counts what is dropped
    also: tuple[str, ...] = ()  # other keys that are read
    sometimes: tuple[str, ...] = ()  # keys that are read of some records
    read_of: Callable[[Record], Set[str]] = lambda record: frozenset()  # those of them that are read of this one
    passed_over: tuple[str, ...] = ()  # keys of published data that describe the record or hold it once more
    classes: tuple[str, ...] = ()  # marks whose whole numbers are classes
    compared: bool = False  # its replies are compared

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys that are read."""
        return self._always + self.sometimes

    @property
    def _always(self) -> tuple[str, ...]:
        return self.keys + self.also + _SYSTEM + READ_OF_ALL

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self._always + self.passed_over)

    def matches(self, record: Record) -> bool:
        return all(key in record for key in self.keys)

    def tree(self, record: Record, where: str, context: ReadContext) -> MessageTree | None:
        """Return the tree in a record, or None if nothing of it is left.

        Raises:
            Malformed: if the record cannot be read, or holds what would be lost.
        """
        weight = record_weight(record, self.classes, self.compared)
        found = [(_whole(record, turns, weight), rank) for turns, rank in self.transcripts(record)]
        conversations = [turns for turns, _ in found]
        unknown = unread(record, self._known | self.read_of(record) if self.sometimes else self._known)
        refuse_keys(record, [key for key in unknown if not _repeats(record, key, conversations)])
        number = count_messages(conversations)
        context.totals.trees += 1
        context.totals.messages += number
        if reason := reason_to_drop(record, context.filters):
            context.dropped[reason] += number
            return None
        return self.build(found, context)


def conversation(
    name: str, turns: Callable[[Record], Turns], keys: tuple[str, ...], **others: tuple[str, ...]
) -> Format:
    """Return the format of records that hold one conversation.

    Args:
        turns: reads the turns of a record, or raises Malformed.
        others: `also`, `passed_over` and `classes` of Format.
    """

    def transcripts(record: Record) -> list[Transcript]:
        refuse_preference(record)
        return [(turns(record) or [Turn("user", "")], None)]  # an empty record counts as an empty turn

    return Format(name, keys, transcripts, _conversation, **others)


def _conversation(found: Sequence[Transcript], context: ReadContext) -> MessageTree | None:
    ((turns, _),) = found
    kept = clean(turns, context)
    return MessageTree(content_id(kept), context.source, tuple(messages_of(kept))) if kept else None


def refuse_preference(record: Record) -> None:
    """Raise Malformed if the record holds a chosen and a rejected reply."""
    if all(record.get(key) is not None for key in _PREFERENCE):
        raise Malformed(
            "must be a conversation to learn from, but is a preference (`chosen` and `rejected`), which launch/dpo.py "
            "trains on; name both in `data.ignore_keys` to learn what stands beside them",
            "another layout",
        )


def _whole(record: Record, turns: Turns, weight: float) -> list[Turn]:
    """Return the turns of a record, tidied and weighed, behind the system text that stands beside them.

    If they open with it already, it is not repeated.
    """
    texts = (value(record, key, str, "a string or null", optional=True) for key in _SYSTEM)
    system = [Turn("system", tidy(text)) for text in texts if text]
    tidied = [Turn(role, tidy(text), own * weight if role in SUPERVISED_ROLES else own) for role, text, own in turns]
    return tidied if tidied[: len(system)] == system else system + tidied


def count_messages(conversations: Sequence[Turns]) -> int:
    """Count the messages of some conversations, once those that all open with; each has at least one of its own."""
    if len(conversations) == 1:
        return len(conversations[0])
    shared = 0
    for turns in zip(*(turns[:-1] for turns in conversations), strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        shared += 1
    return shared + sum(len(turns) - shared for turns in conversations)


def _repeats(record: Record, key: str, conversations: Sequence[Turns]) -> bool:
    """Return true if all that stands under `key`, a text or messages, also stands in the turns."""
    try:
        said = [record[key]] if isinstance(record[key], str) else [turn.text for turn in chat_messages(record, key)]
    except Malformed:
        return False
    texts = {_letters(turn.text) for turns in conversations for turn in turns}
    return all(_letters(text) in texts for text in said)


def _letters(text: str) -> str:
    """Return a text without space and capitals, in which published copies of a turn differ from it."""
    return "".join(text.split()).casefold()
