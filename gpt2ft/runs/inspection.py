"""A look at the data before anything is trained: examples as the model will see them, and what they are like.

Examples are read off a finished stream, so what is shown is what is computed: its tokens, its positions, and the
weight of every target. The tree gives nothing but the places where turns begin.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2ft.conversation import ROLES, SUPERVISED_ROLES
from gpt2ft.data.corpus import Corpus
from gpt2ft.data.plan import Plan
from gpt2ft.data.token_tree import TokenTree
from gpt2ft.stream import TokenStream
from gpt2ft.text.display import visible
from gpt2ft.text.tokenizer import ChatTokenizer

LEARNT = [ROLES.index(role) for role in SUPERVISED_ROLES]
MOST_EXAMPLES = 5  # of leaking messages

# What a token looks like: (supervised, every other token) -> the terminal's colour. Two shades show where one ends.
_COLOURS = {(True, 0): "32", (True, 1): "92", (False, 0): "2", (False, 1): "2;3"}


def terminal_width() -> int:
    return shutil.get_terminal_size((120, 24)).columns


def show(plan: Plan, tokenizer: ChatTokenizer, number: int, width: int, colour: bool | None = None) -> str:
    """The first `number` examples of the first step, and of the next ones if it holds fewer.

    Args:
        width: of the lines, in characters.
        colour: whether to colour tokens; by default where stdout is a terminal. Without colour, what is supervised
            stands between the signs » and «.
    """
    if colour is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    texts = []
    for example in _examples(plan, number):
        texts.append("\n".join(_drawn(example, tokenizer, width, colour)))
    if len(texts) < number:
        texts.append(f"there are no more than these {len(texts):,}")
    legend = "what is supervised is " + ("green" if colour else "between » and «")
    return "\n\n".join(["", *texts, legend, ""])


@dataclass(frozen=True)
class _Example:
    title: str
    tree: TokenTree
    stream: TokenStream
    start: int  # of its tokens in the stream
    weights: NDArray[np.float32]  # [N] what each token counts as a target


def _examples(plan: Plan, number: int) -> Iterator[_Example]:
    left = number
    for step in range(plan.steps_per_epoch):
        for micro_batch, pieces in enumerate(plan.micro_batches(step)):
            stream = plan.training_stream(step, micro_batch)
            weights = np.zeros(stream.num_tokens, np.float32)
            scored = slice(stream.num_supervised)
            weights[stream.supervised[scored].numpy() + 1] = stream.weights[scored].numpy()
            start = 0
            for piece in pieces:
                if not left:
                    return
                tree = plan.chunks.tree(piece)
                store, row = plan.chunks.rows[piece].tolist()
                source = plan.chunks.stores[store]
                title = (
                    f"example {number - left + 1}: {source.source}, conversation {source.id(row)}, "
                    f"{len(tree.tokens):,} tokens, {tree.num_supervised:,} supervised; "
                    f"step {step + 1}, stream {micro_batch + 1}, from token {start:,}"
                )
                yield _Example(title, tree, stream, start, weights)
                start += len(tree.tokens)
                left -= 1


def _drawn(example: _Example, tokenizer: ChatTokenizer, width: int, colour: bool) -> Iterator[str]:
    """The tree as lines: for each turn a line about it, and its tokens below."""
    tree = example.tree
    yield example.title
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents.tolist()):
        children.setdefault(parent, []).append(node)
    waiting = [(0, "", True)]
    while waiting:
        node, indent, is_last = waiting.pop()
        first = example.start + int(tree.starts[node])
        tokens = range(first, first + int(tree.lengths[node]))
        replies = children.get(node, [])
        goes_on = len(replies) == 1  # an only reply stands in the same column, so that long talks stay readable
        yield indent + ("└─ " if is_last and not goes_on else "├─ ") + _about(example, ROLES[tree.roles[node]], tokens)
        below = indent + ("   " if is_last and not goes_on else "│  ")
        bar = below + ("│  " if len(replies) > 1 else "   ")
        for line in _wrapped(list(_pieces(example, tokens, tokenizer)), max(40, width - len(bar)), colour):
            yield bar + line
        next_indent = indent if goes_on else below
        waiting += [(reply, next_indent, is_last if goes_on else reply == replies[-1]) for reply in reversed(replies)]


def _about(example: _Example, role: str, tokens: range) -> str:
    positions = example.stream.positions[tokens.start : tokens.stop].tolist()
    weights = {float(weight) for weight in example.weights[tokens.start : tokens.stop] if weight}
    weight = f", weight {' and '.join(f'{w:g}' for w in sorted(weights))}" if weights else ", not supervised"
    return f"{role}: {len(tokens):,} tokens, positions {positions[0]:,} to {positions[-1]:,}{weight}"


Piece = tuple[str, bool]  # the text of a token, whether it is supervised


def _pieces(example: _Example, tokens: range, tokenizer: ChatTokenizer) -> Iterator[Piece]:
    """The tokens of a turn as text. Those that share a character are shown as one."""
    held: list[int] = []
    for index in tokens:
        held.append(int(example.stream.tokens[index]))
        text = tokenizer.decode(held)
        if "\ufffd" in text and len(held) < 4 and index + 1 < tokens.stop:  # a character has at most four bytes
            continue
        yield visible(text).replace("\t", "\\t"), bool(example.weights[index])
        held = []


def _wrapped(pieces: Sequence[Piece], width: int, colour: bool) -> Iterator[str]:
    """Lines of at most `width` characters, broken between tokens and at their line ends."""
    line: list[str] = []
    used, was_supervised = 0, False
    for number, (text, supervised) in enumerate(pieces):
        for part_number, part in enumerate(text.split("\n")):
            if part_number or (used and used + len(part) > width):
                yield "".join(line)
                line, used = [], 0
            if not colour and supervised != was_supervised:
                line.append("»" if supervised else "«")
                used += 1
                was_supervised = supervised
            line.append(f"\x1b[{_COLOURS[supervised, number % 2]}m{part}\x1b[0m" if colour and part else part)
            used += len(part)
    if not colour and was_supervised:
        line.append("«")
    yield "".join(line)


# --- what the data are like -----------------------------------------------------------------------------------------


def statistics(corpus: Corpus, held_out: Corpus | None, plan: Plan, tokenizer: ChatTokenizer) -> str:
    """Lengths, depths, branching, duplicates, and what the held-out data share with the training data."""
    nodes = _nodes_of(corpus)
    lines = ["", f"{'':<26}{'least':>8}{'median':>8}{'90 %':>8}{'most':>8}"]
    for name, values in {
        "tokens per conversation": nodes.sums(nodes.lengths),
        "tokens per message": nodes.lengths,
        "tokens per learnt message": nodes.lengths[np.isin(nodes.roles, LEARNT)],
        "turns on the longest path": nodes.maxima(nodes.depths() + 1),
        "paths per conversation": nodes.sums(nodes.num_replies() == 0),
        "replies to a message": nodes.num_replies()[nodes.num_replies() > 0],
    }.items():
        if len(values):
            least, middle, high, most = np.percentile(values, (0, 50, 90, 100), method="nearest").astype(int).tolist()
            lines.append(f"{name:<26}{least:>8,}{middle:>8,}{high:>8,}{most:>8,}")
    cut = int(plan.chunks.sizes[plan.chunks.is_cut].sum())
    lines.append(
        f"cut to fit                {cut:,} tokens of {plan.tokens:,}, {plan.chunks.repeated:,} of them repeated"
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
    roles: NDArray[np.int8]  # [n]
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
    columns: dict[str, Any] = {name: [] for name in ("lengths", "roles", "parents", "digests", "firsts", "rows")}
    total = 0
    for number, store in enumerate(corpus.stores):
        rows = np.unique(corpus.rows[corpus.rows[:, 0] == number, 1])
        _, starts = store.nodes("lengths")
        counts = np.diff(starts)[rows]
        firsts = np.cumsum(counts) - counts
        index = np.repeat(starts[rows] - firsts, counts) + np.arange(counts.sum())
        for name in ("lengths", "roles", "digests"):
            columns[name].append(store.nodes(name)[0][index])
        parents = store.nodes("parents")[0][index].astype(np.int64)
        columns["parents"].append(np.where(parents < 0, -1, parents + np.repeat(firsts, counts) + total))
        columns["firsts"].append(firsts + total)
        columns["rows"].append(np.stack([np.full(len(rows), number), rows], axis=1))
        total += int(counts.sum())
    columns = {name: np.concatenate(parts) for name, parts in columns.items()}
    return _Nodes(replace(corpus, rows=columns.pop("rows")), **columns)


def _duplicates(nodes: _Nodes, tokenizer: ChatTokenizer) -> Iterator[str]:
    """Conversations and replies that are word for word the same; copies that a factor makes are not counted."""
    own_place = np.arange(len(nodes.parents)) - np.repeat(nodes.firsts, nodes.counts())
    own_parent = np.where(nodes.parents < 0, -1, nodes.parents - np.repeat(nodes.firsts, nodes.counts()))
    mixed = nodes.digests * (2 * own_place + 1).astype(np.uint64) + (own_parent + 2).astype(np.uint64)
    conversations = np.add.reduceat(mixed, nodes.firsts)
    learnt = np.flatnonzero(np.isin(nodes.roles, LEARNT))
    _, firsts, times = np.unique(nodes.digests[learnt], return_index=True, return_counts=True)
    yield (
        f"duplicates                {len(conversations) - len(np.unique(conversations)):,} conversations and "
        f"{len(learnt) - len(firsts):,} learnt messages are word for word as another"
    )
    for number in np.argsort(-times, kind="stable")[:MOST_EXAMPLES].tolist():
        if times[number] > 1:
            yield f"  {times[number]:,} times {_quoted(nodes.text(int(learnt[firsts[number]]), tokenizer))}"


def _overlap(train: _Nodes, held_out: _Nodes, tokenizer: ChatTokenizer) -> Iterator[str]:
    """What is held out, and yet occurs in training in other conversations."""
    groups = {"first turns": _is_first, "learnt messages": lambda nodes: np.isin(nodes.roles, LEARNT)}
    for name, choose in groups.items():
        there, here = np.flatnonzero(choose(train)), np.flatnonzero(choose(held_out))
        leaking = here[np.isin(held_out.digests[here], train.digests[there])]
        yield f"overlap                   {len(leaking):,} of {len(here):,} held-out {name} also occur in training"
        for message in leaking[:MOST_EXAMPLES].tolist():
            same = int(there[train.digests[there] == held_out.digests[message]][0])
            places = f"{held_out.place(message)} and {train.place(same)}"
            yield f"  {_quoted(held_out.text(message, tokenizer))} in {places}"
        if len(leaking) > MOST_EXAMPLES:
            yield f"  and {len(leaking) - MOST_EXAMPLES:,} more"


def _is_first(nodes: _Nodes) -> NDArray[np.bool_]:
    first = np.zeros(len(nodes.parents), bool)
    first[nodes.firsts] = True
    return first & ~np.isin(nodes.roles, LEARNT)


def _quoted(text: str) -> str:
    line = visible(" ".join(text.split()))
    return f'"{line if len(line) <= 80 else line[:77] + "..."}"'
