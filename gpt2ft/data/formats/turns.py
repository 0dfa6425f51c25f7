"""One conversation, written as a list of turns: the rules that all such layouts share.

- Turns of one role that follow each other are joined by a blank line.
- An assistant turn before the first user turn is dropped, and so is an empty system turn.
- An empty turn, or a system turn that is not the first, ends the conversation: it and what follows are dropped.
- What leads to no reply is dropped.

All of it is counted. A conversation without an id of its own is named by its content, so that the same one is
recognised wherever it is met.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from gpt2ft.conversation import Message, Role
from gpt2ft.data.reading import Malformed, ReadContext


class Turn(NamedTuple):
    """One turn, and what it counts where it is learnt."""

    role: Role
    text: str
    weight: float = 1.0


Turns = Sequence[Turn]


def clean(turns: Turns, context: ReadContext) -> list[Turn]:
    """Return the turns that stay, by the rules above."""
    dropped = context.dropped
    alternating = joined(turns)
    if len(alternating) < len(turns):
        dropped["joined to the turn above"] += len(turns) - len(alternating)
    kept: list[Turn] = []
    for number, turn in enumerate(alternating):
        role, text, _ = turn
        if role == "system" and not kept and not text:
            dropped["empty"] += 1
        elif role == "assistant" and all(above.role == "system" for above in kept):
            dropped["bad role order"] += 1
        elif not text or (role == "system" and kept):
            dropped["bad role order" if text else "empty"] += 1
            dropped["below a dropped message"] += len(alternating) - number - 1
            break
        else:
            kept.append(turn)
    while kept and kept[-1].role not in ("assistant", "text"):
        kept.pop()
        dropped["no reply"] += 1
    return kept


def joined(turns: Turns) -> list[Turn]:
    """Return the turns, those of one role that follow each other as one.

    Raises:
        Malformed: if they do not count the same.
    """
    found: list[Turn] = []
    for turn in turns:
        above = found[-1] if found else None
        if above is None or above.role != turn.role:
            found.append(turn)
        elif not above.text or not turn.text:
            found[-1] = turn if turn.text else above
        elif above.weight != turn.weight:
            raise Malformed(
                "weights (`loss`, `weight`) must agree on assistant turns that follow each other, as they are joined, "
                "but do not"
            )
        else:
            found[-1] = above._replace(text=f"{above.text}\n\n{turn.text}")
    return found


def messages_of(turns: Turns) -> list[Message]:
    """Return the turns as messages, each below the one before."""
    return [
        Message(role, text, index - 1 if index else None, weight=weight)
        for index, (role, text, weight) in enumerate(turns)
    ]


def content_id(turns: Turns) -> str:
    """Return a digest of the content, as an id."""
    digest = hashlib.blake2b(digest_size=12)
    for role, text, *_ in turns:
        digest.update(f"{role}\0{text}\0".encode())
    return digest.hexdigest()
