"""What stands in a group of preferences: its tokens by node, and its pairs by message."""

import numpy as np

PLENTY = 1 << 20


def rows_of(store):
    return np.array([(0, row) for row in range(len(store))])


def tokens_of(tree, node):
    return tree.tokens[tree.starts[node] : tree.starts[node] + tree.lengths[node]].tolist()


def by_message(tree):
    """{(chosen, rejected) as messages: weight of the pair}."""
    pairs = [tuple(pair) for pair in tree.messages[tree.pairs].tolist()]
    assert len(set(pairs)) == len(pairs)
    return dict(zip(pairs, tree.pair_weights.tolist(), strict=True))
