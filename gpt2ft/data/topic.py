"""Topic data: the prompts of any source, each answered by a reply from a file, whatever the prompt asks."""

import hashlib
import json
from collections import Counter
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

    def applied_to(self, tree: MessageTree, dropped: Counter[str], against_own: bool = False) -> MessageTree:
        """Return the best-ranked path of a conversation with its prompts as they are and other replies.

        The choice of replies depends on the conversation's id alone; within one conversation they differ, as long as
        there are enough. Messages beside the path are counted as dropped.

        Args:
            against_own: keep the conversation's own reply beside each, as the worse one, and masked if it was; it goes
                on below the better.

        Raises:
            DataError: if the tree is a plain text, which has no prompt.
        """
        if tree.messages[0].role == "text":
            raise DataError(
                f"{tree.source} holds plain text, which has no prompts that `data.topic_replies` could answer"
            )
        path = _best_path(tree)
        dropped["beside the path kept for the topic"] += len(tree.messages) - len(path)
        messages: list[Message] = []
        first, above = seed_for(0, f"topic {tree.id}"), None
        for turn, message in enumerate(path):
            if message.role != "assistant":
                messages.append(Message(message.role, message.text, above))
            else:
                if against_own:
                    messages.append(Message("assistant", message.text, above, rank=1, weight=message.weight))
                reply = self.replies[(first + turn) % len(self.replies)]
                messages.append(Message("assistant", reply, above, rank=0 if against_own else None))
            above = len(messages) - 1
        return MessageTree(tree.id, tree.source, tuple(messages))


def _best_path(tree: MessageTree) -> list[Message]:
    """Return the messages from the root on, each followed by its first reply, which is its best."""
    path, last = [tree.messages[0]], 0
    for number, message in enumerate(tree.messages[1:], start=1):
        if message.parent == last:
            path.append(message)
            last = number
    return path
