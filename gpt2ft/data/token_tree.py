"""TokenTree: a conversation tree in tokens, and the changes made to it before it is packed.

    weigh          which nodes are supervised, and how much each counts
    fit_context    re-roots what lies too deep under its most recent turns, cuts what is plain text
    split          cuts a tree that is larger than a stream at its branches

Each returns new trees. Shape letters: n tokens, K nodes, P pairs of nodes.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gpt2ft.conversation import ROLES
from gpt2ft.settings.sections import MessageWeight
from gpt2ft.text.context import kept_turns

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
            tokens=np.concatenate([self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]] for i in nodes]),
            lengths=self.lengths[nodes],
            parents=np.array(parents, np.int32),
            roles=self.roles[nodes],
            weights=weights[nodes],
            groups=self.groups[nodes],
            messages=self.messages[nodes],
        )


def counts(tree: TokenTree) -> Counts:
    """Count tokens, supervised targets, nodes in pairs, pairs, and tokens if each pair were two sequences alone."""
    ends = tree.depths + tree.lengths
    nodes = len(np.unique(tree.pairs))
    return len(tree.tokens), tree.num_supervised, nodes, len(tree.pairs), int(ends[tree.pairs].sum())


def is_supervised(roles: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Return [K] true for the nodes that training supervises: assistant turns and plain texts."""
    return (roles == ASSISTANT) | (roles == TEXT)


def weigh(tree: TokenTree, rule: MessageWeight) -> TokenTree:
    """Supervise every assistant turn and plain text of a tree in which all else leads to one.

    `once` counts each message once. `leaves` counts it as often as there are paths through it, which gives
    the gradient of training on every root-to-leaf path separately.
    """
    weights = is_supervised(tree.roles).astype(np.float32)
    if rule == "leaves":
        weights *= leaves_below(tree)
    return replace(tree, weights=weights)


def leaves_below(tree: TokenTree) -> NDArray[np.int64]:
    """Return [K] the number of leaves in each node's subtree."""
    leaves = np.ones(len(tree.parents), np.int64)
    leaves[tree.parents[1:]] = 0
    for node in range(len(leaves) - 1, 0, -1):
        leaves[tree.parents[node]] += leaves[node]
    return leaves


def fit_context(tree: TokenTree, limit: int) -> tuple[list[TokenTree], int]:
    """Return trees in which no path to a supervised node exceeds `limit` tokens.

    A supervised node that lies too deep is re-rooted: its most recent turns are repeated above it,
    unsupervised. Nodes that keep the same turns share a tree. A plain text is cut instead.

    Returns:
        The trees, and how many messages are dropped as too long (their last exchange alone exceeds `limit`).
    """
    deep = (tree.depths + tree.lengths > limit) & (tree.weights > 0)
    if not deep.any():
        return [tree], 0
    if tree.roles[0] == TEXT:
        return (_cut_text(tree, limit), 0) if limit > 1 else ([], 1)
    members: dict[int, list[int]] = {}  # first turn after the gap -> supervised nodes
    shown: dict[int, set[int]] = {}  # the same -> all nodes of the new tree
    dropped = 0
    for node in np.flatnonzero(deep).tolist():
        path = tree.path_to(node)
        kept = kept_turns([ROLES[tree.roles[i]] for i in path], tree.lengths[path].tolist(), limit)
        if kept is None:
            dropped += 1
            continue
        first = path[next(i for i in kept if ROLES[tree.roles[path[i]]] != "system")]
        members.setdefault(first, []).append(node)
        shown.setdefault(first, set()).update(path[i] for i in kept)
    trees = []
    shallow = np.where(deep, np.float32(0), tree.weights)
    if shallow.any():
        trees.append(tree.select(_with_ancestors(tree, np.flatnonzero(shallow).tolist()), shallow))
    for first, nodes in members.items():
        weights = np.zeros_like(tree.weights)
        weights[nodes] = tree.weights[nodes]
        trees.append(tree.select(sorted(shown[first]), weights))
    return trees, dropped


def _cut_text(tree: TokenTree, limit: int) -> list[TokenTree]:
    """Return chunks of at most `limit` tokens, each opened as the whole is; only the last holds its end."""
    opening, rest = tree.tokens[:1], tree.tokens[1:]
    chunks = []
    for start in range(0, len(rest), limit - 1):
        tokens = np.concatenate([opening, rest[start : start + limit - 1]])
        chunks.append(replace(tree, tokens=tokens, lengths=np.array([len(tokens)], np.int32)))
    return chunks


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


def _with_ancestors(tree: TokenTree, nodes: list[int]) -> list[int]:
    """Return `nodes` and everything above them, ascending."""
    wanted: set[int] = set()
    for node in nodes:
        while node >= 0 and node not in wanted:
            wanted.add(node)
            node = int(tree.parents[node])
    return sorted(wanted)
