"""What training may do to trees so that a model learns less by heart. Off unless asked for.

A model that starts from random weights and has little to read ties a reply to the exact words of its prompt
and to where it stands in the context. Pretrained models have seen too much for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gpt2ft.conversation import ROLES
from gpt2ft.data.token_tree import TokenTree

USER = ROLES.index("user")


@dataclass(frozen=True)
class Augmentation:
    """How much of each.

    `position_jitter`: a tree starts at a position from 0 to this, as far as its longest path leaves room below
    `max_length`. `prompt_noise`: each content token of a user turn is replaced with this probability (as in the
    word dropout of Bowman et al. 2016, "Generating Sentences from a Continuous Space").
    """

    position_jitter: int = 0
    prompt_noise: float = 0.0
    max_length: int = 0


def augment(
    trees: Sequence[TokenTree], augmentation: Augmentation, random: np.random.Generator
) -> tuple[list[TokenTree], list[int]]:
    """The trees with noise in their user turns, and the position of each tree's first token."""
    room = (augmentation.max_length - int((tree.depths + tree.lengths).max()) for tree in trees)
    first_positions = [int(random.integers(min(augmentation.position_jitter, max(0, free)) + 1)) for free in room]
    return _with_noise(trees, augmentation.prompt_noise, random), first_positions


def _with_noise(trees: Sequence[TokenTree], share: float, random: np.random.Generator) -> list[TokenTree]:
    """Replaces tokens of user turns by others from the user turns of the same stream.

    Role tokens, end tokens and whatever is supervised stay as they are.
    """
    if not share:
        return list(trees)
    contents = [_user_content(tree) for tree in trees]
    pool = np.concatenate([tree.tokens[content] for tree, content in zip(trees, contents, strict=True)])
    noisy = []
    for tree, content in zip(trees, contents, strict=True):
        chosen = content & (random.random(len(tree.tokens)) < share)
        tokens = tree.tokens.copy()
        if chosen.any():
            tokens[chosen] = random.choice(pool, size=int(chosen.sum()))
        noisy.append(replace(tree, tokens=tokens))
    return noisy


def _user_content(tree: TokenTree) -> np.ndarray:
    """bool [n]: tokens between the first and the last of a user turn."""
    content = np.repeat(tree.roles == USER, tree.lengths)
    content[tree.starts] = False
    content[tree.starts + tree.lengths - 1] = False
    return content
