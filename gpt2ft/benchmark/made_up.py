"""Conversation trees of random tokens, in the proportions of OASST: nothing is downloaded, no tokenizer is needed."""

from dataclasses import replace
from itertools import combinations

import numpy as np

from gpt2ft.data.token_tree import ASSISTANT, TokenTree, is_supervised

VOCABULARY = 50261  # GPT-2's tokens and the chat tokens
USER = ASSISTANT - 1


def made_up_tree(random: np.random.Generator) -> TokenTree:
    """One prompt of about 30 tokens, two or three replies of about 180, most followed up once more."""
    lengths, parents, roles = [int(random.integers(10, 60))], [-1], [USER]
    for _ in range(int(random.integers(2, 4))):
        parents.append(0)
        roles.append(ASSISTANT)
        lengths.append(int(random.integers(40, 320)))
        if random.random() < 0.7:
            parents += [len(lengths) - 1, len(lengths)]
            roles += [USER, ASSISTANT]
            lengths += [int(random.integers(10, 60)), int(random.integers(40, 320))]
    return _of_random_tokens(random, lengths, parents, roles)


def made_up_group(random: np.random.Generator) -> TokenTree:
    """One prompt of about 30 tokens and two or three replies of about 180, all compared."""
    replies = int(random.integers(2, 4))
    lengths = [int(random.integers(10, 60)), *random.integers(40, 320, replies).tolist()]
    tree = _of_random_tokens(random, lengths, [-1] + [0] * replies, [USER] + [ASSISTANT] * replies)
    pairs = np.array(list(combinations(range(1, replies + 1), 2)), np.int32)
    return replace(
        tree, pairs=pairs, pair_weights=np.ones(len(pairs), np.float32), rankings=np.zeros(len(pairs), np.int32)
    )


def _of_random_tokens(
    random: np.random.Generator, lengths: list[int], parents: list[int], roles: list[int]
) -> TokenTree:
    size = len(lengths)
    tokens = random.integers(0, VOCABULARY - 4, sum(lengths))
    tokens[np.cumsum(lengths) - lengths] = VOCABULARY - 4 + np.array(roles)  # the same role token before all replies
    return TokenTree(
        tokens=tokens,
        lengths=np.array(lengths, np.int32),
        parents=np.array(parents, np.int32),
        roles=np.array(roles, np.int8),
        weights=is_supervised(np.array(roles)).astype(np.float32),
        groups=np.zeros(size, np.int32),
        messages=np.arange(size, dtype=np.int32),
    )
