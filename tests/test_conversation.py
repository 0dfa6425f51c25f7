"""A message tree is one tree in depth-first order, or it does not come to be."""

import dataclasses

import pytest

from gpt2ft.conversation import ROLES, Message, MessageTree

# The tree drawn in gpt2ft/conversation.py.
TEA = (
    Message("user", "What is tea?"),
    Message("assistant", "A hot drink.", 0, 0),
    Message("user", "And cold?", 1),
    Message("assistant", "Iced tea.", 2),
    Message("assistant", "Leaves in hot water.", 0, 1),
)


def tree(*parents):
    return MessageTree("t", "test", tuple(Message("user", str(i), parent) for i, parent in enumerate(parents)))


def test_roles():
    assert ROLES == ("system", "user", "assistant")


@pytest.mark.parametrize(("leaf", "path"), [(0, [0]), (1, [0, 1]), (3, [0, 1, 2, 3]), (4, [0, 4])])
def test_path_to_runs_from_the_root(leaf, path):
    assert MessageTree("t", "test", TEA).path_to(leaf) == [TEA[i] for i in path]


@pytest.mark.parametrize("parents", [(None,), (None, 0), (None, 0, 0, 0), (None, 0, 1, 0, 3), (None, 0, 1, 2, 1, 0)])
def test_depth_first_order_is_accepted(parents):
    assert [message.parent for message in tree(*parents).messages] == list(parents)


@pytest.mark.parametrize("parents", [(), (0,), (0, None)])
def test_a_tree_opens_with_its_root(parents):
    with pytest.raises(ValueError, match="tree t: the first message must be the root"):
        tree(*parents)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ((None, None), 1),  # a second root
        ((None, 0, 2), 2),  # its own parent
        ((None, 2, 0), 1),  # before its parent
        ((None, 0, 0, 1), 3),  # the subtree under 1 has ended
        ((None, 0, 1, 0, 2), 4),
        ((None, 0, 7), 2),  # no such message
        ((None, -1), 1),
    ],
)
def test_another_order_is_refused(parents, message):
    with pytest.raises(ValueError, match=f"tree t: message {message} does not follow its parent depth first"):
        tree(*parents)


def test_turns_make_a_tree_with_one_path():
    turns = [("system", "Be brief."), ("user", "Tea?"), ("assistant", "Yes.")]
    plain = MessageTree.from_turns("t", "test", turns)
    assert plain.path_to(2) == list(plain.messages)
    assert [(message.role, message.text, message.parent) for message in plain.messages] == [
        ("system", "Be brief.", None),
        ("user", "Tea?", 0),
        ("assistant", "Yes.", 1),
    ]
    with pytest.raises(ValueError, match="first message"):
        MessageTree.from_turns("t", "test", [])


def test_messages_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TEA[0].text = "Coffee?"
