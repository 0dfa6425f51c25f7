"""A message tree is one tree in depth-first order, or it does not come to be."""

import dataclasses
from random import Random

import pytest

from gpt2ft.conversation import CHAT_ROLES, ROLES, SUPERVISED_ROLES, Message, MessageTree

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
    assert ROLES == ("system", "user", "assistant", "text")
    assert CHAT_ROLES == ("system", "user", "assistant")
    assert SUPERVISED_ROLES == ("assistant", "text")


@pytest.mark.parametrize(("leaf", "path"), [(0, [0]), (1, [0, 1]), (3, [0, 1, 2, 3]), (4, [0, 4])])
def test_path_to_runs_from_the_root(leaf, path):
    assert MessageTree("t", "test", TEA).path_to(leaf) == path


@pytest.mark.parametrize("parents", [(None,), (None, 0), (None, 0, 0, 0), (None, 0, 1, 0, 3), (None, 0, 1, 2, 1, 0)])
def test_depth_first_order_is_accepted(parents):
    assert [message.parent for message in tree(*parents).messages] == list(parents)


@pytest.mark.parametrize("parents", [(), (0,), (0, None)])
def test_a_tree_opens_with_its_root(parents):
    with pytest.raises(ValueError, match="tree t: .* root"):
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
    with pytest.raises(ValueError, match=f"tree t: message {message} "):
        tree(*parents)


def test_turns_make_a_tree_with_one_path():
    turns = [("system", "Be brief."), ("user", "Tea?"), ("assistant", "Yes.")]
    plain = MessageTree.from_turns("t", "test", turns)
    assert plain.path_to(2) == [0, 1, 2]
    assert [(message.role, message.text, message.parent) for message in plain.messages] == [
        ("system", "Be brief.", None),
        ("user", "Tea?", 0),
        ("assistant", "Yes.", 1),
    ]
    with pytest.raises(ValueError, match="first message"):
        MessageTree.from_turns("t", "test", [])


class TestLeadingToReply:
    """Roles by their first letter; parents by index."""

    def useful(self, roles, *parents):
        names = {role[0]: role for role in ROLES}
        messages = (Message(names[role], "", parent) for role, parent in zip(roles, (None, *parents), strict=True))
        return MessageTree("t", "test", tuple(messages)).leading_to_reply()

    def test_of_the_drawing(self):
        assert MessageTree("t", "test", TEA).leading_to_reply() == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("roles", "parents", "useful"),
        [
            ("u", (), []),
            ("suu", (0, 0), []),
            ("ua", (0,), [0, 1]),
            ("uau", (0, 1), [0, 1]),  # an unanswered question at the end
            ("uauuuaua", (0, 1, 0, 3, 0, 5, 6), [0, 1, 5, 6, 7]),  # and two that are unanswered one below the other
            ("suau", (0, 1, 0), [0, 1, 2]),
            ("t", (), [0]),
        ],
    )
    def test_of_small_trees(self, roles, parents, useful):
        assert self.useful(roles, *parents) == useful

    def test_the_rule_itself_on_random_trees(self):
        """A message stays if one to be learnt stands at it or below it, found here by walking all paths."""
        random, left_out, emptied = Random(0), 0, 0
        for _ in range(300):
            size, path, parents = random.randrange(1, 12), [0], []
            for index in range(1, size):
                path = path[: random.randrange(1, len(path) + 1)]
                parents.append(path[-1])
                path.append(index)
            roles = random.choices("sua", weights=(1, 6, 2), k=size)
            above = {0: [0]}
            for index, parent in enumerate(parents, start=1):
                above[index] = [*above[parent], index]
            expected = sorted({stays for index in range(size) if roles[index] == "a" for stays in above[index]})
            assert self.useful(roles, *parents) == expected
            left_out += 0 < len(expected) < size
            emptied += not expected
        assert left_out > 50
        assert emptied > 50


def test_messages_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TEA[0].text = "Coffee?"
