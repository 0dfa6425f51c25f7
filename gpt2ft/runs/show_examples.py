"""Examples as the model will see them, for `--show`.

They are read off a finished stream, so what is shown is what is computed: its tokens, its positions, and the weight of
every target. The tree gives nothing but the places where turns begin.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpt2ft.conversation import ROLES
from gpt2ft.data.kinds import LABELLED
from gpt2ft.data.plan import Plan
from gpt2ft.data.token_tree import TokenTree
from gpt2ft.stream import TokenStream
from gpt2ft.text.display import escape_control_characters, uses_colour
from gpt2ft.text.tokenizer import ChatTokenizer
from gpt2ft.wording import counted

# What a token looks like by its weight, as the terminal's colours: two shades show where one ends.
_CONTEXT, _FRACTION, _LEARNT = ("2", "2;3"), ("33", "93"), ("32", "92")


def terminal_width() -> int:
    return shutil.get_terminal_size((120, 24)).columns


def show_examples(plan: Plan, tokenizer: ChatTokenizer, number: int, width: int, colour: bool | None = None) -> str:
    """Return the first `number` examples of the first step, and of the next ones if it holds fewer.

    Args:
        width: of the lines, in characters.
        colour: whether to colour tokens; by default where stdout is a terminal. Without colour, what is supervised
            stands between the signs » and «.
    """
    if colour is None:
        colour = uses_colour(sys.stdout)
    texts = []
    for example in _examples(plan, number):
        texts.append("\n".join(_drawn(example, tokenizer, width, colour)))
    if len(texts) < number:
        texts.append(f"there are no more: {counted(len(texts), 'example')} in all")
    legend = "what is supervised is " + ("green, or yellow by a weight below 1" if colour else "between » and «")
    return "\n\n".join(["", *texts, legend, ""])


@dataclass(frozen=True)
class _Example:
    title: str
    tree: TokenTree
    stream: TokenStream
    start: int  # of its tokens in the stream
    weights: NDArray[np.float32]  # [N] what each token counts as a target
    names: dict[int, str]  # of labelled replies and of what stands beside them, by node


def _examples(plan: Plan, number: int) -> Iterator[_Example]:
    left = number
    for place in range(len(plan.streams)):
        step, micro_batch = divmod(place, plan.streams_per_step)
        stream = plan.training_stream(step, micro_batch)
        weights = np.zeros(stream.num_tokens, np.float32)
        scored = slice(stream.num_supervised)
        weights[stream.supervised[scored].numpy() + 1] = stream.weights[scored].numpy()
        start = 0
        for chunk in plan.micro_batches(step)[micro_batch]:
            if not left:
                return
            tree = plan.chunks.tree(chunk)
            store, row = plan.chunks.rows[chunk].tolist()
            source = plan.chunks.stores[store]
            others = len(plan.chunks.together.members_of(chunk)) - 1 if plan.chunks.together else 0
            title = (
                f"example {number - left + 1}: {source.source}, conversation {source.id(row)}"
                f"{f' and {others:,} that begin alike' if others else ''}, "
                f"{counted(len(tree.tokens), 'token')}, {tree.num_supervised:,} supervised; "
                f"step {step + 1}, stream {micro_batch + 1}, from token {start:,}"
            )
            names = _names(tree) if plan.chunks.chunking.kind is LABELLED else {}
            yield _Example(title, tree, stream, start, weights, names)
            start += len(tree.tokens)
            left -= 1


def _drawn(example: _Example, tokenizer: ChatTokenizer, width: int, colour: bool) -> Iterator[str]:
    """Return the tree as lines: for each turn a line about it, and its tokens below."""
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
        replies, name = children.get(node, []), example.names.get(node, ROLES[tree.roles[node]])
        goes_on = len(replies) == 1  # an only reply stands in the same column, so that long talks stay readable
        yield indent + ("└─ " if is_last and not goes_on else "├─ ") + _about(example, name, tokens)
        below = indent + ("   " if is_last and not goes_on else "│  ")
        bar = below + ("│  " if len(replies) > 1 else "   ")
        for line in _wrapped(list(_pieces(example, tokens, tokenizer)), max(40, width - len(bar)), colour):
            yield bar + line
        next_indent = indent if goes_on else below
        waiting += [(reply, next_indent, is_last if goes_on else reply == replies[-1]) for reply in reversed(replies)]


def _names(tree: TokenTree) -> dict[int, str]:
    labels = zip(tree.pairs[:, 0].tolist(), tree.pair_weights.tolist(), strict=True)
    names = {node: "assistant, desirable" if weight > 0 else "assistant, undesirable" for node, weight in labels}
    return names | dict.fromkeys(tree.pairs[:, 1].tolist(), "unrelated, not learnt")


def _about(example: _Example, name: str, tokens: range) -> str:
    positions = example.stream.positions[tokens.start : tokens.stop].tolist()
    weights = {float(weight) for weight in example.weights[tokens.start : tokens.stop] if weight}
    weight = f", weight {' and '.join(f'{w:g}' for w in sorted(weights))}" if weights else ", not supervised"
    return f"{name}: {counted(len(tokens), 'token')}, positions {positions[0]:,} to {positions[-1]:,}{weight}"


Piece = tuple[str, float]  # the text of a token, and what it counts as a target


def _pieces(example: _Example, tokens: range, tokenizer: ChatTokenizer) -> Iterator[Piece]:
    """Return the tokens of a turn as text. Those that share a character are shown as one."""
    held: list[int] = []
    for index in tokens:
        held.append(int(example.stream.tokens[index]))
        text = tokenizer.decode(held)
        if "\ufffd" in text and len(held) < 4 and index + 1 < tokens.stop:  # a character has at most four bytes
            continue
        yield escape_control_characters(text).replace("\t", "\\t"), float(example.weights[index])
        held = []


def _wrapped(pieces: Sequence[Piece], width: int, colour: bool) -> Iterator[str]:
    """Lines of at most `width` characters, broken between tokens and at their line ends."""
    line: list[str] = []
    used, was_supervised = 0, False
    for number, (text, weight) in enumerate(pieces):
        supervised, shades = weight > 0, _LEARNT if weight >= 1 else _FRACTION if weight else _CONTEXT
        for part_number, part in enumerate(text.split("\n")):
            if part_number or (used and used + len(part) > width):
                yield "".join(line)
                line, used = [], 0
            if not colour and supervised != was_supervised:
                line.append("»" if supervised else "«")
                used += 1
                was_supervised = supervised
            line.append(f"\x1b[{shades[number % 2]}m{part}\x1b[0m" if colour and part else part)
            used += len(part)
    if not colour and was_supervised:
        line.append("«")
    yield "".join(line)
