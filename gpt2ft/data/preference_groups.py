"""Preference groups in message trees: a prompt, all that stands above it, and its ranked or labelled replies."""

from collections import Counter
from dataclasses import replace

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


def labelled_groups(tree: MessageTree, dropped: Counter[str]) -> tuple[MessageTree, list[list[int]]]:
    """Return the tree with labels as ranks, 0 for desirable and 1 for not, and the messages of each group.

    The last message of a tree may have a label. Otherwise of the ranked replies to a prompt the best are desirable, and
    the worst are not. Every message that is in no group is counted in `dropped`.
    """
    last = tree.messages[-1]
    if last.label is not None and last.masked:
        dropped["marked as not to be learnt"] += len(tree.messages)
        return tree, []
    if last.label is not None:
        ranks = {len(tree.messages) - 1: 0 if last.label else 1}
        groups = [tree.path_to(len(tree.messages) - 1)]
    else:
        ranks, groups, compared = {}, [], preference_groups(tree, dropped)
        for group in compared:
            replies = [index for index in group if tree.messages[index].parent == tree.messages[group[-1]].parent]
            levels = [tree.messages[index].rank for index in replies]
            ends = {min(levels): 0, max(levels): 1}
            ranks |= {index: ends[rank] for index, rank in zip(replies, levels, strict=True) if rank in ends}
            groups.append([index for index in group if index not in replies or index in ranks])
        dropped["neither best nor worst"] += len(set().union(*compared) - set().union(*groups))
    messages = [replace(message, rank=ranks.get(index)) for index, message in enumerate(tree.messages)]
    return replace(tree, messages=tuple(messages)), groups
