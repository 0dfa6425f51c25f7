"""Randomness comes from generators made of (seed, purpose, numbers), never from a global state."""

import hashlib

import numpy as np


def seed_for(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed that is the same on every machine and in every process."""
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng(seed_for(seed, purpose, *numbers))
