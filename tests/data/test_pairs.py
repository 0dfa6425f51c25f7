"""Which replies are compared, and that what is cut and split holds every pair once, as it was, or counts it."""

from collections import Counter
from dataclasses import fields, replace
from itertools import product

import numpy as np
import pytest
from facts import tells

from gpt2ft.data.chunks import chunk
from gpt2ft.data.kinds import PREFERENCES
from gpt2ft.data.packing import number_replies
from gpt2ft.data.pairs import LEAST_REPLY, PreferencePairs, compared, fit_replies, split_by_pairs, times_compared
from gpt2ft.data.reading import DataError
from gpt2ft.data.store import open_store
from gpt2ft.data.token_tree import counts
from gpt2ft.settings.sections import FilterSettings

RULES = ["all", "best_worst", "adjacent"]
PLENTY = 1 << 20


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


@pytest.fixture(scope="module")
def random_groups(write, tmp_path_factory):
    """A file of 150 trees: prompts of up to five turns, two to six replies of up to 60 words, many ranks tied."""
    random = np.random.default_rng(0)
    words = ["tea", "rain", "cup", "warm", "leaf", "and", "of", "a"]

    def message(id, role, most=60, **fields):
        text = " ".join(random.choice(words, int(random.integers(1, most))).tolist())
        return {"message_id": id, "role": role, "text": text, "replies": [], **fields}

    trees = []
    for number in range(150):
        root = message(f"{number}", "system" if random.random() < 0.3 else "prompter", most=20)
        last = root
        for turn in range(2 * int(random.integers(0, 3)) + (root["role"] == "system")):
            role = "prompter" if last["role"] in ("assistant", "system") else "assistant"
            last["replies"] = [message(f"{number}-{turn}", role, most=20)]
            (last,) = last["replies"]
        ranks = [0, 1, *random.integers(0, 4, int(random.integers(0, 5))).tolist()]
        last["replies"] = [message(f"{number}-r{i}", "assistant", rank=rank) for i, rank in enumerate(ranks)]
        trees.append({"message_tree_id": f"{number}", "prompt": root})
    return str(write(tmp_path_factory.mktemp("groups") / "groups.jsonl", trees))


@pytest.fixture(scope="module")
def store(random_groups, tokenizer, cache):
    return open_store(random_groups, FilterSettings(reviewed_only=False), tokenizer, cache, kind=PREFERENCES)


@pytest.fixture(params=["random", "quickstart", "oasst"])
def any_store(request, cache):
    if request.param == "random":
        return request.getfixturevalue("store")
    if request.param == "quickstart":
        return open_store("quickstart", FilterSettings(), request.getfixturevalue("tokenizer"), cache, kind=PREFERENCES)
    file = request.getfixturevalue("test_data")("oasst/en_100_tree.jsonl")
    return open_store(str(file), FilterSettings(), request.getfixturevalue("gpt2_tokenizer"), cache, kind=PREFERENCES)


def rows_of(store):
    return np.array([(0, row) for row in range(len(store))])


def tokens_of(tree, node):
    return tree.tokens[tree.starts[node] : tree.starts[node] + tree.lengths[node]].tolist()


def by_message(tree):
    """{(chosen, rejected) as messages: weight of the pair}."""
    pairs = [tuple(pair) for pair in tree.messages[tree.pairs].tolist()]
    assert len(set(pairs)) == len(pairs)
    return dict(zip(pairs, tree.pair_weights.tolist(), strict=True))


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
    def test_any_group(self, store, tokenizer, limit):
        """Within the limit stands a system turn, the latest turns from a user's on, and replies as they are or cut."""
        met = Counter()
        for row in range(len(store)):
            whole = PreferencePairs("all", "pair", limit, PLENTY).whole(store, row, 0)
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


