"""TokenTree: a conversation tree in tokens, and the changes made to it before it is packed.

    weigh          how much each supervised node counts
    fit_context    covers what lies too deep by windows, cuts what is plain text
    split          cuts a tree that is larger than a stream at its branches
    merge          makes one tree of several that begin alike

Each returns new trees. Shape letters: n tokens, K nodes, P pairs of nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gpt2ft.conversation import ROLES
from gpt2ft.settings.training import MessageWeight

ASSISTANT = ROLES.index("assistant")
TEXT = ROLES.index("text")

Counts = tuple[int, int, int, int, int]  # see `counts`


@dataclass(frozen=True)
class TokenTree:
    """A tree in tokens: nodes in depth-first order, each of which opens with its own role token.

    All tokens of a supervised node are targets but the first: its role token is the end of the prompt when a model
    generates.
    """

    tokens: NDArray[np.integer]  # [n]
    lengths: NDArray[np.int32]  # [K] tokens of each node
    parents: NDArray[np.int32]  # [K] index of the parent node, -1 for the root
    roles: NDArray[np.int8]  # [K] index into ROLES
    weights: NDArray[np.float32]  # [K] of each target of the node, 0 where it is not supervised
    groups: NDArray[np.int32]  # [K] number of the source, conversation or reply that the node counts for
    messages: NDArray[np.int32]  # [K] index of each node's message in its whole conversation
    pairs: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 2), np.int32))  # [P, 2] chosen, rejected node
    pair_weights: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))  # [P]
    rankings: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))  # [P] number of a pair's group

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """[K] index of each node's first token."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    @cached_property
    def depths(self) -> NDArray[np.int64]:
        """[K] tokens above each node on its path: the position of its first token."""
        depths = np.zeros(len(self.parents), np.int64)
        for node, parent in enumerate(self.parents[1:].tolist(), start=1):
            depths[node] = depths[parent] + self.lengths[parent]
        return depths

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """[K] exclusive end, in tokens, of the subtree under each node: its horizon."""
        ends = self.starts + self.lengths
        for node in range(len(self.parents) - 1, 0, -1):
            parent = self.parents[node]
            ends[parent] = max(ends[parent], ends[node])
        return ends

    @property
    def num_supervised(self) -> int:
        """Targets of non-zero weight."""
        return int(((self.lengths - 1) * (self.weights > 0)).sum())

    def node_tokens(self, node: int) -> NDArray[np.integer]:
        return self.tokens[self.starts[node] : self.starts[node] + self.lengths[node]]

    def path_to(self, node: int) -> list[int]:
        path = []
        while node >= 0:
            path.append(node)
            node = int(self.parents[node])
        return path[::-1]

    def select(self, nodes: list[int], weights: NDArray[np.float32]) -> "TokenTree":
        """Return the tree of these nodes alone, without pairs, a node's parent being its nearest ancestor among them.

        Args:
            nodes: ascending, with one root.
            weights: [K] of the whole tree.
        """
        new_index = {old: new for new, old in enumerate(nodes)}
        parents = []
        for node in nodes:
            parent = int(self.parents[node])
            while parent >= 0 and parent not in new_index:
                parent = int(self.parents[parent])
            parents.append(new_index.get(parent, -1))
        return TokenTree(
            tokens=np.concatenate([self.node_tokens(node) for node in nodes]),
            lengths=self.lengths[nodes],
            parents=np.array(parents, np.int32),
            roles=self.roles[nodes],
            weights=weights[nodes],
            groups=self.groups[nodes],
            messages=self.messages[nodes],
        )


def counts(tree: TokenTree) -> Counts:
    """Count tokens, supervised targets, nodes in pairs, pairs, and tokens if each pair were two sequences alone."""
    if not len(tree.pairs):
        return len(tree.tokens), tree.num_supervised, 0, 0, 0
    ends = tree.depths + tree.lengths
    nodes = len(np.unique(tree.pairs))
    return len(tree.tokens), tree.num_supervised, nodes, len(tree.pairs), int(ends[tree.pairs].sum())


