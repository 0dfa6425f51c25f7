"""What is split and merged holds every pair once, as it was, or counts it."""

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from facts import tells
from preference_groups import PLENTY, by_message, rows_of, tokens_of

from gpt2ft.data.chunks import chunk
from gpt2ft.data.kinds import PREFERENCES
from gpt2ft.data.packing import number_replies
from gpt2ft.data.pairs import PreferencePairs, split_by_pairs
from gpt2ft.data.reading import DataError
from gpt2ft.data.store import open_store
from gpt2ft.data.token_tree import counts
from gpt2ft.settings.sections import FilterSettings

RULES = ["all", "best_worst", "adjacent"]


class TestSplitByPairs:
    def test_every_pair_stands_in_one_part_with_both_its_replies(self, random_groups):
        chunking = PreferencePairs("all", "pair", PLENTY, PLENTY)
        parts_met, refused = Counter(), 0
        for row in range(len(random_groups)):
            whole = chunking.whole(random_groups, row, 0)
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

    def test_a_ranking_of_all_replies_is_never_split(self, random_groups):
        chunking = PreferencePairs("all", "pair", 128, 512, whole_rankings=True)
        chunks = chunk([random_groups], rows_of(random_groups), chunking)
        assert not (chunks.parts > 0).any()
        largest = int(chunks.sizes.max())
        with pytest.raises(DataError) as raised:
            chunk([random_groups], rows_of(random_groups), replace(chunking, capacity=largest - 1))
        least = -(-largest // 128) * 128
        assert tells(
            str(raised.value), f"conversation ... replies ... {largest} ... `tokens_per_micro_batch` ... {least}"
        )
        split = chunk([random_groups], rows_of(random_groups), PreferencePairs("all", "pair", 128, largest - 1))
        assert split.parts.max() > 0

    def test_the_refusal_names_the_conversation_and_what_to_set(self, random_groups):
        with pytest.raises(DataError) as raised:
            chunk([random_groups], rows_of(random_groups), PreferencePairs("all", "pair", 60, 60))
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
def test_chunks_hold_every_pair_once_or_count_it(random_groups, rule, max_length, capacity, monkeypatch):
    chunking = PreferencePairs(rule, "pair", max_length, capacity)
    chunks = chunk([random_groups], rows_of(random_groups), chunking)
    found = pairs_of(chunks)
    lost = Counter()
    for row in range(len(random_groups)):
        whole = by_message(chunking.whole(random_groups, row, 0))
        kept = found.get(row, {})
        assert kept.items() <= whole.items()
        lost["prompts that leave no room for a reply"] += not kept
        lost["pairs whose replies are alike once cut"] += len(whole) - len(kept) if kept else 0
    if max_length == 24:
        assert lost["prompts that leave no room for a reply"] > 10
    assert chunks.left_out == +lost
    assert chunks.repeated.any() == (len(chunks) > len(found))
    parts = {row: chunking.cut(chunking.whole(random_groups, row, 0), Counter()) for row in range(len(random_groups))}
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
        random_groups,
        open_store(str(write(tmp_path / "alike.jsonl", alike)), FilterSettings(), tokenizer, cache, kind=PREFERENCES),
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


def test_replies_are_numbered_through(random_groups):
    chunking = PreferencePairs("all", "pair", 64, 128)
    trees = number_replies([chunking.whole(random_groups, row, 0) for row in range(5)])
    numbers = np.concatenate([tree.groups[tree.weights > 0] for tree in trees])
    assert numbers.tolist() == list(range(len(numbers)))
    assert not np.concatenate([tree.groups[tree.weights == 0] for tree in trees]).any()
