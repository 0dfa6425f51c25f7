"""Statistics of the data before anything is trained, for `--dry_run`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2ft.data.corpus import Corpus
from gpt2ft.data.plan import Plan
from gpt2ft.text.display import escape_control_characters
from gpt2ft.text.tokenizer import ChatTokenizer
from gpt2ft.wording import counted

FIGURES_FROM = 30  # column
MOST_EXAMPLES = 5  # of duplicates, and of messages that leak


def data_statistics(corpus: Corpus, held_out: Corpus | None, plan: Plan, tokenizer: ChatTokenizer) -> str:
    """Return lengths, depths, branching, duplicates, and the messages that held-out and training data share."""
    nodes = _nodes_of(corpus)
    lines = ["", f"{'':<{FIGURES_FROM}}{'least':>8}{'median':>8}{'90 %':>8}{'most':>8}"]
    for name, values in {
        "tokens per conversation": nodes.sums(nodes.lengths),
        "tokens per message": nodes.lengths,
        "tokens per supervised message": nodes.lengths[nodes.supervised],
        "turns on the longest path": nodes.maxima(nodes.depths() + 1),
        "paths per conversation": nodes.sums(nodes.num_replies() == 0),
        "replies to a message": nodes.num_replies()[nodes.num_replies() > 0],
    }.items():
        if len(values):
            least, middle, high, most = np.percentile(values, (0, 50, 90, 100), method="nearest").astype(int).tolist()
            lines.append(f"{name:<{FIGURES_FROM}}{least:>8,}{middle:>8,}{high:>8,}{most:>8,}")
    cut = int(plan.chunks.sizes[plan.chunks.is_cut].sum())
    lines.append(
        f"{'cut to fit':<{FIGURES_FROM}}{counted(cut, 'token')} of {plan.tokens:,}, {plan.repeated:,} of them repeated"
    )
    lines += _duplicates(nodes, tokenizer)
    if held_out is not None:
        lines += _overlap(nodes, _nodes_of(held_out), tokenizer)
    return "\n".join(lines)


@dataclass(frozen=True)
class _Nodes:
    """All messages of a corpus, one conversation after the other. n messages, c conversations."""

    corpus: Corpus
    lengths: NDArray[np.int64]  # [n] tokens
    supervised: NDArray[np.bool_]  # [n]
    parents: NDArray[np.int64]  # [n] index among all messages, -1 for a root
    digests: NDArray[np.uint64]  # [n] of the text
    firsts: NDArray[np.int64]  # [c] index of each root

    def counts(self) -> NDArray[np.int64]:
        """[c] messages of each conversation."""
        return np.diff([*self.firsts.tolist(), len(self.parents)])

    def sums(self, values: NDArray) -> NDArray[np.int64]:
        """[c] by conversation."""
        return np.add.reduceat(values.astype(np.int64), self.firsts)

    def maxima(self, values: NDArray) -> NDArray[np.int64]:
        return np.maximum.reduceat(values, self.firsts)

    def num_replies(self) -> NDArray[np.int64]:
        """[n]"""
        return np.bincount(self.parents[self.parents >= 0], minlength=len(self.parents))

    def depths(self) -> NDArray[np.int64]:
        """[n] turns above each, level by level."""
        depths = np.zeros(len(self.parents), np.int64)
        left = np.flatnonzero(self.parents >= 0)
        level = 0
        at_level = self.parents < 0
        while len(left):
            level += 1
            below = at_level[self.parents[left]]
            at_level = np.zeros(len(depths), bool)
            at_level[left[below]] = True
            depths[left[below]] = level
            left = left[~below]
        return depths

    def conversation_of(self, message: int) -> int:
        return int(np.searchsorted(self.firsts, message, side="right")) - 1

    def text(self, message: int, tokenizer: ChatTokenizer) -> str:
        conversation = self.conversation_of(message)
        store, row = self.corpus.rows[conversation].tolist()
        tree = self.corpus.stores[store].tree(row, group=0)
        node = message - int(self.firsts[conversation])
        start = int(tree.starts[node])
        return tokenizer.decode(tree.tokens[start + 1 : start + tree.lengths[node] - 1].tolist())

    def place(self, message: int) -> str:
        store, row = self.corpus.rows[self.conversation_of(message)].tolist()
        return f"{self.corpus.stores[store].source} {self.corpus.stores[store].id(row)}"


def _nodes_of(corpus: Corpus) -> _Nodes:
    columns: dict[str, Any] = {name: [] for name in ("lengths", "weights", "parents", "digests", "firsts", "rows")}
    total = 0
    for number, store in enumerate(corpus.stores):
        rows = np.unique(corpus.rows[corpus.rows[:, 0] == number, 1])
        _, starts = store.nodes("lengths")
        counts = np.diff(starts)[rows]
        firsts = np.cumsum(counts) - counts
        index = np.repeat(starts[rows] - firsts, counts) + np.arange(counts.sum())
        for name in ("lengths", "weights", "digests"):
            columns[name].append(store.nodes(name)[0][index])
        parents = store.nodes("parents")[0][index].astype(np.int64)
        columns["parents"].append(np.where(parents < 0, -1, parents + np.repeat(firsts, counts) + total))
        columns["firsts"].append(firsts + total)
        columns["rows"].append(np.stack([np.full(len(rows), number), rows], axis=1))
        total += int(counts.sum())
    columns = {name: np.concatenate(parts) for name, parts in columns.items()}
    columns["supervised"] = columns.pop("weights") > 0
    return _Nodes(replace(corpus, rows=columns.pop("rows")), **columns)


def _duplicates(nodes: _Nodes, tokenizer: ChatTokenizer) -> Iterator[str]:
    """Conversations and replies that are word for word the same; copies that a mixing weight makes are not counted."""
    own_place = np.arange(len(nodes.parents)) - np.repeat(nodes.firsts, nodes.counts())
    own_parent = np.where(nodes.parents < 0, -1, nodes.parents - np.repeat(nodes.firsts, nodes.counts()))
    mixed = nodes.digests * (2 * own_place + 1).astype(np.uint64) + (own_parent + 2).astype(np.uint64)
    conversations = np.add.reduceat(mixed, nodes.firsts)
    supervised = np.flatnonzero(nodes.supervised)
    _, firsts, times = np.unique(nodes.digests[supervised], return_index=True, return_counts=True)
    whole = counted(len(conversations) - len(np.unique(conversations)), "conversation")
    messages = counted(len(supervised) - len(firsts), "supervised message")
    yield f"{'duplicates':<{FIGURES_FROM}}{whole} and {messages} are word for word as another"
    for number in np.argsort(-times, kind="stable")[:MOST_EXAMPLES].tolist():
        if times[number] > 1:
            yield f"  {times[number]:,} times {_quoted(nodes.text(int(supervised[firsts[number]]), tokenizer))}"


def _overlap(train: _Nodes, held_out: _Nodes, tokenizer: ChatTokenizer) -> Iterator[str]:
    """Messages that are held out, and yet occur in training in other conversations."""
    groups = {"first turn": _is_first, "supervised message": lambda nodes: nodes.supervised}
    for name, choose in groups.items():
        there, here = np.flatnonzero(choose(train)), np.flatnonzero(choose(held_out))
        leaking = here[np.isin(held_out.digests[here], train.digests[there])]
        of_all = f"{len(leaking):,} of {counted(len(here), f'held-out {name}')}"
        yield f"{'overlap':<{FIGURES_FROM}}{of_all} also in training"
        for message in leaking[:MOST_EXAMPLES].tolist():
            same = int(there[train.digests[there] == held_out.digests[message]][0])
            places = f"{held_out.place(message)} and {train.place(same)}"
            yield f"  {_quoted(held_out.text(message, tokenizer))} in {places}"
        if len(leaking) > MOST_EXAMPLES:
            yield f"  and {len(leaking) - MOST_EXAMPLES:,} more"


def _is_first(nodes: _Nodes) -> NDArray[np.bool_]:
    first = np.zeros(len(nodes.parents), bool)
    first[nodes.firsts] = True
    return first & ~nodes.supervised


def _quoted(text: str) -> str:
    line = escape_control_characters(" ".join(text.split()))
    return f'"{line if len(line) <= 80 else line[:77] + "..."}"'
