"""Preference groups in message trees: a prompt, all that stands above it, and its ranked replies."""

from collections import Counter

from gpt2ft.conversation import MessageTree


def preference_groups(tree: MessageTree, dropped: Counter[str]) -> list[list[int]]:
    """Return the messages of each group as ascending indices: the path to the prompt, then at least two replies.

    Only replies of different rank can be compared, and none that is masked. Of replies with the same text the better
    one stays. Every message that is in no group is counted in `dropped`, under one reason.
    """
    replies: dict[int, list[int]] = {}
    for index, message in enumerate(tree.messages):
        if message.role == "assistant" and message.parent is not None:
            replies.setdefault(message.parent, []).append(index)
    found, used, reasons = [], set(), {}
    for prompt, siblings in sorted(replies.items()):
        comparable = _comparable(tree, siblings, reasons)
        if comparable:
            found.append([*tree.path_to(prompt), *comparable])
            used.update(found[-1])
    for index in range(len(tree.messages)):
        if index not in used:
            dropped[reasons.get(index, "in no pair")] += 1
    return found


def _comparable(tree: MessageTree, siblings: list[int], reasons: dict[int, str]) -> list[int]:
    """Return the replies that can be compared with another, ascending; put the reason of all others in `reasons`."""
    best: dict[str, int] = {}  # text -> the best reply with it
    ranks: dict[int, int] = {}
    ranked = [(tree.messages[index].rank, index) for index in siblings]
    reasons.update({index: "reply without a rank" for rank, index in ranked if rank is None})
    reasons.update({index: "marked as not to be learnt" for index in siblings if tree.messages[index].masked})
    for rank, index in sorted((rank, index) for rank, index in ranked if index not in reasons):
        if best.setdefault(tree.messages[index].text, index) != index:
            reasons[index] = "same text as a better reply"
        else:
            ranks[index] = rank
    if len(set(ranks.values())) > 1:
        return sorted(ranks)
    reasons.update(dict.fromkeys(ranks, "tied with all others" if len(ranks) > 1 else "nothing to compare it with"))
    return []
