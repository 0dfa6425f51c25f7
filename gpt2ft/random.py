"""Random generators made of (seed, purpose, numbers).

There is no global state, so what is drawn for one purpose does not depend on what was drawn before for another, on the
number of processes, or on where a run resumed.
"""

import hashlib

import numpy as np


def seed_for(seed: int, purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed: the same on every machine and in every process, another for each purpose and number."""
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Return a NumPy generator seeded by `seed_for`."""
    return np.random.default_rng(seed_for(seed, purpose, *numbers))