class TestSplitByPairs:
    def test_every_pair_stands_in_one_part_with_both_its_replies(self, store):
        chunking = PreferencePairs("all", "pair", PLENTY, PLENTY)
        parts_met, refused = Counter(), 0
        for row in range(len(store)):
            whole = chunking.whole(store, row, 0)
            prompt = int(whole.lengths[whole.weights == 0].sum())
            needed = max(prompt + int(whole.lengths[pair].sum()) for pair in whole.pairs.tolist())
            for capacity in (needed, needed + 40, needed + 100):
                parts = split_by_pairs(whole, capacity)
                together = Counter()
                for part in parts:
                    assert len(part.tokens) <= capacity
                    together.update(by_message(part))
                    assert set(part.messages[part.pairs].flatten().tolist()) == set(
                        part.messages[part.weights > 0].tolist()
                    )
                    assert part.messages[part.weights == 0].tolist() == whole.messages[whole.weights == 0].tolist()
                    for node, message in enumerate(part.messages.tolist()):
                        assert tokens_of(part, node) == tokens_of(whole, whole.messages.tolist().index(message))
                assert together == by_message(whole)
                assert (len(parts) == 1) == (len(whole.tokens) <= capacity)
                parts_met[len(parts)] += 1
            if len(whole.pairs) > 1:
                with pytest.raises(ValueError, match=rf"{needed:,} tokens"):
                    split_by_pairs(whole, needed - 1)
                refused += 1
        assert min(parts_met[number] for number in (1, 2, 3, 4)) > 10
        assert refused > 50

    def test_a_ranking_of_all_replies_is_never_split(self, store):
        chunking = PreferencePairs("all", "pair", 128, 512, whole_rankings=True)
        chunks = chunk([store], rows_of(store), chunking)
        assert not (chunks.parts > 0).any()
        largest = int(chunks.sizes.max())
        with pytest.raises(DataError) as raised:
            chunk([store], rows_of(store), replace(chunking, capacity=largest - 1))
        least = -(-largest // 128) * 128
        assert tells(
            str(raised.value), f"conversation ... replies ... {largest} ... `tokens_per_micro_batch` ... {least}"
        )
        assert chunk([store], rows_of(store), PreferencePairs("all", "pair", 128, largest - 1)).parts.max() > 0

    def test_the_refusal_names_the_conversation_and_what_to_set(self, store):
        with pytest.raises(DataError) as raised:
            chunk([store], rows_of(store), PreferencePairs("all", "pair", 60, 60))
        assert "groups.jsonl, conversation " in str(raised.value)
        assert tells(str(raised.value), "60 ... `tokens_per_micro_batch` ... 128")


def pairs_of(chunks):
    """{row: {pair as messages: weight}} over all chunks, each pair once."""
    found = {}
    for index in range(len(chunks)):
        pairs, of_row = by_message(chunks.tree(index)), found.setdefault(int(chunks.rows[index, 1]), {})
        assert not pairs.keys() & of_row.keys()
        of_row |= pairs
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("max_length", "capacity"), [(PLENTY, PLENTY), (64, 256), (48, 96), (24, 64)])
def test_chunks_hold_every_pair_once_or_count_it(store, rule, max_length, capacity, monkeypatch):
    chunking = PreferencePairs(rule, "pair", max_length, capacity)
    chunks = chunk([store], rows_of(store), chunking)
    found = pairs_of(chunks)
    lost = Counter()
    for row in range(len(store)):
        whole = by_message(chunking.whole(store, row, 0))
        kept = found.get(row, {})
        assert kept.items() <= whole.items()
        lost["prompts that leave no room for a reply"] += not kept
        lost["pairs whose replies are alike once cut"] += len(whole) - len(kept) if kept else 0
    if max_length == 24:
        assert lost["prompts that leave no room for a reply"] > 10
    assert chunks.left_out == +lost
    assert chunks.repeated.any() == (len(chunks) > len(found))
    parts = {row: chunking.cut(chunking.whole(store, row, 0), Counter()) for row in range(len(store))}
    monkeypatch.setattr(PreferencePairs, "cut", lambda *_: pytest.fail("a part is made without the others"))
    for index, (_, row) in enumerate(chunks.rows.tolist()):
        tree = chunks.tree(index)
        assert tuple(chunks.counts[index].tolist()) == counts(tree)
        if chunks.is_cut[index]:
            part = parts[row][chunks.parts[index]]
            assert all(np.array_equal(getattr(tree, each.name), getattr(part, each.name)) for each in fields(part))


@pytest.mark.parametrize("rule", RULES)
def test_the_sum_of_weights_is_one_for_each_prompt_or_for_each_pair(
    random_groups, rule, tokenizer, cache, write, tmp_path
):
    """Also of prompts that are split, and of those that have lost pairs because these are alike once cut."""
    alike = [
        {"instruction": "Tea?", "completions": [
            {"response": f"{'tea ' * same}and {number}", "overall_score": number} for number, same in enumerate(row)
        ]}
        for row in ([60, 60, 3], [60, 60, 60, 4], [5, 6, 60, 60], [60, 60])
    ]  # fmt: skip
    stores = [
        open_store(str(file), FilterSettings(reviewed_only=False), tokenizer, cache, kind=PREFERENCES)
        for file in (random_groups, write(tmp_path / "alike.jsonl", alike))
    ]
    rows = np.array([(number, row) for number, store in enumerate(stores) for row in range(len(store))])
    split = lost = 0
    for number, weight in ((store, weight) for store in (0, 1) for weight in ("pair", "prompt")):
        chunking = PreferencePairs(rule, weight, max_length=32, capacity=64)
        chunks = chunk(stores, rows[rows[:, 0] == number], chunking)
        for row, pairs in pairs_of(chunks).items():
            assert len(set(pairs.values())) == 1
            assert sum(pairs.values()) == pytest.approx(1 if weight == "prompt" else len(pairs), rel=1e-6)
            lost += len(pairs) < len(chunking.whole(stores[number], row, 0).pairs)
            split += int((chunks.rows[:, 1] == row).sum()) > 1
    assert lost > 0 or rule == "best_worst"
    assert split > 50 or rule != "all"


