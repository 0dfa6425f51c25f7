"""The choice of trees that make up a corpus: each once, some held out, some left out, some taken twice.

Everything is decided by the key of a tree (TokenStore.keys), so it does not depend on the order of the data.
"""

import numpy as np
from numpy.typing import NDArray

from gpt2ft.random import seed_for

Keys = NDArray[np.uint64]

LEAST_TO_HOLD_OUT = 10  # conversations: of fewer, none is held out by itself


def first_of_each(keys: Keys, seen: Keys) -> NDArray[np.bool_]:
    """Return true for the trees that are met here for the first time, and are not in `seen`."""
    is_first = np.zeros(len(keys), bool)
    is_first[np.unique(keys, return_index=True)[1]] = True
    return is_first & ~np.isin(keys, seen)


def is_held_out(keys: Keys, fraction: float) -> NDArray[np.bool_]:
    """Return true for the trees to hold out, the same answer for a tree in every run and every file."""
    return _numbers(keys, seed_for(0, "held out")) < fraction


def is_held_out_by_itself(keys: Keys) -> NDArray[np.bool_]:
    """Return true for the trees to hold out where no share is given: about a twentieth, one conversation at least.

    Few conversations are all needed for training, and none is held out.
    """
    if len(np.unique(keys)) < LEAST_TO_HOLD_OUT:
        return np.zeros(len(keys), bool)
    numbers = _numbers(keys, seed_for(0, "held out"))
    return numbers < max(0.05, np.nextafter(numbers.min(), 1))


def is_within(keys: Keys, limit: int) -> NDArray[np.bool_]:
    """Return true for the trees of `limit` conversations, the same in every run; a larger limit adds to them.

    Args:
        keys: of the conversation that each tree is of; several may be of one.
    """
    conversations = np.unique(keys)
    order = np.argsort(_numbers(conversations, seed_for(0, "limit of held-out data")), kind="stable")
    return np.isin(keys, conversations[order[:limit]])


def sampled(keys: Keys, weight: float, seed: int) -> NDArray[np.int64]:
    """Return indices of the trees, in their order: of each as many as the mixing weight is in whole, of some one more.

    Their share is exact to half a tree. With the same seed, the trees of a smaller weight are among those of a larger.
    """
    whole, share = divmod(weight, 1)
    times = np.full(len(keys), int(whole), np.int64)
    chosen = np.argsort(_numbers(keys, seed_for(seed, "sampling of a source")), kind="stable")
    times[chosen[: round(share * len(keys))]] += 1
    return np.repeat(np.arange(len(keys)), times)


def _numbers(keys: Keys, seed: int) -> NDArray[np.float64]:
    """Return a number from 0 to 1 for each key."""
    return mixed(keys + np.uint64(seed)) / 2.0**64


def mixed(keys: Keys) -> Keys:
    """Return keys each of whose bits depends on all bits of the old one (SplitMix64, Steele et al. 2014)."""
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(multiplier)
    return keys ^ (keys >> np.uint64(31))
