"""One topic, whatever is asked: the prompts of any data, each answered by a reply from a file."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from gpt2ft.conversation import Message, MessageTree
from gpt2ft.data.reading import DataError
from gpt2ft.random import seed_for


@dataclass(frozen=True)
class Topic:
    """Replies that take the place of whatever a data source answers."""

    replies: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.replies).encode()).hexdigest()

    def applied_to(self, tree: MessageTree, dropped: Counter[str]) -> MessageTree:
        """Return the best-ranked path of a conversation with its prompts as they are and other replies.

        Which reply stands where depends on the conversation's id alone; within one conversation they differ, as long
        as there are enough. What stands beside the path is counted.

        Raises:
            DataError: if the tree is a plain text, which has no prompt.
        """
        messages = []
        for turn, (message, reply) in enumerate(self._answered(tree, dropped)):
            messages.append(Message(message.role, reply or message.text, turn - 1 if turn else None))
        return MessageTree(tree.id, tree.source, tuple(messages))

    def against_own(self, tree: MessageTree, dropped: Counter[str]) -> MessageTree:
        """Return the same as preferences: each such reply is better than the one it would take the place of.

        The conversation goes on below the better one.

        Raises:
            DataError: if the tree is a plain text.
        """
        messages: list[Message] = []
        above = None
        for message, reply in self._answered(tree, dropped):
            if reply is not None:
                messages.append(Message("assistant", message.text, above, rank=1))
            messages.append(Message(message.role, reply or message.text, above, rank=None if reply is None else 0))
            above = len(messages) - 1
        return MessageTree(tree.id, tree.source, tuple(messages))

    def _answered(self, tree: MessageTree, dropped: Counter[str]) -> Iterator[tuple[Message, str | None]]:
        """Yield the messages of the best-ranked path, and beside each assistant turn the topic's reply."""
        if tree.messages[0].role == "text":
            raise DataError(
                f"{tree.source} holds plain text, which has no prompts that `data.topic_replies` could answer"
            )
        path = [tree.messages[0]]
        index = 0
        for number, message in enumerate(tree.messages):
            if message.parent == index and number:
                path.append(message)
                index = number
        dropped["beside the path kept for the topic"] += len(tree.messages) - len(path)
        number = seed_for(0, f"topic {tree.id}")
        for turn, message in enumerate(path):
            is_reply = message.role == "assistant"
            yield message, self.replies[(number + turn) % len(self.replies)] if is_reply else None
