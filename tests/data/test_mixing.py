"""Which trees a corpus takes depends on their keys and the seed, on nothing else."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2ft.data.mixing import LEAST_TO_HOLD_OUT, first_of_each, is_held_out, is_held_out_by_itself, is_within, sampled
from gpt2ft.random import seed_for

KEYS = np.random.default_rng(0).integers(0, 2**64, 10_001, dtype=np.uint64)
WEIGHTS = [0.001, 0.3, 0.5, 0.75, 1, 1.2, 1.5, 2, 2.5, 7]


def times(keys, weight, seed=0):
    """{key: how often it is taken}"""
    return Counter(keys[sampled(keys, weight, seed)].tolist())


def test_numbers_are_those_of_splitmix64():
    """Its published outputs for the seed 1234567; each adds the golden ratio to the last state."""
    states = np.uint64(1234567) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, 6, dtype=np.uint64)
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    numbers = np.array(published) / 2.0**64
    keys = states - np.uint64(seed_for(0, "held out"))
    for number in numbers:
        assert is_held_out(keys, number).tolist() == (numbers < number).tolist()
        assert is_held_out(keys, np.nextafter(number, 1)).tolist() == (numbers <= number).tolist()


@pytest.mark.parametrize("number", [LEAST_TO_HOLD_OUT, 20, 40, 10_001])
def test_what_is_held_out_by_itself_is_about_a_twentieth_and_one_conversation_at_least(number):
    keys = KEYS[-number:]
    chosen = is_held_out_by_itself(keys)
    assert chosen.any()
    assert chosen.sum() <= max(1, 0.12 * number)
    assert set(keys[is_held_out(keys, 0.05)]) <= set(keys[chosen])  # the same ones in every file
    order = np.random.default_rng(1).permutation(number)
    assert set(keys[order][is_held_out_by_itself(keys[order])]) == set(keys[chosen])


def test_of_few_conversations_none_is_held_out_by_itself():
    """However many rows they are."""
    assert not is_held_out_by_itself(KEYS[: LEAST_TO_HOLD_OUT - 1].repeat(5)).any()
    assert not is_held_out_by_itself(KEYS[:0]).any()
    twice = KEYS[:LEAST_TO_HOLD_OUT].repeat(2)
    assert set(twice[is_held_out_by_itself(twice)]).isdisjoint(twice[~is_held_out_by_itself(twice)])


def test_a_limit_takes_the_same_conversations_whatever_their_order_with_all_their_rows():
    keys = KEYS[:100].repeat(3)
    some, more = (set(keys[is_within(keys, limit)].tolist()) for limit in (10, 30))
    assert (len(some), len(more)) == (10, 30)
    assert some < more
    assert is_within(keys, 10).sum() == 30
    order = np.random.default_rng(1).permutation(300)
    assert set(keys[order][is_within(keys[order], 10)].tolist()) == some
    assert is_within(keys, 100).all()
    assert is_within(keys, 10**9).all()
    held_out = KEYS[is_held_out(KEYS, 0.05)]  # neither the least nor the greatest of those
    assert 0.3 < np.searchsorted(np.sort(held_out), held_out[is_within(held_out, 100)]).mean() / len(held_out) < 0.7


few_keys = st.lists(st.integers(0, 12), max_size=20).map(lambda keys: np.array(keys, np.uint64))


@given(few_keys, few_keys)
def test_the_first_of_each_is_what_a_loop_finds(keys, seen):
    met, expected = set(seen.tolist()), []
    for key in keys.tolist():
        expected.append(key not in met)
        met.add(key)
    assert first_of_each(keys, seen).tolist() == expected


class TestSampled:
    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.parametrize("number", [1, 2, 10, 999, 10_001])
    def test_exact_to_half_a_tree(self, number, weight):
        chosen = sampled(KEYS[:number], weight, seed=3)
        assert abs(len(chosen) - weight * number) <= 0.5
        counts = np.bincount(chosen, minlength=number)
        assert set(counts.tolist()) <= {int(weight), int(weight) + 1}
        assert (np.diff(chosen) >= 0).all()  # in the order of the data

    def test_a_factor_of_one_takes_all_in_order(self):
        assert sampled(KEYS, 1.0, 0).tolist() == list(range(len(KEYS)))

    def test_the_seed_alone_decides(self):
        assert times(KEYS, 0.5) == times(KEYS, 0.5)
        both = times(KEYS, 0.5, seed=0) & times(KEYS, 0.5, seed=1)
        assert 0.45 < both.total() / (len(KEYS) / 2) < 0.55

    def test_the_trees_of_a_smaller_factor_are_among_those_of_a_larger(self):
        for smaller, larger in pairwise(WEIGHTS):
            assert times(KEYS, smaller) < times(KEYS, larger)

    def test_the_order_of_the_data_changes_nothing(self):
        for weight in (0.5, 1.5):
            assert times(np.random.default_rng(1).permutation(KEYS), weight) == times(KEYS, weight)

    def test_nothing_to_sample(self):
        assert sampled(KEYS[:0], 1.5, 0).tolist() == []


class TestHeldOut:
    def test_about_the_fraction(self):
        assert abs(is_held_out(KEYS, 0.2).mean() - 0.2) < 0.02
        assert not is_held_out(KEYS, 0.0).any()

    def test_a_key_is_held_out_wherever_it_stands(self):
        """In later versions too: a model must not be tested on what an older one was trained on."""
        assert np.array_equal(is_held_out(KEYS[::-7], 0.3), is_held_out(KEYS, 0.3)[::-7])
        assert np.flatnonzero(is_held_out(KEYS[:20], 0.3)).tolist() == [0, 1, 4, 6, 7, 11, 12, 13, 15, 16, 19]

    def test_a_larger_fraction_holds_out_more_and_the_same(self):
        held_out = [is_held_out(KEYS, fraction) for fraction in (0.1, 0.2, 0.5, 0.9)]
        for smaller, larger in pairwise(held_out):
            assert (smaller <= larger).all()
            assert smaller.sum() < larger.sum()

    def test_sampling_takes_as_much_of_either_side(self):
        chosen = np.zeros(len(KEYS), bool)
        chosen[sampled(KEYS, 0.5, seed=0)] = True
        assert abs(chosen[is_held_out(KEYS, 0.2)].mean() - 0.5) < 0.03
