"""Pairs of replies to a prompt, and the cutting of preference groups to fit the context and a stream.

A group is a token tree with one path, the prompt, and its ranked replies below it:

    0 user        What is tea?        parent -1
    1   assistant   A hot drink.      parent 0     rank 0
    2   assistant   Leaves in water.  parent 0     rank 1      pairs (1, 2), (1, 3), (2, 3)
    3   assistant   Okay.             parent 0     rank 2

So a prompt is computed once, and so is each reply, however many pairs they are in. Groups of one conversation may be
merged into one tree (see chunks.py), in which a reply is part of the prompts below it:

    0 user            What is tea?        parent -1
    1   assistant       A hot drink.      parent 0     rank 0
    2     user            And cold?       parent 1
    3       assistant       Iced tea.     parent 2     rank 0
    4       assistant       No.           parent 2     rank 1      pair (3, 4)
    5   assistant       Okay.             parent 0     rank 1      pair (1, 5)
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, product
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gpt2ft.conversation import ROLES
from gpt2ft.data.kinds import PREFERENCES, DataKind
from gpt2ft.data.store import TokenStore
from gpt2ft.data.token_tree import TokenTree
from gpt2ft.settings.sections import PairRule
from gpt2ft.settings.training import PairWeight
from gpt2ft.text.context import kept_turns

LEAST_REPLY = 16  # tokens that a prompt must leave to a reply that is cut


@dataclass(frozen=True)
class PreferencePairs:
    """Stored groups as chunks: replies compared by `rule`, cut to the context, split by pairs.

    With the `weight` "pair" every pair counts 1. With "prompt" every prompt counts 1, shared equally by its pairs,
    whatever streams they are in. Pairs whose replies are alike once cut are gone before that.
    """

    rule: PairRule
    weight: PairWeight
    max_length: int
    capacity: int
    merges: bool = False
    whole_rankings: bool = False  # all replies to a prompt share a stream, for losses that rank them
    kind: ClassVar[DataKind] = PREFERENCES
    counts_once: ClassVar[bool] = False  # every pair counts

    @property
    def replies_cut_at(self) -> int:
        return self.max_length

    def count(self, store: TokenStore) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return [rows, 5] `counts(whole(...))` of all groups at once, and [rows] true where a group fits as it is."""
        (lengths, firsts), (parents, _), (ranks, _) = map(store.nodes, ("lengths", "parents", "ranks"))
        number = len(store)
        rows = np.repeat(np.arange(number), np.diff(firsts))
        is_reply = np.ones(len(lengths), bool)
        is_reply[(parents + firsts[rows])[parents >= 0]] = False
        prompts = np.bincount(rows, lengths * ~is_reply, number).astype(np.int64)
        rows, lengths = rows[is_reply], lengths[is_reply]
        times = times_compared(rows, ranks[is_reply], self.rule)
        pairs = np.bincount(rows, times, number).astype(np.int64) // 2
        tokens_if_unpacked = 2 * pairs * prompts + np.bincount(rows, times * lengths, number).astype(np.int64)
        rows, lengths = rows[times > 0], lengths[times > 0]
        replies = np.bincount(rows, minlength=number)
        of_replies = np.bincount(rows, lengths, number).astype(np.int64)
        longest = np.zeros(number, np.int64)
        np.maximum.at(longest, rows, lengths)
        tokens = prompts + of_replies
        counted = np.stack([tokens, of_replies - replies, replies, pairs, tokens_if_unpacked], axis=1)
        return counted, (prompts + longest <= self.max_length) & (tokens <= self.capacity)

    def whole(self, store: TokenStore, row: int, group: int) -> TokenTree:
        """Return the group of a row with its pairs, without the replies that are in none."""
        tree, ranks = store.tree(row, group), store.ranks(row)
        is_reply = np.ones(len(tree.parents), bool)
        is_reply[tree.parents[1:]] = False
        replies = np.flatnonzero(is_reply)
        pairs = [(int(replies[a]), int(replies[b])) for a, b in compared(ranks[replies].tolist(), self.rule)]
        return self._weighed(_of_pairs(tree, np.flatnonzero(~is_reply).tolist(), pairs, [1.0] * len(pairs)))

    def cut(self, tree: TokenTree, left_out: Counter[str]) -> list[TokenTree]:
        """Return the group in parts that fit context and streams; what is left out is counted.

        Raises:
            ValueError: if a prompt with two of its replies, or with all of `whole_rankings`, does not fit a stream.
        """
        fitting = self._fitting(tree, left_out)
        if fitting is not None and self.whole_rankings and len(fitting.tokens) > self.capacity:
            replies = int((fitting.weights > 0).sum())
            raise _too_large(f"a prompt and the {replies} replies to it that are ranked", fitting, self.capacity)
        return [] if fitting is None else split_by_pairs(fitting, self.capacity)

    def contents(self, tree: TokenTree, part: TokenTree) -> NDArray[np.int32]:
        """Return the messages of the pairs."""
        return part.messages[part.pairs].ravel()

    def part(self, tree: TokenTree, number: int, contents: NDArray[np.int32]) -> TokenTree:
        fitting = self._fitting(tree, Counter())
        found, held = (
            fitting.messages[fitting.pairs].tolist(),
            set(zip(*contents.reshape(-1, 2).T.tolist(), strict=True)),
        )
        return _with_pairs(fitting, [number for number, pair in enumerate(found) if tuple(pair) in held])

    def _fitting(self, tree: TokenTree, left_out: Counter[str]) -> TokenTree | None:
        """Return the group with every path in the context and its weight shared anew, or None."""
        fitting = fit_replies(tree, self.max_length, left_out)
        return fitting if fitting is None or len(fitting.pairs) == len(tree.pairs) else self._weighed(fitting)

    def _weighed(self, tree: TokenTree) -> TokenTree:
        weight = 1.0 if self.weight == "pair" else 1 / len(tree.pairs)
        return replace(tree, pair_weights=np.full(len(tree.pairs), weight, np.float32))


