"""One topic, whatever is asked: the prompts of any data, each answered by a reply from a file."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from gpt2ft.conversation import LEARNT_ROLES, Message, MessageTree
from gpt2ft.data.reading import DataError, Filters
from gpt2ft.data.sources import read_trees
from gpt2ft.files import user_path
from gpt2ft.random import seed_for


@dataclass(frozen=True)
class Topic:
    """Replies that take the place of whatever a data source answers."""

    replies: tuple[str, ...]

    @classmethod
    def read(cls, source: str) -> "Topic":
        """From a .txt file with one reply a line, or from whatever is to be learnt in any other data source.

        Raises:
            DataError: if it cannot be read or holds no reply.
        """
        if source.lower().endswith(".txt"):
            try:
                texts = user_path(source).read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"`data.topic_replies` = {source} cannot be read: {error}") from error
        else:
            messages = (message for tree in read_trees(source, Filters()) for message in tree.messages)
            texts = [message.text for message in messages if message.role in LEARNT_ROLES]
        replies = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
        if not replies:
            raise DataError(f"`data.topic_replies` = {source} must hold replies, but holds none")
        return cls(replies)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.replies).encode()).hexdigest()

    def applied_to(self, tree: MessageTree, dropped: Counter[str]) -> MessageTree:
        """The best-ranked path of a conversation with its prompts as they are and other replies.

        Which reply stands where depends on the conversation's id alone; within one conversation they differ, as long
        as there are enough. What stands beside the path is counted.

        Raises:
            DataError: if the tree is a plain text, which has no prompt.
        """
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
        messages = []
        for turn, message in enumerate(path):
            text = message.text
            if message.role == "assistant":
                text = self.replies[(number + turn) % len(self.replies)]
            messages.append(Message(message.role, text, turn - 1 if turn else None))
        return MessageTree(tree.id, tree.source, tuple(messages))
