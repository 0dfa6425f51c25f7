"""Conversations as plain Python, which every data source produces and every template renders.

A conversation tree keeps each message once. Its messages stand in depth-first order, so a subtree
is a contiguous run and a parent comes before its replies:

    0 user        What is tea?                   parent None
    1   assistant   A hot drink.                 parent 0
    2     user        And cold?                  parent 1
    3       assistant   Iced tea.                parent 2
    4   assistant   Leaves in hot water.         parent 0

A plain conversation is a tree with one path. A plain text is a tree with one message of the role "text".
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

Role = Literal["system", "user", "assistant", "text"]
ROLES: tuple[Role, ...] = get_args(Role)
CHAT_ROLES: tuple[Role, ...] = ROLES[:3]
SUPERVISED_ROLES: tuple[Role, ...] = ROLES[2:]  # what training supervises


TURN_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def turn_text(content: object) -> str:
    """Return the text of a turn's content, which is a string or a list of `{"type": "text", "text": ...}`.

    With `TURN_ROLES` that is what a turn may be wherever `role` and `content` are read: in data, which knows more names
    of roles, in `/load`, by the server and by the exported template.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("must be a string or a list of text parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('must hold parts like {"type": "text", "text": "..."}')
    return "".join(part["text"] for part in content)


def tidy(text: str) -> str:
    """Return a text as messages hold it: plain line ends, no space around it."""
    return text.replace("\r\n", "\n").strip()


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `rank` orders the sibling replies of one parent: 0 is the best, None is unranked.

    `weight` is what a reply counts where it is learnt, from 0 to 1. One that is `masked` counts nothing: it only stands
    in the context. `label` tells of a reply that it is desirable, or that it is not, whatever other replies there are.
    """

    role: Role
    text: str
    parent: int | None = None
    rank: int | None = None
    weight: float = 1.0
    label: bool | None = None

    @property
    def masked(self) -> bool:
        return not self.weight

    @property
    def is_supervised(self) -> bool:
        return self.role in SUPERVISED_ROLES and not self.masked


@dataclass(frozen=True, slots=True)
class MessageTree:
    """Messages in depth-first order under one root; `id` is unique within a data source.

    Raises:
        ValueError: if the messages are not one tree in depth-first order.
    """

    id: str
    source: str
    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        if not self.messages or self.messages[0].parent is not None:
            raise ValueError(f"tree {self.id}: the first message must be the root, without a parent")
        path: list[int] = [0]  # the messages from the root to the one last read
        for index, message in enumerate(self.messages[1:], start=1):
            while path and path[-1] != message.parent:
                path.pop()
            if not path:
                raise ValueError(f"tree {self.id}: message {index} does not follow its parent depth first")
            path.append(index)

    @classmethod
    def from_turns(cls, id: str, source: str, turns: Iterable[tuple[Role, str]]) -> "MessageTree":
        """Return a tree with one path."""
        messages = tuple(
            Message(role, text, parent=index - 1 if index else None) for index, (role, text) in enumerate(turns)
        )
        return cls(id, source, messages)

    def leading_to_reply(self) -> list[int]:
        """Return the messages that training can use: the supervised ones and their ancestors."""
        useful = [message.is_supervised for message in self.messages]
        for index in range(len(useful) - 1, 0, -1):
            if useful[index]:
                useful[self.messages[index].parent] = True  # type: ignore[index]
        return [index for index, is_useful in enumerate(useful) if is_useful]

    def with_last_replies_alone(self) -> "MessageTree":
        """Return the tree in which a reply that another one follows, on any path, counts nothing."""
        followed = [False] * len(self.messages)
        for index in range(len(self.messages) - 1, 0, -1):
            if followed[index] or self.messages[index].role == "assistant":
                followed[self.messages[index].parent] = True  # type: ignore[index]
        messages = (
            replace(message, weight=0.0) if message.role == "assistant" and is_followed else message
            for message, is_followed in zip(self.messages, followed, strict=True)
        )
        return replace(self, messages=tuple(messages))

    def path_to(self, index: int) -> list[int]:
        """Return the messages from the root to `index`, both included."""
        path: list[int] = []
        at: int | None = index
        while at is not None:
            path.append(at)
            at = self.messages[at].parent
        return path[::-1]
