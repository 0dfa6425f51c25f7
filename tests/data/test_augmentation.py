"""What training may do to trees, and what it never does."""

from dataclasses import replace

import numpy as np
import pytest

from gpt2ft.conversation import ROLES
from gpt2ft.data.augmentation import Augmentation, augment

USER = ROLES.index("user")


@pytest.fixture
def trees(make_tree):
    """Two, without a token in common."""
    one = make_tree(("user", 12, -1), ("assistant", 9, 0), ("user", 2, 1), ("assistant", 5, 2))
    other = make_tree(("system", 6, -1), ("user", 30, 0), ("assistant", 4, 1))
    return [one, replace(other, tokens=other.tokens + 100_000)]


def test_noise_falls_on_the_content_of_user_turns_alone(trees):
    random = np.random.default_rng(0)
    changed = np.zeros(0)
    for _ in range(50):
        noisy, first_positions = augment(trees, Augmentation(prompt_noise=1.0), random)
        assert first_positions == [0, 0]
        for tree, other in zip(trees, noisy, strict=True):
            content = np.repeat(tree.roles == USER, tree.lengths)
            content[tree.starts] = content[tree.starts + tree.lengths - 1] = False
            assert (tree.tokens == other.tokens)[~content].all()
            changed = np.append(changed, (tree.tokens != other.tokens)[content])
    assert 0.35 < changed.mean() < 0.55  # half of them; now and then a token is replaced by itself


def test_the_new_tokens_are_content_of_the_same_stream(trees):
    noisy, _ = augment(trees, Augmentation(prompt_noise=1.0), np.random.default_rng(0))
    control = {int(tree.tokens[end]) for tree in trees for end in [*tree.starts, *(tree.starts + tree.lengths - 1)]}
    stream = {token for tree in trees for token in tree.tokens.tolist()}
    replaced = {
        int(new)
        for tree, other in zip(trees, noisy, strict=True)
        for old, new in zip(tree.tokens, other.tokens, strict=True)
        if old != new
    }
    assert len(replaced) > 5
    assert replaced <= stream - control


def test_the_trees_themselves_stay_as_they_are(trees):
    before = [tree.tokens.copy() for tree in trees]
    augment(trees, Augmentation(prompt_noise=0.9, position_jitter=5, max_length=99), np.random.default_rng(0))
    assert all((tree.tokens == tokens).all() for tree, tokens in zip(trees, before, strict=True))


def test_a_tree_never_leaves_the_context(trees):
    """The longest paths are 28 and 40 tokens: 2 places of room for one, none for the other."""
    random = np.random.default_rng(0)
    drawn = [augment(trees, Augmentation(position_jitter=9, max_length=30), random)[1] for _ in range(100)]
    assert {first for first, _ in drawn} == {0, 1, 2}
    assert {second for _, second in drawn} == {0}


def test_without_user_turns_there_is_nothing_to_replace(make_tree):
    tree = make_tree(("user", 2, -1), ("assistant", 3, 0))
    noisy, _ = augment([tree], Augmentation(prompt_noise=0.9), np.random.default_rng(0))
    assert (noisy[0].tokens == tree.tokens).all()
