"""What is done to a token tree: exact nodes on trees drawn by hand, and the rules themselves on random ones."""

import numpy as np
import pytest

from gpt2ft.conversation import ROLES
from gpt2ft.data.token_tree import ASSISTANT, fit_context, is_supervised, leaves_below, split, weigh
from gpt2ft.text.context import kept_turns

# 0 user 3
# |-- 1 assistant 4
# |   |-- 2 user 2
# |   |   |-- 3 assistant 5
# |   |   `-- 4 assistant 2
# |   `-- 5 user 3
# |       `-- 6 assistant 6
# `-- 7 assistant 2
BRANCHES = [
    ("user", 3, -1),
    ("assistant", 4, 0),
    ("user", 2, 1),
    ("assistant", 5, 2),
    ("assistant", 2, 2),
    ("user", 3, 1),
    ("assistant", 6, 5),
    ("assistant", 2, 0),
]


def nodes(tree):
    """(message, message of the parent, weight) of every node, after checking that its tokens came along whole."""
    shown = []
    for node, message in enumerate(tree.messages.tolist()):
        start, length = tree.starts[node], tree.lengths[node]
        assert tree.tokens[start : start + length].tolist() == list(range(message * 1000, message * 1000 + length))
        parent = int(tree.messages[tree.parents[node]]) if tree.parents[node] >= 0 else None
        shown.append((message, parent, float(tree.weights[node])))
    assert len(tree.tokens) == tree.lengths.sum()
    return shown


def path_messages(tree, node):
    return tree.messages[tree.path_to(node)].tolist()


class TestGeometry:
    def test_of_the_drawing(self, make_tree):
        tree = make_tree(*BRANCHES)
        assert tree.starts.tolist() == [0, 3, 7, 9, 14, 16, 19, 25]
        assert tree.depths.tolist() == [0, 3, 7, 9, 9, 7, 10, 3]
        assert tree.ends.tolist() == [27, 25, 16, 14, 16, 25, 25, 27]
        assert tree.path_to(6) == [0, 1, 5, 6]
        assert tree.num_supervised == 14

    def test_selection_skips_to_the_nearest_ancestor(self, make_tree):
        tree = make_tree(*BRANCHES)
        chosen = tree.select([0, 2, 3, 6], np.arange(8, dtype=np.float32))
        assert nodes(chosen) == [(0, None, 0), (2, 0, 2), (3, 2, 3), (6, 0, 6)]
        assert chosen.groups.tolist() == [0] * 4
        assert [ROLES[role] for role in chosen.roles] == ["user", "user", "assistant", "assistant"]


def leading_to_reply(tree):
    """As stores hold trees: without the nodes that lead to no reply; None if nothing is left."""
    useful = {above for node in np.flatnonzero(tree.roles == ASSISTANT).tolist() for above in tree.path_to(node)}
    return tree.select(sorted(useful), tree.weights) if useful else None


def leaf_nodes(tree):
    return sorted(set(range(len(tree.parents))) - set(tree.parents.tolist()))


class TestWeigh:
    def test_of_the_drawing(self, make_tree):
        tree = make_tree(*BRANCHES)
        assert weigh(tree, "once").weights.tolist() == [0, 1, 0, 1, 1, 0, 1, 1]
        assert weigh(tree, "leaves").weights.tolist() == [0, 3, 0, 1, 1, 0, 1, 1]
        assert weigh(tree, "once").num_supervised == 3 + 4 + 1 + 5 + 1  # all but the role token of each reply
        assert tree.weights.tolist() == [0, 1, 0, 1, 1, 0, 1, 1]
        assert leaves_below(tree).tolist() == [4, 3, 2, 1, 1, 1, 1, 1]

    @pytest.mark.parametrize("rule", ["once", "leaves"])
    def test_a_plain_text_is_supervised_but_for_its_opening(self, make_tree, rule):
        tree = weigh(make_tree(("text", 5, -1)), rule)
        assert tree.weights.tolist() == [1]
        assert tree.num_supervised == 4

    def test_what_is_supervised(self):
        assert [ROLES[role] for role in np.arange(4)[is_supervised(np.arange(4))]] == ["assistant", "text"]

    def test_leaves_are_the_enumerated_paths_through_a_node(self, random_tree):
        branched = 0
        for seed in range(100):
            tree = random_tree(np.random.default_rng(seed))
            paths = [tree.path_to(leaf) for leaf in leaf_nodes(tree)]
            expected = [sum(node in path for path in paths) for node in range(len(tree.parents))]
            assert leaves_below(tree).tolist() == expected
            is_reply = tree.roles == ASSISTANT
            assert weigh(tree, "leaves").weights.tolist() == (expected * is_reply).tolist()
            branched += max(expected) > 2
        assert branched > 50