def compared(ranks: list[int], rule: PairRule) -> list[tuple[int, int]]:
    """Return (better, worse) indices into `ranks`; replies that share a rank are never compared.

    `all` compares every reply with every worse one, `best_worst` those of the best rank with those of the worst,
    `adjacent` those of each rank with those of the next.
    """
    levels = [[index for index, other in enumerate(ranks) if other == rank] for rank in sorted(set(ranks))]
    chosen = {
        "all": combinations(levels, 2),
        "best_worst": [(levels[0], levels[-1])] if len(levels) > 1 else [],
        "adjacent": pairwise(levels),
    }[rule]
    return [pair for better, worse in chosen for pair in product(better, worse)]


def times_compared(groups: NDArray[np.integer], ranks: NDArray[np.integer], rule: PairRule) -> NDArray[np.int64]:
    """Return [n], for each of n replies the number of pairs of `compared` that it is in.

    Args:
        groups: [n] number of each reply's group, ascending.
        ranks: [n]
    """
    order = np.lexsort((ranks, groups))
    groups, ranks = groups[order], ranks[order]
    opens = np.ones(len(order), bool)  # a level: the replies of a group that share a rank
    opens[1:] = (groups[1:] != groups[:-1]) | (ranks[1:] != ranks[:-1])
    sizes = np.bincount(np.cumsum(opens) - 1)
    groups = groups[opens]
    is_best, is_worst = np.ones((2, len(sizes)), bool)
    is_best[1:] = is_worst[:-1] = groups[1:] != groups[:-1]
    levels = np.diff(np.flatnonzero(np.append(is_best, True)))  # of each group
    if rule == "all":
        others = np.repeat(np.add.reduceat(sizes, np.flatnonzero(is_best)), levels) - sizes
    elif rule == "best_worst":
        best, worst = np.repeat(sizes[is_best], levels), np.repeat(sizes[is_worst], levels)
        others = np.where(is_best, worst, 0) + np.where(is_worst, best, 0)
        others[is_best & is_worst] = 0
    else:
        better, worse = np.append(0, sizes[:-1]), np.append(sizes[1:], 0)
        others = np.where(is_best, 0, better) + np.where(is_worst, 0, worse)
    times = np.empty(len(order), np.int64)
    times[order] = np.repeat(others, sizes)
    return times


