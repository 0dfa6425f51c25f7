"""The kinds of data: conversations, whose replies are supervised, preferences, whose replies are compared, and replies
that are labelled as desirable or not.

All that differs between them on the way from a record to a stored row stands here. A chunking rule (chunks.py,
pairs.py) then cuts rows to fit the context, and names the kind that it is for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpt2ft.conversation import ROLES, MessageTree
from gpt2ft.data.formats import CONVERSATION_FORMATS, LABELLED_FORMATS, PREFERENCE_FORMATS, AnyFormat
from gpt2ft.data.formats.keys import refuse_fractions
from gpt2ft.data.preference_groups import labelled_groups, preference_groups
from gpt2ft.data.reading import ReadContext
from gpt2ft.data.topic import Topic
from gpt2ft.settings.training import TrainOn

RowsOfTree = tuple[MessageTree, list[list[int]]]  # the tree as it is stored, and the messages of each row


@dataclass(frozen=True)
class DataKind:
    """One way to read a source, and so one meaning of a row in its store."""

    name: str
    unit: str  # name of a row, in the plural
    nothing: str  # words for a source of which nothing is left
    formats: tuple[AnyFormat, ...]  # the layouts it is read from, the more particular first
    rows: Callable[[MessageTree, Topic | None, ReadContext], RowsOfTree]  # counts the messages that are in none
    sampled_reply: Callable[[NDArray[np.int8]], int]  # [K] roles of a row -> the node whose prompt is shown in samples
    rows_share_conversations: bool  # several rows may be of one conversation
    pair: tuple[str, str] = ("pair of replies", "pairs of replies")  # name of what is compared, and its plural


def _conversation_rows(tree: MessageTree, topic: Topic | None, context: ReadContext) -> RowsOfTree:
    """Return one row: what leads to a reply, with the replies of the topic if there is one."""
    tree = topic.applied_to(tree, context.dropped) if topic else tree
    useful = tree.leading_to_reply()
    left_out = set(range(len(tree.messages))).difference(useful)
    masked = sum(tree.messages[index].masked for index in left_out)
    context.dropped["marked as not to be learnt"] += masked
    context.dropped["no reply"] += len(left_out) - masked
    return tree, [useful] if useful else []


def _last_turn_rows(tree: MessageTree, topic: Topic | None, context: ReadContext) -> RowsOfTree:
    """Return the same of the last replies alone: those that no other one follows, on any path."""
    tree = topic.applied_to(tree, context.dropped) if topic else tree
    return _conversation_rows(tree.with_last_replies_alone(), None, context)


def _preference_rows(tree: MessageTree, topic: Topic | None, context: ReadContext) -> RowsOfTree:
    """Return a row for every prompt with replies to compare."""
    tree = _against_topic(tree, topic, context)
    return tree, preference_groups(tree, context.dropped)


def _labelled_rows(tree: MessageTree, topic: Topic | None, context: ReadContext) -> RowsOfTree:
    """Return a row for every prompt with labelled replies."""
    return labelled_groups(_against_topic(tree, topic, context), context.dropped)


def _against_topic(tree: MessageTree, topic: Topic | None, context: ReadContext) -> MessageTree:
    """Return the tree with the replies of a topic, if there is one, as better ones beside its own; all count wholly."""
    if topic:
        tree = topic.applied_to(tree, context.dropped, against_own=True)
        context.totals.messages += sum(message.rank == 0 for message in tree.messages)  # the topic's own
    refuse_fractions(message.weight for message in tree.messages)
    return tree


CONVERSATIONS = DataKind(
    name="conversations",
    unit="conversations",
    nothing="nothing to train on",
    formats=CONVERSATION_FORMATS,
    rows=_conversation_rows,
    sampled_reply=lambda roles: int((roles == ROLES.index("assistant")).argmax()),
    rows_share_conversations=False,
)
LAST_TURNS = replace(CONVERSATIONS, name="last turns", rows=_last_turn_rows)
LEARNT: dict[TrainOn, DataKind] = {"all": CONVERSATIONS, "last": LAST_TURNS}
PREFERENCES = DataKind(
    name="preferences",
    unit="prompts",
    nothing="no replies that can be compared",
    formats=PREFERENCE_FORMATS,
    rows=_preference_rows,
    sampled_reply=lambda roles: len(roles) - 1,
    rows_share_conversations=True,
)
LABELLED = DataKind(
    name="labelled replies",
    unit="prompts",
    nothing="no labelled replies",
    formats=LABELLED_FORMATS,
    rows=_labelled_rows,
    sampled_reply=lambda roles: len(roles) - 1,
    rows_share_conversations=True,
    pair=("labelled reply", "labelled replies"),
)