class TestFitContext:
    def test_what_fits_is_left_alone(self, make_tree):
        tree = weigh(make_tree(*BRANCHES), "once")
        assert fit_context(tree, 16) == ([tree], 0)

    def test_a_deep_reply_is_rerooted_under_its_recent_turns(self, make_tree):
        tree = weigh(make_tree(*BRANCHES), "once")
        (shallow, rerooted), dropped = fit_context(tree, 15)
        assert dropped == 0
        assert nodes(shallow) == [(0, None, 0), (1, 0, 1), (2, 1, 0), (3, 2, 1), (4, 2, 1), (7, 0, 1)]
        assert nodes(rerooted) == [(5, None, 0), (6, 5, 1)]

    def test_replies_that_keep_the_same_turns_share_a_tree(self, make_tree):
        tree = weigh(make_tree(*BRANCHES), "leaves")
        (shallow, left, right), dropped = fit_context(tree, 10)
        assert dropped == 0
        assert nodes(shallow) == [(0, None, 0), (1, 0, 3), (7, 0, 1)]
        assert nodes(left) == [(2, None, 0), (3, 2, 1), (4, 2, 1)]
        assert nodes(right) == [(5, None, 0), (6, 5, 1)]

    def test_the_system_turn_is_repeated(self, make_tree):
        turns = [("system", 2, -1), ("user", 5, 0), ("assistant", 5, 1), ("user", 3, 2), ("assistant", 4, 3)]
        tree = weigh(make_tree(*turns), "once")
        (shallow, rerooted), dropped = fit_context(tree, 12)
        assert dropped == 0
        assert nodes(shallow) == [(0, None, 0), (1, 0, 0), (2, 1, 1)]
        assert nodes(rerooted) == [(0, None, 0), (3, 0, 0), (4, 3, 1)]

    def test_an_exchange_that_is_too_long_is_dropped(self, make_tree):
        tree = weigh(make_tree(*BRANCHES), "once")
        (shallow, left), dropped = fit_context(tree, 8)
        assert dropped == 1  # 5 and 6 take 9 tokens
        assert nodes(shallow) == [(0, None, 0), (1, 0, 1), (7, 0, 1)]
        assert nodes(left) == [(2, None, 0), (3, 2, 1), (4, 2, 1)]
        assert fit_context(tree, 3) == ([], 5)

    def test_a_reply_below_one_that_is_too_long_may_still_fit(self, make_tree):
        turns = [("user", 2, -1), ("assistant", 50, 0), ("user", 2, 1), ("assistant", 3, 2)]
        (only,), dropped = fit_context(weigh(make_tree(*turns), "once"), 10)
        assert dropped == 1
        assert nodes(only) == [(2, None, 0), (3, 2, 1)]