def fit_replies(tree: TokenTree, limit: int, left_out: Counter[str]) -> TokenTree | None:
    """Return the group with prompt and longest reply within `limit` tokens; None if that leaves nothing to compare.

    The oldest whole turns of the prompt give way, as everywhere. Where the last turn alone leaves too little room,
    replies are cut at its end: a cut reply has no `<|end|>`.
    """
    if (tree.depths + tree.lengths).max() <= limit:
        return tree
    replies = np.unique(tree.pairs).tolist()
    prompt = tree.path_to(replies[0])[:-1]
    longest = int(tree.lengths[replies].max())
    roles = [ROLES[role] for role in tree.roles[prompt]]
    kept = kept_turns([*roles, "assistant"], [*tree.lengths[prompt].tolist(), longest], limit)
    if kept is not None:
        return _of_pairs(tree, [prompt[i] for i in kept[:-1]], tree.pairs.tolist(), tree.pair_weights.tolist())
    shortest = [node for i, node in enumerate(prompt) if i == len(prompt) - 1 or roles[i] == "system"]
    room = limit - int(tree.lengths[shortest].sum())
    if room < LEAST_REPLY:
        left_out["prompts that leave no room for a reply"] += 1
        return None
    tokens = {
        node: tree.tokens[tree.starts[node] : tree.starts[node] + min(tree.lengths[node], room)] for node in replies
    }
    differ = [not np.array_equal(tokens[a], tokens[b]) for a, b in tree.pairs.tolist()]
    left_out["pairs whose replies are alike once cut"] += len(differ) - sum(differ)
    if not any(differ):
        return None
    shorter = _of_pairs(tree, shortest, tree.pairs[differ].tolist(), tree.pair_weights[differ].tolist())
    return _shortened(shorter, room)


def split_by_pairs(tree: TokenTree, capacity: int) -> list[TokenTree]:
    """Return groups of at most `capacity` tokens under the same prompt, each pair in one of them.

    Raises:
        ValueError: if the prompt and the two replies of a pair are more.
    """
    if len(tree.tokens) <= capacity:
        return [tree]
    pairs = tree.pairs.tolist()
    prompt = tree.path_to(pairs[0][0])[:-1]
    room = capacity - int(tree.lengths[prompt].sum())
    parts: list[tuple[set[int], list[int]]] = []  # replies, numbers of their pairs
    for number, pair in enumerate(pairs):
        if int(tree.lengths[pair].sum()) > room:
            raise _too_large("a prompt and the two replies of a pair", _with_pairs(tree, [number]), capacity)
        for replies, numbers in parts:
            if int(tree.lengths[sorted(replies | set(pair))].sum()) <= room:
                replies.update(pair)
                numbers.append(number)
                break
        else:
            parts.append((set(pair), [number]))
    return [_with_pairs(tree, numbers) for _, numbers in parts]


def _too_large(what: str, tree: TokenTree, capacity: int) -> ValueError:
    needed = len(tree.tokens)
    return ValueError(
        f"{what} are {needed:,} tokens, but a stream holds {capacity:,}: `tokens_per_micro_batch` must be at least "
        f"{-(-needed // 128) * 128}, or `auto_from` where it is auto"
    )


def _with_pairs(tree: TokenTree, numbers: list[int]) -> TokenTree:
    """Return the group of some of its pairs."""
    prompt = tree.path_to(int(tree.pairs[0, 0]))[:-1]
    return _of_pairs(tree, prompt, tree.pairs[numbers].tolist(), tree.pair_weights[numbers].tolist())


def _of_pairs(tree: TokenTree, prompt: list[int], pairs: list[tuple[int, int]], weights: list[float]) -> TokenTree:
    """Return the group of these pairs: the nodes of `prompt` and the replies compared, which alone are supervised."""
    replies = sorted({node for pair in pairs for node in pair})
    supervised = np.zeros(len(tree.parents), np.float32)
    supervised[replies] = 1
    nodes = [*prompt, *replies]
    place = {node: new for new, node in enumerate(nodes)}
    index = np.array([[place[a], place[b]] for a, b in pairs], np.int32).reshape(-1, 2)
    columns = {
        "pairs": index,
        "pair_weights": np.array(weights, np.float32),
        "rankings": np.zeros(len(pairs), np.int32),
    }
    return replace(tree.select(nodes, supervised), **columns)


def _shortened(tree: TokenTree, room: int) -> TokenTree:
    """Return the group with every reply cut after `room` tokens."""
    lengths = np.where(tree.weights > 0, np.minimum(tree.lengths, room), tree.lengths).astype(np.int32)
    within = np.arange(len(tree.tokens)) - np.repeat(tree.starts, tree.lengths)
    return replace(tree, tokens=tree.tokens[within < np.repeat(lengths, tree.lengths)], lengths=lengths)
