"""Work of a step: trees, made up or of data, as our streams or as the usual way has them, one path after another.

Both ways compute the same steps of the same trees. A micro-batch is known by its step and its number in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from gpt2ft.benchmark.made_up import VOCABULARY, made_up_group, made_up_tree
from gpt2ft.data.chunks import ChunkingRule, ConversationTrees, chunk
from gpt2ft.data.corpus import load_corpora
from gpt2ft.data.packing import build_pairs, build_stream, number_replies, pack
from gpt2ft.data.pairs import PreferencePairs
from gpt2ft.data.plan import Plan
from gpt2ft.data.token_tree import TokenTree, counts, split
from gpt2ft.random import generator
from gpt2ft.settings.measuring import BenchmarkSettings
from gpt2ft.settings.training import DataSettings
from gpt2ft.stream import TokenStream
from gpt2ft.text.tokenizer import ChatTokenizer
from gpt2ft.training.prefetch import BatchSource

CONTEXT = 1024


class Work(BatchSource, Protocol):
    """Training data as the loop sees them, and the trees that they were made of."""

    def trees(self, step: int, number: int) -> list[TokenTree]:
        """Return the trees of a micro-batch."""


def make_work(settings: BenchmarkSettings, num_processes: int) -> Work:
    """Return the work of all processes: `micro_batches` streams a step for each of them.

    Raises:
        DataError, SettingsError: if `data` cannot be read.
    """
    micro_batches = settings.micro_batches * num_processes
    if not settings.data:
        return MadeUp(settings, micro_batches)
    data = DataSettings(train=settings.data, max_length=CONTEXT)
    tokens = settings.tokens_per_micro_batch
    rule: ChunkingRule = ConversationTrees("once", CONTEXT, tokens)
    if settings.compares:
        rule = PreferencePairs("all", "pair", CONTEXT, tokens)
    corpus, _ = load_corpora(data, ChatTokenizer.gpt2(), settings.seed, rule.kind)
    plan = Planned(chunk(corpus.stores, corpus.rows, rule), tokens, micro_batches, settings.seed)
    plan.reference[:] = -np.log(VOCABULARY)  # only its time is measured
    return plan


class Planned(Plan):
    """The plan of a run, which also gives its trees away."""

    def trees(self, step: int, number: int) -> list[TokenTree]:
        return [self.chunks.tree(chunk) for chunk in self.micro_batches(step)[number]]


class MadeUp:
    """Streams of random tokens, full, over and over."""

    def __init__(self, settings: BenchmarkSettings, micro_batches_per_step: int) -> None:
        self.micro_batches_per_step = micro_batches_per_step
        self.capacity = settings.tokens_per_micro_batch
        self.compares = settings.compares
        random = generator(settings.seed, "conversations")
        trees: list[TokenTree] = []
        while sum(len(tree.tokens) for tree in trees) < 3 * micro_batches_per_step * self.capacity:
            trees += [made_up_group(random)] if self.compares else split(made_up_tree(random), self.capacity)
        sizes = np.array([len(tree.tokens) for tree in trees])
        bins = sorted(pack(sizes, self.capacity, random), key=lambda bin: -sizes[bin].sum())[:-1]
        self.bins = [[trees[i] for i in bin] for bin in bins]
        of_bins = [np.sum([counts(tree) for tree in bin], axis=0) for bin in self.bins]
        _, self.targets, self.replies, self.pairs, _ = np.max(of_bins, axis=0).tolist()

    def ends_epoch(self, step: int) -> bool:
        return False

    def position(self, steps: int) -> dict[str, float | str]:
        return {}

    def trees(self, step: int, number: int) -> list[TokenTree]:
        return self.bins[(step * self.micro_batches_per_step + number) % len(self.bins)]

    def training_stream(self, step: int, number: int) -> TokenStream:
        trees = self.trees(step, number)
        if not self.compares:
            return build_stream(trees, self.capacity, self.targets)
        trees = number_replies(trees)
        lengths = np.concatenate([tree.lengths[tree.weights > 0] - 1 for tree in trees])
        pairs = build_pairs(trees, -np.log(VOCABULARY) * lengths, self.pairs, self.replies)
        return replace(build_stream(trees, self.capacity, self.targets), pairs=pairs)


# --- one path after another -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Path:
    """A conversation from its root to one node: ids, and true for those that are targets."""

    ids: list[int]
    is_target: list[bool]


def path_to(tree: TokenTree, node: int) -> Path:
    """Return the path to a node. The first token of a supervised node ends its prompt, and is no target."""
    ids: list[int] = []
    is_target: list[bool] = []
    for passed in tree.path_to(node):
        start, length = int(tree.starts[passed]), int(tree.lengths[passed])
        ids += tree.tokens[start : start + length].tolist()
        is_target += [False] + [bool(tree.weights[passed] > 0)] * (length - 1)
    return Path(ids, is_target)


def conversations(trees: Sequence[TokenTree]) -> Iterator[Path]:
    """Yield every path from root to leaf that ends in something to learn."""
    for tree in trees:
        is_leaf = np.ones(len(tree.parents), bool)
        is_leaf[tree.parents[1:]] = False
        for leaf in np.flatnonzero(is_leaf & (tree.weights > 0)).tolist():
            yield path_to(tree, leaf)


def compared(trees: Sequence[TokenTree]) -> Iterator[tuple[Path, Path]]:
    """Yield (chosen, rejected) of every pair, each with its prompt."""
    for tree in trees:
        for chosen, rejected in tree.pairs.tolist():
            yield path_to(tree, chosen), path_to(tree, rejected)


@dataclass(frozen=True)
class Amounts:
    """Amounts that were computed, in the units of either way.

    Attributes:
        tokens: of streams, context that is repeated included.
        path_tokens: of all paths from root to leaf, of preferences of both replies of each pair with their prompts.
        supervised_tokens: targets, each counted once.
        visible: pairs of a token and one that it sees, the size of attention.
    """

    tokens: int = 0
    path_tokens: int = 0
    supervised_tokens: int = 0
    pairs: int = 0
    visible: int = 0

    def __add__(self, other: "Amounts") -> "Amounts":
        return Amounts(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))


def _values(amounts: Amounts) -> list[int]:
    return list(vars(amounts).values())


def amounts_of(work: Work, step: int) -> Amounts:
    """Count a step."""
    total = Amounts()
    for number in range(work.micro_batches_per_step):
        trees = work.trees(step, number)
        paths = [path for pair in compared(trees) for path in pair] or list(conversations(trees))
        for tree in trees:
            ends = tree.depths + tree.lengths
            visible = int((ends * (ends + 1) - tree.depths * (tree.depths + 1)).sum()) // 2
            total += Amounts(len(tree.tokens), 0, tree.num_supervised, len(tree.pairs), visible)
        total += Amounts(path_tokens=sum(len(path.ids) for path in paths))
    return total