class TestWindows:
    """Conversations longer than the context, on one path."""

    def conversation(self, make_tree, lengths, system=0):
        turns = [("system", system, -1)] if system else []
        for length in lengths:
            turns.append((("user", "assistant")[(len(turns) - bool(system)) % 2], int(length), len(turns) - 1))
        return weigh(make_tree(*turns), "once")

    def messages(self, trees):
        return [(tree.messages.tolist(), tree.messages[tree.weights > 0].tolist()) for tree in trees]

    def test_they_overlap_by_whole_turns_and_supervise_what_is_new(self, make_tree):
        windows, dropped = fit_context(self.conversation(make_tree, [5] * 10), 20)
        assert dropped == 0
        assert self.messages(windows) == [
            ([0, 1, 2, 3], [1, 3]),
            ([2, 3, 4, 5], [5]),
            ([4, 5, 6, 7], [7]),
            ([6, 7, 8, 9], [9]),
        ]

    def test_the_last_repeats_what_there_is_room_for(self, make_tree):
        windows, _ = fit_context(self.conversation(make_tree, [5] * 14), 62)
        assert self.messages(windows) == [(list(range(12)), [1, 3, 5, 7, 9, 11]), (list(range(2, 14)), [13])]

    def test_a_system_turn_opens_each_of_them(self, make_tree):
        windows, _ = fit_context(self.conversation(make_tree, [10] * 14, system=4), 64)
        assert self.messages(windows) == [
            (list(range(7)), [2, 4, 6]),
            ([0, 5, 6, 7, 8, 9, 10], [8, 10]),
            ([0, 9, 10, 11, 12, 13, 14], [12, 14]),
        ]
        assert all(ROLES[tree.roles[0]] == "system" for tree in windows)

    def test_after_a_turn_that_is_too_long_a_new_one_begins(self, make_tree):
        windows, dropped = fit_context(self.conversation(make_tree, [5, 5, 5, 50, 5, 5, 5, 5]), 20)
        assert dropped == 1
        assert self.messages(windows) == [([0, 1], [1]), ([4, 5, 6, 7], [5, 7])]

    def test_together_they_are_less_than_twice_the_whole(self, make_tree):
        """Of whatever length, and whatever the turns are like: short, long, or one long one among many short."""
        most = 0.0
        for turns in (40, 100, 400, 1000):
            for seed in range(12):
                random = np.random.default_rng(seed)
                kinds = (
                    np.full(turns, 27 + seed),
                    random.integers(3, 60, turns),
                    np.minimum(random.lognormal(4, 1.2, turns).astype(int) + 3, 500),
                    np.where(random.random(turns) < 0.1, 480, 6),
                    np.tile([60, 110, 130, 380], turns // 4),
                )
                tree = self.conversation(make_tree, kinds[seed % len(kinds)], system=10 * (seed % 2))
                windows, dropped = fit_context(tree, 1024)
                cost = sum(len(window.tokens) for window in windows) / len(tree.tokens)
                assert dropped == 0
                assert cost < 2
                assert len(windows) * 1024 < 4 * len(tree.tokens) + 1024
                most = max(most, cost)
        assert most > 1.7

    def test_a_branch_that_two_windows_could_hold_is_computed_by_one(self, make_tree):
        """Two replies at the end of a long conversation share the window's repeated turns."""
        turns = [(("user", "assistant")[turn % 2], 5, turn - 1) for turn in range(6)]
        tree = weigh(make_tree(*turns, ("assistant", 5, 4)), "once")
        windows, _ = fit_context(tree, 20)
        assert self.messages(windows) == [([0, 1, 2, 3], [1, 3]), ([2, 3, 4, 5, 6], [5, 6])]


class TestPlainText:
    """Token i of the text says i; 0 opens it and the last one ends it."""

    @pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 13, 14, 15, 22])
    def test_every_token_is_a_target_once_in_pieces_that_open_alike(self, make_tree, length):
        tree = weigh(make_tree(("text", length, -1), group=2), "once")
        chunks, dropped = fit_context(tree, 8)
        assert dropped == 0
        assert [chunk.tokens[0] for chunk in chunks] == [0] * len(chunks)
        assert [token for chunk in chunks for token in chunk.tokens[1:].tolist()] == list(range(1, length))
        assert all(len(chunk.tokens) == 8 for chunk in chunks[:-1])
        assert sum(chunk.num_supervised for chunk in chunks) == length - 1
        assert len(chunks) == -(-(length - 1) // 7)
        for chunk in chunks:
            assert len(chunk.tokens) == chunk.lengths.sum() > 1
            assert split(chunk, 8) == [chunk]
            assert (chunk.parents.tolist(), chunk.groups.tolist(), chunk.weights.tolist()) == ([-1], [2], [1])

    def test_what_fits_is_left_alone(self, make_tree):
        tree = weigh(make_tree(("text", 8, -1)), "once")
        assert fit_context(tree, 8) == ([tree], 0)

    def test_a_context_without_room_for_a_target_holds_nothing(self, make_tree):
        assert fit_context(weigh(make_tree(("text", 8, -1)), "once"), 1) == ([], 1)


class TestSplit:
    def test_what_fits_is_left_alone(self, make_tree):
        tree = weigh(make_tree(*BRANCHES), "once")
        assert split(tree, 27) == [tree]

    def test_cuts_at_branches_and_repeats_the_shared_path(self, make_tree):
        tree = weigh(make_tree(*BRANCHES), "leaves")
        first, second = split(tree, 18)
        assert nodes(first) == [(0, None, 0), (1, 0, 3), (2, 1, 0), (3, 2, 1), (4, 2, 1)]
        assert nodes(second) == [(0, None, 0), (1, 0, 0), (5, 1, 0), (6, 5, 1), (7, 0, 1)]

    def test_one_path_a_part(self, make_tree):
        tree = weigh(make_tree(*BRANCHES), "once")
        parts = split(tree, 16)
        assert [part.messages.tolist() for part in parts] == [[0, 1, 2, 3, 4], [0, 1, 5, 6], [0, 7]]
        assert [part.num_supervised for part in parts] == [3 + 4 + 1, 5, 1]

    def test_a_path_larger_than_a_stream_is_refused(self, make_tree):
        with pytest.raises(ValueError, match="path of 16 tokens .* 15"):
            split(weigh(make_tree(*BRANCHES), "once"), 15)


@pytest.mark.parametrize("rule", ["once", "leaves"])
def test_every_reply_is_supervised_once_in_a_context_that_may_be_kept(random_tree, rule):
    """Random trees, cut to random contexts and streams: nothing is lost, doubled or shown another path."""
    met = {"too long": 0, "in windows": 0, "split": 0, "whole": 0, "less than there is room for": 0}
    for seed in range(400):
        random = np.random.default_rng(seed)
        tree = leading_to_reply(random_tree(random))
        if tree is None:
            continue
        tree = weigh(tree, rule)
        limit = int(random.integers(20, 140))
        capacity = limit + int(random.integers(0, 60))
        expected, too_long = longest_contexts(tree, limit)
        trees, dropped = fit_context(tree, limit)
        parts = [part for one in trees for part in split(one, capacity)]
        assert dropped == too_long
        found = {}
        for part in parts:
            nodes(part)
            assert len(part.tokens) <= capacity
            assert part.weights[part.roles != ASSISTANT].sum() == 0
            for node in np.flatnonzero(part.weights).tolist():
                message = int(part.messages[node])
                assert message not in found
                found[message] = (path_messages(part, node), float(part.weights[node]))
                assert part.depths[node] + part.lengths[node] <= limit
        assert found.keys() == expected.keys()
        has_system = ROLES[tree.roles[0]] == "system"
        for message, (context, weight) in found.items():
            longest, own_weight = expected[message]
            assert weight == own_weight
            turns = context[has_system:]
            assert context == longest[:has_system] + longest[-len(turns) :]  # the oldest turns give way
            assert ROLES[tree.roles[tree.messages == turns[0]][0]] == "user"
            met["less than there is room for"] += context != longest
        shown = np.isin(tree.messages, [message for one in trees for message in one.messages.tolist()])
        cost = sum(len(one.tokens) for one in trees) - has_system * (len(trees) - 1) * int(tree.lengths[0])
        assert cost < 2 * int(tree.lengths[shown].sum()) or not trees
        met["too long"] += dropped > 0
        met["in windows"] += len(trees) > 1
        met["split"] += len(parts) > len(trees)
        met["whole"] += len(parts) == 1 and parts[0] is tree
    assert min(met.values()) > 40, met


def longest_contexts(tree, limit):
    """{message: (messages of its longest context and itself, weight)} of every reply; and how many are too long."""
    expected, too_long = {}, 0
    for node in np.flatnonzero(tree.roles == ASSISTANT).tolist():
        path = tree.path_to(node)
        kept = kept_turns([ROLES[tree.roles[i]] for i in path], [int(tree.lengths[i]) for i in path], limit)
        if kept is None:
            too_long += 1
        else:
            context = [int(tree.messages[path[i]]) for i in kept]
            expected[context[-1]] = (context, float(tree.weights[node]))
    return expected, too_long


def test_depths_count_up_along_every_path(random_tree):
    for seed in range(50):
        tree = random_tree(np.random.default_rng(seed))
        for leaf in leaf_nodes(tree):
            positions = [int(tree.depths[i]) + offset for i in tree.path_to(leaf) for offset in range(tree.lengths[i])]
            assert positions == list(range(len(positions)))