def is_supervised(roles: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Return [K] true for the nodes that training supervises unless they are masked: replies and plain texts."""
    return (roles == ASSISTANT) | (roles == TEXT)


def weigh(tree: TokenTree, rule: MessageWeight) -> TokenTree:
    """Weigh the supervised nodes of a stored tree, in which all else leads to one.

    `once` counts each message once, by the weight that its data give it. `leaves` counts it as often as there are paths
    through it, which gives the gradient of training on every root-to-leaf path separately.
    """
    return tree if rule == "once" else replace(tree, weights=tree.weights * leaves_below(tree).astype(np.float32))


def leaves_below(tree: TokenTree) -> NDArray[np.int64]:
    """Return [K] the number of leaves in each node's subtree."""
    leaves = np.ones(len(tree.parents), np.int64)
    leaves[tree.parents[1:]] = 0
    for node in range(len(leaves) - 1, 0, -1):
        leaves[tree.parents[node]] += leaves[node]
    return leaves


def fit_context(tree: TokenTree, limit: int) -> tuple[list[TokenTree], int]:
    """Return trees in which no path to a supervised node exceeds `limit` tokens.

    Supervised nodes that lie too deep stand in windows: trees that open with a later user turn, and supervise all below
    it that fits and that no earlier tree supervises. A plain text is cut instead.

    Returns:
        The trees, and how many messages are dropped as too long (their last exchange alone exceeds `limit`).
    """
    deep = (tree.depths + tree.lengths > limit) & (tree.weights > 0)
    if not deep.any():
        return [tree], 0
    if tree.roles[0] == TEXT:
        number_of_parts = -(-(len(tree.tokens) - 1) // (limit - 1)) if limit > 1 else 0
        return [text_part(tree, limit, number) for number in range(number_of_parts)], int(number_of_parts == 0)
    windows = _Windows(tree, limit, deep)
    dropped = 0
    for node in np.flatnonzero(deep).tolist():
        if windows.pending[node]:
            dropped += not windows.open_for(node)
    return windows.trees, dropped


class _Windows:
    """Windows over a tree, each opened by the first supervised node that is in none yet.

    Each opens with the earliest user turn from which it repeats no more tokens than it adds; the last one of a branch
    may repeat more, as far as all of them have added more. So together they are less than twice the whole, of whatever
    length, but for a long system turn that each repeats. Here four turns fit, and the odd ones are replies:

        conversation   0 1 2 3 4 5 6 7 8 9
        windows        0 1 2 3
                           2 3 4 5
                               4 5 6 7
                                   6 7 8 9

    A system turn opens every window. Where it alone takes half of the context, only it is repeated.
    """

    def __init__(self, tree: TokenTree, limit: int, deep: NDArray[np.bool_]) -> None:
        """Begin with the nodes that are not too deep.

        Args:
            deep: [K] true for supervised nodes that exceed `limit` on their own path.
        """
        self.tree = tree
        self.trees: list[TokenTree] = []
        self.pending = tree.weights > 0  # [K] to be supervised
        self.shown = np.zeros(len(deep), bool)  # [K] in a window
        self.added = self.repeated = 0  # tokens
        self.system = [0] if ROLES[tree.roles[0]] == "system" else []
        self.room = limit - int(tree.lengths[self.system].sum())
        self.path_ends = tree.depths + tree.lengths  # [K]
        shallow = np.flatnonzero(self.pending & ~deep).tolist()
        if shallow:
            nodes = _with_ancestors(tree, shallow)
            self._add(nodes, shallow, int(tree.lengths[nodes].sum()), 0)

    def open_for(self, node: int) -> bool:
        """Add a window that supervises a node and what follows it; return False if its last exchange does not fit."""
        starts = []
        turn = node
        while turn >= 0 and self.path_ends[node] - self.tree.depths[turn] <= self.room:
            if ROLES[self.tree.roles[turn]] == "user":
                starts.append(turn)
            turn = int(self.tree.parents[turn])
        for start in reversed(starts):
            below = slice(start, int(np.searchsorted(self.tree.starts, self.tree.ends[start])))
            fits = self.path_ends[below] - self.tree.depths[start] <= self.room
            members = (start + np.flatnonzero(self.pending[below] & fits)).tolist()
            nodes = self.system + _with_ancestors(self.tree, members, start)
            lengths, shown = self.tree.lengths[nodes], self.shown[nodes]
            adds, repeats = int(lengths[~shown].sum()), int(lengths[shown].sum())
            is_last = not (self.pending[below] & ~fits).any()
            if repeats <= adds or (is_last and self.repeated + repeats < self.added + adds):
                break
        self.pending[node] = False
        if starts:
            self._add(nodes, members, adds, repeats)
        return bool(starts)

    def _add(self, nodes: list[int], members: list[int], adds: int, repeats: int) -> None:
        """Add the window of these nodes that supervises `members`; so many tokens of it are in no other, or in one."""
        weights = np.zeros_like(self.tree.weights)
        weights[members] = self.tree.weights[members]
        self.trees.append(self.tree.select(nodes, weights))
        self.added, self.repeated = self.added + adds, self.repeated + repeats
        self.pending[members], self.shown[nodes] = False, True


def text_part(tree: TokenTree, limit: int, number: int) -> TokenTree:
    """Return a part of at most `limit` tokens, opened as the whole text is; only the last holds its end."""
    first = 1 + number * (limit - 1)
    tokens = np.concatenate([tree.tokens[:1], tree.tokens[first : first + limit - 1]])
    return replace(tree, tokens=tokens, lengths=np.array([len(tokens)], np.int32))


def split(tree: TokenTree, capacity: int) -> list[TokenTree]:
    """Cut a tree at its branches into trees of at most `capacity` tokens, the shared path repeated.

    Each message is supervised once, in the first tree that holds it.

    Raises:
        ValueError: if a path is longer than `capacity`.
    """
    if len(tree.tokens) <= capacity:
        return [tree]
    is_leaf = np.ones(len(tree.parents), bool)
    is_leaf[tree.parents[1:]] = False
    parts: list[set[int]] = []
    size = capacity + 1  # of the last part; this opens the first
    for leaf in np.flatnonzero(is_leaf).tolist():
        path = tree.path_to(leaf)
        new = [node for node in path if not parts or node not in parts[-1]]
        extra = int(tree.lengths[new].sum())
        if size + extra > capacity:
            parts.append(set())
            new, size, extra = path, 0, int(tree.lengths[path].sum())
            if extra > capacity:
                raise ValueError(f"a path of {extra} tokens does not fit a stream of {capacity}")
        parts[-1].update(new)
        size += extra
    trees = []
    weights = tree.weights.copy()
    for part in parts:
        nodes = sorted(part)
        trees.append(tree.select(nodes, weights))
        weights[nodes] = 0
    return trees


def merge(trees: Sequence[TokenTree]) -> TokenTree | None:
    """Return a tree that holds what trees share once, and the pairs of all; None if they do not begin alike.

    A node is shared where its tokens and those of all nodes above it are the same. Its weights add up; a reply that is
    compared keeps the weight 1.
    """
    if len(trees) == 1:
        return trees[0]
    known: dict[tuple[int, bytes], int] = {}
    nodes: list[tuple[TokenTree, int]] = []  # where each is met first
    weights: list[float] = []
    below: list[list[int]] = []  # the replies to each
    places: list[list[int]] = []  # of the nodes of each tree, among all
    for tree in trees:
        own: list[int] = []
        for node, parent in enumerate(tree.parents.tolist()):
            above = own[parent] if parent >= 0 else -1
            place = known.setdefault((above, tree.node_tokens(node).tobytes()), len(nodes))
            if place == len(nodes):
                nodes.append((tree, node))
                weights.append(0.0)
                below.append([])
                if above >= 0:
                    below[above].append(place)
            own.append(place)
            weight = float(tree.weights[node])
            weights[place] = max(weights[place], weight) if len(tree.pairs) else weights[place] + weight
        places.append(own)
        if own[0] != 0:
            return None
    order, waiting = [], [0]  # depth first
    while waiting:
        order.append(waiting.pop())
        waiting += below[order[-1]][::-1]
    place_of = np.argsort(order).astype(np.int32)
    parents = np.full(len(order), -1, np.int32)
    for node, replies in enumerate(below):
        parents[place_of[replies]] = place_of[node]

    def column(name: str) -> NDArray:
        return np.array([getattr(tree, name)[node] for tree, node in (nodes[place] for place in order)])

    firsts = np.cumsum([0, *(tree.rankings.max(initial=-1) + 1 for tree in trees)], dtype=np.int32)  # of their rankings
    return TokenTree(
        tokens=np.concatenate([tree.node_tokens(node) for tree, node in (nodes[place] for place in order)]),
        parents=parents,
        weights=np.array(weights, np.float32)[order],
        pairs=np.concatenate([place_of[own][tree.pairs] for own, tree in zip(places, trees, strict=True)]),
        pair_weights=np.concatenate([tree.pair_weights for tree in trees]),
        rankings=np.concatenate([tree.rankings + first for tree, first in zip(trees, firsts[:-1], strict=True)]),
        **{name: column(name) for name in ("lengths", "roles", "groups", "messages")},
    )


def _with_ancestors(tree: TokenTree, nodes: list[int], top: int = 0) -> list[int]:
    """Return `nodes` and everything above them down from `top`, ascending."""
    wanted: set[int] = set()
    for node in nodes:
        while node >= top and node not in wanted:
            wanted.add(node)
            node = int(tree.parents[node])
    return sorted(wanted)