def ways(chunks):
    """{(ids of the prompt, ids of chosen and of rejected reply): (times, weight)} over all chunks."""
    found = {}
    for index in range(len(chunks)):
        tree = chunks.tree(index)
        assert counts(tree) == tuple(chunks.counts[index].tolist())
        assert (tree.parents[1:] < np.arange(1, len(tree.parents))).all()
        assert tree.ends[0] == len(tree.tokens)
        for (chosen, rejected), weight in zip(tree.pairs.tolist(), tree.pair_weights.tolist(), strict=True):
            prompt = [tokens_of(tree, node) for node in tree.path_to(chosen)[:-1]]
            assert prompt == [tokens_of(tree, node) for node in tree.path_to(rejected)[:-1]]
            pair = str((prompt, tokens_of(tree, chosen), tokens_of(tree, rejected)))
            times, sum_of_weights = found.get(pair, (0, 0.0))
            found[pair] = times + 1, round(sum_of_weights + weight, 5)
    return found


class TestMergedGroups:
    @pytest.mark.parametrize(("rule", "weight"), [("all", "pair"), ("best_worst", "prompt")])
    @pytest.mark.parametrize(("max_length", "capacity"), [(512, 512), (128, 256), (96, 192)])
    def test_every_pair_stands_in_them_as_often_and_with_the_same_weight(
        self, tokenizer, cache, rule, weight, max_length, capacity
    ):
        """Of two sources, rows out of order, some of which a mixing weight takes twice; some groups are cut."""
        names = ("quickstart", "quickstart:held_out")
        stores = [open_store(name, FilterSettings(), tokenizer, cache, kind=PREFERENCES) for name in names]
        rows = np.array([(number, row) for number in (0, 1) for row in range(0, len(stores[number]))])
        rows = np.random.default_rng(0).permutation(np.concatenate([rows, rows[::3]]))
        chunking = PreferencePairs(rule, weight, max_length, capacity)
        apart, merged = (chunk(stores, rows, replace(chunking, merges=merges)) for merges in (False, True))
        assert ways(merged) == ways(apart)
        assert len(merged) + sum(map(len, merged.merged.values())) == len(apart)
        assert sorted(merged.all_rows.tolist()) == sorted(apart.all_rows.tolist())
        assert merged.sizes.max() <= capacity
        assert merged.sizes.sum() < apart.sizes.sum()
        assert apart.is_cut.sum() == merged.is_cut.sum()
        assert apart.is_cut.any() == (max_length < 512)
        assert merged.left_out == apart.left_out
        assert len(np.unique(merged.pieces, axis=0)) > 0.95 * len(np.unique(merged.rows, axis=0))

    def test_replies_to_one_prompt_in_several_records_share_it(self, tokenizer, cache, write, tmp_path):
        """And only those are compared that one record compares."""
        pairs = [("What is tea?", "A hot drink.", "No."), ("What is tea?", "Leaves.", "No."), ("Tea!", "Yes.", "No.")]
        records = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
        file = str(write(tmp_path / "pairs.jsonl", records))
        store = open_store(file, FilterSettings(), tokenizer, cache, kind=PREFERENCES)
        chunking = PreferencePairs("all", "pair", PLENTY, PLENTY)
        apart, merged = (chunk([store], rows_of(store), replace(chunking, merges=merges)) for merges in (False, True))
        assert ways(merged) == ways(apart)
        assert merged.counts[:, 2:4].tolist() == [[3, 2], [2, 1]]  # replies, pairs
        assert merged.tree(0).parents.tolist() == [-1, 0, 0, 0]
        assert merged.tree(0).rankings.tolist() == [0, 1]


def test_replies_are_numbered_through(store):
    chunking = PreferencePairs("all", "pair", 64, 128)
    trees = number_replies([chunking.whole(store, row, 0) for row in range(5)])
    numbers = np.concatenate([tree.groups[tree.weights > 0] for tree in trees])
    assert numbers.tolist() == list(range(len(numbers)))
    assert not np.concatenate([tree.groups[tree.weights == 0] for tree in trees]).any()
