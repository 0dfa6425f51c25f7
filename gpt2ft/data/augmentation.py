"""Changes to trees in training, so that a model learns less by heart. Off unless asked for.

A model that starts from random weights and has little to read ties a reply to the exact words of its prompt
and to where it stands in the context. Pretrained models have seen too much for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpt2ft.conversation import ROLES
from gpt2ft.data.token_tree import TokenTree

USER = ROLES.index("user")


@dataclass(frozen=True)
class Augmentation:
    """Amounts of each change.

    `position_jitter`: a tree starts at a position from 0 to this, as far as its longest path leaves room below
    `max_length`. `prompt_noise`: content tokens of user turns are replaced, of each tree a share drawn between 0
    and this (after the word dropout of Bowman et al. 2016, "Generating Sentences from a Continuous Space").
    """

    position_jitter: int = 0
    prompt_noise: float = 0.0
    max_length: int = 0


def augment(
    trees: Sequence[TokenTree], augmentation: Augmentation, random: np.random.Generator
) -> tuple[list[TokenTree], list[int]]:
    """Return the trees with noise in their user turns, and the position of each tree's first token."""
    room = (augmentation.max_length - int((tree.depths + tree.lengths).max()) for tree in trees)
    first_positions = [int(random.integers(min(augmentation.position_jitter, max(0, free)) + 1)) for free in room]
    return _with_noise(trees, augmentation.prompt_noise, random), first_positions


def _with_noise(trees: Sequence[TokenTree], most: float, random: np.random.Generator) -> list[TokenTree]:
    """Replace content tokens of user turns by content tokens from anywhere in the stream.

    Role tokens, end tokens and whatever is supervised stay as they are.
    """
    if not most:
        return list(trees)
    pool = np.concatenate([tree.tokens[_content(tree)] for tree in trees])
    noisy = []
    for tree in trees:
        user = _content(tree) & np.repeat(tree.roles == USER, tree.lengths)
        chosen = user & (random.random(len(tree.tokens)) < random.uniform(0, most))
        tokens = tree.tokens.copy()
        if chosen.any():
            tokens[chosen] = random.choice(pool, size=int(chosen.sum()))
        noisy.append(replace(tree, tokens=tokens))
    return noisy


def _content(tree: TokenTree) -> NDArray[np.bool_]:
    """Return [n] true for content: neither the first nor the last token of its turn."""
    content = np.ones(len(tree.tokens), bool)
    content[tree.starts] = False
    content[tree.starts + tree.lengths - 1] = False
    return content
