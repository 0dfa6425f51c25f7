"""Replies that are desirable or not by themselves, each prompt with a reply to another one beside its own (for KTO).

    0 user        What is tea?                 parent -1
    1   assistant   A hot drink.               parent 0     desirable
    2   assistant   Okay.                      parent 0     undesirable
    3   assistant   Paris is in France.        parent 0     unrelated       pairs (1, 3), (2, 3), weights 1, -1

How likely unrelated replies have become tells how far the model has moved at large, which is what KTO measures labelled
replies against. Nothing is learnt from them, so one that does not fit is cut before its `<|end|>`.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gpt2ft.data.kinds import LABELLED, DataKind
from gpt2ft.data.mixing import Keys, mixed
from gpt2ft.data.pairs import fit_replies, split_by_pairs
from gpt2ft.data.reading import DataError
from gpt2ft.data.store import TokenStore
from gpt2ft.data.token_tree import ASSISTANT, TokenTree

DESIRABLE = 0  # rank of a stored reply; 1 where undesirable


@dataclass(frozen=True)
class LabelledReplies:
    """Stored prompts and their labelled replies as chunks, cut to the context, split where a stream holds less."""

    max_length: int
    capacity: int
    merges: ClassVar[bool] = False
    counts_once: ClassVar[bool] = False
    kind: ClassVar[DataKind] = LABELLED

    @property
    def replies_cut_at(self) -> int:
        return self.max_length

    def count(self, store: TokenStore) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return [rows, 5] `counts(whole(...))` of all prompts at once, and [rows] true where one fits as it is."""
        (lengths, firsts), (parents, _) = map(store.nodes, ("lengths", "parents"))
        number, lengths = len(store), lengths.astype(np.int64)
        rows = np.repeat(np.arange(number), np.diff(firsts))
        is_reply = _are_leaves(np.where(parents < 0, parents, parents + firsts[rows]))
        of_replies = np.bincount(rows, lengths * is_reply, number).astype(np.int64)
        replies = np.bincount(rows, is_reply, number).astype(np.int64)
        prompts = np.bincount(rows, lengths, number).astype(np.int64) - of_replies
        longest = np.zeros(number, np.int64)
        np.maximum.at(longest, rows[is_reply], lengths[is_reply])
        others = _other_rows(store)
        unrelated = lengths[firsts[others + 1] - 1 - others % replies[others]]
        unrelated = np.minimum(unrelated, np.maximum(longest, self.max_length - prompts))
        tokens = prompts + of_replies + unrelated
        alone = replies * (2 * prompts + unrelated) + of_replies
        counted = np.stack([tokens, of_replies + unrelated - replies - 1, replies + 1, replies, alone], axis=1)
        return counted, (prompts + np.maximum(longest, unrelated) <= self.max_length) & (tokens <= self.capacity)

    def whole(self, store: TokenStore, row: int, group: int) -> TokenTree:
        """Return the prompt of a row with its replies, and the unrelated one below them."""
        tree, other = store.tree(row, group), int(_other_rows(store)[row])
        ranks, source = store.ranks(row), store.tree(other, group)
        replies = np.flatnonzero(_are_leaves(tree.parents))
        number = len(source.lengths) - 1 - other % int(_are_leaves(source.parents).sum())  # replies stand last
        tokens = source.tokens[source.starts[number] :][: source.lengths[number]]
        room = max(int(tree.lengths[replies].max()), self.max_length - int(tree.depths[replies[0]]))
        if len(tokens) > room:
            tokens = np.append(tokens[: room - 1], tokens[-1:])
        supervised = np.zeros(len(tree.lengths), np.float32)
        supervised[replies] = 1
        added = {"lengths": len(tokens), "parents": tree.parents[replies[0]], "roles": ASSISTANT, "weights": 1}
        added |= {"groups": group, "messages": -1}
        old = vars(tree) | {"weights": supervised}
        columns = {name: np.append(old[name], value).astype(old[name].dtype) for name, value in added.items()}
        return replace(
            tree,
            tokens=np.append(tree.tokens, tokens),
            **columns,
            pairs=np.stack([replies, np.full(len(replies), len(tree.lengths))], axis=1).astype(np.int32),
            pair_weights=np.where(ranks[replies] == DESIRABLE, 1, -1).astype(np.float32),
            rankings=np.zeros(len(replies), np.int32),
        )

    def cut(self, tree: TokenTree, left_out: Counter[str]) -> list[TokenTree]:
        """Return the prompt in parts that fit context and streams; what is left out is counted.

        Raises:
            ValueError: if a prompt with two of its replies does not fit a stream.
        """
        fitting = fit_replies(tree, self.max_length, left_out)
        return [] if fitting is None else split_by_pairs(fitting, self.capacity)

    def contents(self, tree: TokenTree, part: TokenTree) -> NDArray[np.int32]:
        """Return nothing: the number of a part tells it."""
        return np.zeros(0, np.int32)

    def part(self, tree: TokenTree, number: int, contents: NDArray[np.int32]) -> TokenTree:
        return self.cut(tree, Counter())[number]


def _are_leaves(parents: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return true for the nodes that are nobody's parent."""
    found = np.ones(len(parents), bool)
    found[parents[parents >= 0]] = False
    return found


@lru_cache(8)
def _other_rows(store: TokenStore) -> NDArray[np.int64]:
    """Return [rows] the row whose reply is the unrelated one of each: the next in the order of keys, which are digests.

    A prompt may have a row for each of its replies: those are passed over.

    Raises:
        DataError: if all rows are of one prompt.
    """
    prompts = _prompts(store)
    if len(np.unique(prompts)) < 2:
        raise DataError(
            f"{store.source} must hold labelled replies to two prompts or more, as `dpo.loss` = kto compares them with "
            "replies to other prompts, but holds those to one"
        )
    order = np.argsort(store.keys(), kind="stable")
    others, left, ahead = np.empty_like(order), np.arange(len(order)), 1
    while len(left):
        following = order[(left + ahead) % len(order)]
        is_other = prompts[following] != prompts[order[left]]
        others[order[left[is_other]]] = following[is_other]
        left, ahead = left[~is_other], ahead + 1
    return others


def _prompts(store: TokenStore) -> Keys:
    """[rows] digest of the turns of each prompt, which stand before its replies."""
    (digests, firsts), (parents, _) = map(store.nodes, ("digests", "parents"))
    rows = np.repeat(np.arange(len(store)), np.diff(firsts))
    places = (np.arange(len(digests)) - firsts[rows]).astype(np.uint64)
    is_reply = _are_leaves(np.where(parents < 0, parents, parents + firsts[rows]))
    found = np.zeros(len(store), np.uint64)
    np.add.at(found, rows[~is_reply], mixed(digests[~is_reply] + places[~is_reply]))
    return found
