"""Which replies are compared, and how a store counts them before any of its trees is made."""

from itertools import product

import numpy as np
import pytest
from preference_groups import PLENTY, by_message, tokens_of

from gpt2ft.data.kinds import PREFERENCES
from gpt2ft.data.pairs import PreferencePairs, compared, times_compared
from gpt2ft.data.store import open_store
from gpt2ft.data.token_tree import counts
from gpt2ft.settings.sections import FilterSettings

RULES = ["all", "best_worst", "adjacent"]


@pytest.fixture(params=["random", "quickstart", "oasst"])
def any_store(request, cache):
    if request.param == "random":
        return request.getfixturevalue("random_groups")
    if request.param == "quickstart":
        return open_store("quickstart", FilterSettings(), request.getfixturevalue("tokenizer"), cache, kind=PREFERENCES)
    file = request.getfixturevalue("test_data")("oasst/en_100_tree.jsonl")
    return open_store(str(file), FilterSettings(), request.getfixturevalue("gpt2_tokenizer"), cache, kind=PREFERENCES)


def is_compared(ranks, a, b, rule):
    """What the rules say in words."""
    if not ranks[a] < ranks[b]:
        return False
    if rule == "best_worst":
        return ranks[a] == min(ranks) and ranks[b] == max(ranks)
    return rule == "all" or not any(ranks[a] < other < ranks[b] for other in ranks)


class TestRules:
    def test_by_hand(self):
        assert compared([0, 1, 2], "all") == [(0, 1), (0, 2), (1, 2)]
        assert compared([0, 1, 2], "best_worst") == [(0, 2)]
        assert compared([0, 1, 2], "adjacent") == [(0, 1), (1, 2)]
        assert compared([5, 2, 2, 9], "all") == [(1, 0), (2, 0), (1, 3), (2, 3), (0, 3)]
        assert compared([5, 2, 2, 9], "best_worst") == [(1, 3), (2, 3)]
        assert compared([5, 2, 2, 9], "adjacent") == [(1, 0), (2, 0), (0, 3)]
        assert compared([1, 1], "all") == compared([1, 1], "best_worst") == compared([1], "adjacent") == []

    @pytest.mark.parametrize("rule", RULES)
    def test_any_ranks_as_defined(self, rule):
        random = np.random.default_rng(0)
        differing = 0
        for _ in range(500):
            ranks = random.integers(0, int(random.integers(1, 8)), int(random.integers(1, 9))).tolist()
            pairs = compared(ranks, rule)
            everyone = range(len(ranks))
            assert sorted(pairs) == [(a, b) for a, b in product(everyone, everyone) if is_compared(ranks, a, b, rule)]
            differing += len(pairs) < len(compared(ranks, "all"))
        assert differing > 200 or rule == "all"

    @pytest.mark.parametrize("rule", RULES)
    def test_how_often_each_reply_is_compared(self, rule):
        random = np.random.default_rng(1)
        groups = np.sort(random.integers(0, 200, 1000))
        ranks = random.integers(0, 4, 1000)
        expected = np.zeros(1000, np.int64)
        for group in range(200):
            members = np.flatnonzero(groups == group)
            for pair in compared(ranks[members].tolist(), rule):
                expected[members[list(pair)]] += 1
        assert np.array_equal(times_compared(groups, ranks, rule), expected)
        assert {0, 1, 2, 3} <= set(expected.tolist())


@pytest.mark.parametrize("rule", RULES)
class TestSurvey:
    def test_counts_every_group_as_it_is(self, any_store, rule):
        counted, _ = PreferencePairs(rule, "prompt", PLENTY, PLENTY).count(any_store)
        chunking = PreferencePairs(rule, "prompt", PLENTY, PLENTY)
        assert counted.tolist() == [list(counts(chunking.whole(any_store, row, 0))) for row in range(len(any_store))]
        assert counted[:, 2].max() > 2 or rule == "best_worst"

    @pytest.mark.parametrize(("max_length", "capacity"), [(PLENTY, 256), (100, 256), (60, 90), (512, 1024)])
    def test_knows_which_groups_fit_as_they_are(self, any_store, rule, max_length, capacity):
        chunking = PreferencePairs(rule, "pair", max_length, capacity)
        _, holds = chunking.count(any_store)
        fit = 0
        for row, it_holds in enumerate(holds.tolist()):
            tree = chunking.whole(any_store, row, 0)
            longest = int((tree.depths + tree.lengths).max())
            assert it_holds == (longest <= max_length and len(tree.tokens) <= capacity)
            fit += it_holds
        assert 0 < fit < len(holds) or max_length >= 512 or "oasst" in any_store.source

    def test_whole_groups_hold_the_pairs_of_their_ranks(self, any_store, rule):
        chunking = PreferencePairs(rule, "pair", PLENTY, PLENTY)
        for row in range(0, len(any_store), 5):
            tree, stored, ranks = chunking.whole(any_store, row, 0), any_store.tree(row, 0), any_store.ranks(row)
            leaves = sorted(set(range(len(stored.parents))) - set(stored.parents.tolist()))
            names = stored.messages.tolist()
            of_leaves = ranks[leaves].tolist()
            expected = {
                (names[leaves[a]], names[leaves[b]])
                for a, b in product(range(len(leaves)), repeat=2)
                if is_compared(of_leaves, a, b, rule)
            }
            assert by_message(tree) == dict.fromkeys(expected, 1.0)
            shown = [names.index(message) for message in tree.messages.tolist()]
            assert [tokens_of(tree, node) for node in range(len(shown))] == [tokens_of(stored, i) for i in shown]
            supervised = set(tree.messages[tree.weights > 0].tolist())
            assert supervised == {message for pair in expected for message in pair}
