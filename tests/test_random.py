"""Seeds of (seed, purpose, numbers): fixed for ever, and apart from each other."""

import itertools

from processes import run

from gpt2ft.random import generator, seed_for


def test_seeds_are_fixed():
    """Another value would change every run that is to be repeated or resumed."""
    assert seed_for(0, "dropout", 3, 1) == 8135506532528200185
    assert seed_for(1234, "order") == 8770422509880267576


def test_every_seed_purpose_and_number_has_its_own():
    keys = [(seed, purpose, *numbers) for seed in range(3) for purpose in ("order", "packing", "dropout", "1")
            for length in range(3) for numbers in itertools.product((0, 1, 11), repeat=length)]  # fmt: skip
    seeds = {seed_for(*key) for key in keys}
    assert len(seeds) == len(keys) == 156
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**61


def test_generators_of_the_same_key_draw_the_same():
    drawn = [generator(7, "order", 2).permutation(50).tolist() for _ in range(2)]
    assert drawn[0] == drawn[1] != generator(7, "order", 3).permutation(50).tolist()


def test_another_process_has_the_same_seeds():
    """Python's own hash of strings differs between processes."""
    script = "from gpt2ft.random import seed_for; print(seed_for(5, 'weights', 1))"
    assert int(run(["python", "-c", script]).stdout) == seed_for(5, "weights", 1)
