"""The two kinds of data tell apart what is read, what is a row, and before which reply a prompt is shown."""

from collections import Counter

import numpy as np
import pytest

from gpt2ft.conversation import ROLES, Message, MessageTree
from gpt2ft.data.kinds import CONVERSATIONS, PREFERENCES
from gpt2ft.data.reading import ReadContext
from gpt2ft.data.topic import Topic
from gpt2ft.settings.sections import FilterSettings

TREE = MessageTree(
    "t",
    "test",
    (
        Message("user", "Tea?"),
        Message("assistant", "Hot.", 0, rank=0),
        Message("user", "And cold?", 1),
        Message("assistant", "Wet.", 0, rank=1),
    ),
)


@pytest.mark.parametrize(
    ("kind", "rows", "dropped"),
    [(CONVERSATIONS, [[0, 1, 3]], {"no reply": 1}), (PREFERENCES, [[0, 1, 3]], {"in no pair": 1})],
)
def test_messages_in_no_row_are_counted(kind, rows, dropped):
    context = ReadContext("test", FilterSettings())
    assert kind.rows(TREE, None, context) == (TREE, rows)
    assert +context.dropped == dropped


@pytest.mark.parametrize(
    ("kind", "replies", "added"),
    [(CONVERSATIONS, [("Kettle.", None)], 0), (PREFERENCES, [("Hot.", 1), ("Kettle.", 0)], 1)],
)
def test_a_topic_replaces_replies_or_is_set_against_them(kind, replies, added):
    context = ReadContext("test", FilterSettings())
    tree, (row,) = kind.rows(TREE, Topic(("Kettle.",)), context)
    found = [tree.messages[index] for index in row]
    assert [(m.text, m.rank) for m in found if m.role == "assistant"] == replies
    assert context.totals.messages == added
    assert +context.dropped == Counter({"beside the path kept for the topic": 1, kind_reason(kind): 1})


def kind_reason(kind):
    """The reason under which the user turn that nobody answers is counted."""
    return {"conversations": "no reply", "preferences": "in no pair"}[kind.name]


def test_the_prompt_of_a_sample_ends_before_the_first_reply_or_one_that_is_compared():
    roles = np.array([ROLES.index(role) for role in ("user", "assistant", "user", "assistant", "assistant")])
    assert CONVERSATIONS.sampled_reply(roles) == 1
    assert PREFERENCES.sampled_reply(roles) == 4
