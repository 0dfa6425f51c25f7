"""The one rule by which a conversation is made to fit the context, in training, chat and serving alike.

Training does not apply it anew for each reply of a long conversation, but for windows that hold several: see
`fit_context` in data/token_tree.py.
"""

from collections.abc import Sequence

from gpt2ft.conversation import Role


def kept_turns(roles: Sequence[Role], lengths: Sequence[int], limit: int) -> list[int] | None:
    """Return the turns of a path that stay within `limit` tokens: the oldest whole turns give way.

    The last turn always stays, and so does a system turn at the root. What follows the gap opens with a
    user turn, as every conversation does.

    Args:
        roles, lengths: of the turns from the root on; lengths in tokens.

    Returns:
        Indices of the turns that stay, or None if not even the last exchange fits.
    """
    first = 1 if roles[0] == "system" else 0
    system = lengths[0] if first else 0
    remaining = sum(lengths)
    if remaining <= limit:
        return list(range(len(roles)))
    remaining -= system
    for start in range(first, len(roles)):
        if roles[start] == "user" and system + remaining <= limit:
            return [*range(first), *range(start, len(roles))]
        remaining -= lengths[start]
    return None
