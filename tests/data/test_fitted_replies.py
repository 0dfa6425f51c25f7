"""A group that is longer than the context loses its oldest turns, and its replies are cut where that is not enough."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from preference_groups import PLENTY, by_message, tokens_of

from gpt2ft.data.pairs import LEAST_REPLY, PreferencePairs, fit_replies


@pytest.fixture(scope="module")
def make_group(make_tree):
    """make_group([("user", 5)], [7, 8], [(0, 1)]): prompt turns, reply lengths, pairs by number of the reply."""

    def make(prompt, replies, pairs):
        nodes = [(role, length, turn - 1) for turn, (role, length) in enumerate(prompt)]
        nodes += [("assistant", length, len(prompt) - 1) for length in replies]
        weights = np.array([0] * len(prompt) + [1] * len(replies), np.float32)
        index = np.array(pairs, np.int32) + len(prompt)
        of_pairs = {"pair_weights": np.ones(len(pairs), np.float32), "rankings": np.zeros(len(pairs), np.int32)}
        return replace(make_tree(*nodes), weights=weights, pairs=index, **of_pairs)

    return make


class TestFitReplies:
    TURNS = [("user", 10), ("assistant", 12), ("user", 14)]

    def fitted(self, group, limit):
        left_out = Counter()
        return fit_replies(group, limit, left_out), dict(+left_out)

    def test_what_fits_stays_as_it_is(self, make_group):
        group = make_group(self.TURNS, [20, 5], [(0, 1)])
        assert self.fitted(group, 56) == (group, {})

    @pytest.mark.parametrize(
        ("system", "limit", "kept"), [(False, 55, [2]), (False, 34, [2]), (True, 58, [0, 3]), (True, 37, [0, 3])]
    )
    def test_the_oldest_whole_turns_give_way(self, make_group, system, limit, kept):
        turns = [("system", 3), *self.TURNS] if system else self.TURNS
        group = make_group(turns, [20, 5, 17], [(0, 1), (2, 1)])
        tree, left_out = self.fitted(group, limit)
        replies = [len(turns) + i for i in range(3)]
        assert tree.messages.tolist() == kept + replies
        assert tree.parents.tolist() == [-1, *range(len(kept) - 1), *[len(kept) - 1] * 3]
        assert [tokens_of(tree, node) for node in range(len(kept) + 3)] == [tokens_of(group, i) for i in kept + replies]
        assert by_message(tree) == by_message(group)
        assert tree.weights.tolist() == [0] * len(kept) + [1, 1, 1]
        assert not left_out

    def test_the_longest_reply_decides_for_all(self, make_group):
        """A group has one prompt."""
        longer = self.fitted(make_group(self.TURNS, [20, 5], [(0, 1)]), 40)[0]
        assert longer.messages.tolist() == [2, 3, 4]
        assert self.fitted(make_group(self.TURNS, [4, 4], [(0, 1)]), 40)[0].messages.tolist() == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("system", [False, True])
    def test_what_is_longer_than_the_room_is_cut_at_its_end(self, make_group, system):
        turns = [("system", 3), *self.TURNS] if system else self.TURNS
        group = make_group(turns, [40, 60, 10, 18], [(0, 1), (2, 3), (1, 2)])
        room = 18
        tree, left_out = self.fitted(group, 14 + room + 3 * system)
        assert tree.lengths.tolist() == [3] * system + [14, 18, 18, 10, 18]
        assert by_message(tree) == by_message(group)
        for node, message in enumerate(tree.messages.tolist()):
            assert tokens_of(tree, node) == tokens_of(group, message)[: tree.lengths[node]]
        assert not left_out

    def test_the_least_room(self, make_group):
        group = make_group(self.TURNS, [40, 60], [(0, 1)])
        tree, _ = self.fitted(group, 14 + LEAST_REPLY)
        assert tree.lengths.tolist() == [14, LEAST_REPLY, LEAST_REPLY]
        assert self.fitted(group, 14 + LEAST_REPLY - 1) == (None, {"prompts that leave no room for a reply": 1})

    def test_short_replies_need_less(self, make_group):
        group = make_group(self.TURNS, [5, 6], [(0, 1)])
        assert self.fitted(group, 20)[0].lengths.tolist() == [14, 5, 6]

    def test_replies_that_are_alike_once_cut_are_not_compared(self, make_group):
        group = make_group([("user", 4)], [30, 40, 35], [(0, 1), (0, 2), (1, 2)])
        tokens = group.tokens.copy()
        first, second = (slice(group.starts[node], group.starts[node] + 20) for node in (1, 2))
        tokens[second] = tokens[first]
        group = replace(group, tokens=tokens)
        alike = {"pairs whose replies are alike once cut": 1}
        tree, left_out = self.fitted(group, 24)
        assert (by_message(tree).keys(), left_out) == ({(1, 3), (2, 3)}, alike)
        assert self.fitted(group, 25)[1] == {}
        assert len(self.fitted(group, 25)[0].pairs) == 3
        only = replace(group, pairs=group.pairs[:1], pair_weights=group.pair_weights[:1])
        assert self.fitted(only, 24) == (None, alike)

    @pytest.mark.parametrize("limit", [24, 40, 64, 100])
    def test_any_group(self, random_groups, tokenizer, limit):
        """Within the limit stands a system turn, the latest turns from a user's on, and replies as they are or cut."""
        met = Counter()
        for row in range(len(random_groups)):
            whole = PreferencePairs("all", "pair", limit, PLENTY).whole(random_groups, row, 0)
            tree, left_out = self.fitted(whole, limit)
            if tree is None:
                assert left_out in (
                    {"prompts that leave no room for a reply": 1},
                    {"pairs whose replies are alike once cut": len(whole.pairs)},
                )
                met[next(iter(left_out))] += 1
                continue
            ends = tree.depths + tree.lengths
            assert ends.max() <= limit
            prompt = [node for node in range(len(tree.parents)) if not tree.weights[node]]
            kept, there = tree.messages[prompt].tolist(), whole.messages[whole.weights == 0].tolist()
            has_system = bool(whole.roles[0] == 0)
            turns = kept[1:] if has_system else kept
            assert kept[:1] == there[:1] or not has_system
            assert turns == there[len(there) - len(turns) :]
            assert tree.roles[prompt[int(has_system)]] == 1  # a user's
            is_cut = False
            for node in np.flatnonzero(tree.weights > 0).tolist():
                original = tokens_of(whole, whole.messages.tolist().index(tree.messages[node]))
                reply = tokens_of(tree, node)
                assert reply == original[: len(reply)]
                assert (reply[-1] == tokenizer.end_id) == (len(reply) == len(original))
                assert len(reply) == len(original) or ends[node] == limit
                is_cut |= len(reply) < len(original)
            assert not is_cut or turns == there[-1:]
            lost = left_out.get("pairs whose replies are alike once cut", 0)
            assert len(tree.pairs) == len(whole.pairs) - lost
            met["cut"] += is_cut
            met["whole"] += tree is whole
            met["turns"] += len(kept) < len(there) and not is_cut
        assert (met["cut"] > 10) == (limit < 100)
        assert met["whole"] > 10 or limit <= 40
        assert met["turns"] > 5 or limit == 24
        assert (met["prompts that leave no room for a reply"] > 10) == (limit < 64)
