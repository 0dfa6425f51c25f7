"""Which replies of a tree are compared: by hand, for any tree as defined in so many words, and for real data."""

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from gpt2ft.conversation import Message, MessageTree
from gpt2ft.data.kinds import PREFERENCES
from gpt2ft.data.preference_groups import labelled_groups, preference_groups
from gpt2ft.data.reading import REASONS
from gpt2ft.data.store import open_store
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.text.template import render_turn


def tree_of(*messages):
    """tree_of("u", ("a", 0, rank, text), ...): a root, then (role, parent, rank, text) with what is left out None."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    found = []
    for number, message in enumerate(messages):
        role, parent, rank, text = (*message, *[None] * 4)[:4] if isinstance(message, tuple) else (message, *[None] * 3)
        found.append(Message(roles[role], text or f"text {number}", parent, rank))
    return MessageTree("t", "s", tuple(found))


def found(*messages):
    dropped = Counter()
    return preference_groups(tree_of(*messages), dropped), dict(+dropped)


class TestByHand:
    def test_ranked_replies_below_their_prompt(self):
        assert found("u", ("a", 0, 0), ("a", 0, 1), ("a", 0, 2)) == ([[0, 1, 2, 3]], {})

    def test_the_prompt_is_all_that_stands_above(self):
        messages = ["s", ("u", 0), ("a", 1), ("u", 2), ("a", 3, 1), ("a", 3, 0)]
        assert found(*messages) == ([[0, 1, 2, 3, 4, 5]], {})

    def test_a_tree_may_hold_several_prompts(self):
        messages = ["u", ("a", 0, 0), ("u", 1), ("a", 2, 0), ("a", 2, 1), ("u", 1), ("a", 5), ("a", 0, 1), ("u", 7)]
        assert found(*messages) == (
            [[0, 1, 7], [0, 1, 2, 3, 4]],
            {"in no pair": 2, "reply without a rank": 1},
        )

    def test_a_tie_with_all_others(self):
        assert found("u", ("a", 0, 3), ("a", 0, 3)) == ([], {"tied with all others": 2, "in no pair": 1})

    def test_a_tie_with_some(self):
        assert found("u", ("a", 0, 1), ("a", 0, 1), ("a", 0, 4)) == ([[0, 1, 2, 3]], {})

    def test_missing_ranks(self):
        assert found("u", ("a", 0, 0), ("a", 0), ("a", 0, 1)) == ([[0, 1, 3]], {"reply without a rank": 1})
        assert found("u", ("a", 0, 0), ("a", 0)) == (
            [],
            {"reply without a rank": 1, "nothing to compare it with": 1, "in no pair": 1},
        )

    def test_a_reply_without_a_rank_may_stand_above_others_that_have_one(self):
        messages = ["u", ("a", 0, 0), ("a", 0, 1), ("a", 0), ("u", 3), ("a", 4, 0), ("a", 4, 1)]
        assert found(*messages) == ([[0, 1, 2], [0, 3, 4, 5, 6]], {})

    def test_of_equal_texts_the_better_reply_stays(self):
        same = [("a", 0, 2, "Yes."), ("a", 0, 0, "Yes."), ("a", 0, 1, "No.")]
        assert found("u", *same) == ([[0, 2, 3]], {"same text as a better reply": 1})
        same = [("a", 0, 0, "Yes."), ("a", 0, 1, "Yes.")]
        dropped = {"same text as a better reply": 1, "nothing to compare it with": 1, "in no pair": 1}
        assert found("u", *same) == ([], dropped)

    def test_what_makes_two_ranks_is_looked_at_after_that(self):
        same = [("a", 0, 0, "Yes."), ("a", 0, 1, "Yes."), ("a", 0, 0, "No.")]
        dropped = {"same text as a better reply": 1, "tied with all others": 2, "in no pair": 1}
        assert found("u", *same) == ([], dropped)

    def test_nothing_is_compared(self):
        assert found("u", ("a", 0)) == ([], {"reply without a rank": 1, "in no pair": 1})
        assert found("u") == ([], {"in no pair": 1})


def random_ranked_tree(seed):
    """Up to 30 messages; ranks that are missing, tied or apart, and only so many texts."""
    random = np.random.default_rng(seed)
    messages, path = [Message("user", "Tea?")], [0]
    for number in range(1, int(random.integers(2, 31))):
        path = path[: len(path) - min(int(random.geometric(0.4)) - 1, len(path) - 1)]
        role = "user" if messages[path[-1]].role == "assistant" else "assistant"
        rank = None if random.random() < 0.2 else int(random.integers(0, 3))
        messages.append(Message(role, f"text {random.integers(0, 6)}", path[-1], rank))
        path.append(number)
    return MessageTree(str(seed), "random", tuple(messages))


def as_defined(tree):
    """The groups as sets of messages by prompt, and why each message is in none; slowly, one by one."""
    messages = list(enumerate(tree.messages))
    groups, reasons = {}, {}
    for prompt, _ in messages:
        siblings = [(i, m) for i, m in messages if m.parent == prompt and m.role == "assistant"]
        ranked = [(i, m) for i, m in siblings if m.rank is not None]
        kept = []
        for i, m in ranked:
            better = [j for j, other in ranked if other.text == m.text and (other.rank, j) < (m.rank, i)]
            if better:
                reasons[i] = "same text as a better reply"
            else:
                kept.append((i, m))
        if any(a.rank != b.rank for (_, a), (_, b) in combinations(kept, 2)):
            above, path = prompt, []
            while above is not None:
                path.append(above)
                above = tree.messages[above].parent
            groups[prompt] = {*path, *(i for i, _ in kept)}
        else:
            why = "nothing to compare it with" if len(kept) == 1 else "tied with all others"
            reasons |= {i: why for i, _ in kept}
        reasons |= {i: "reply without a rank" for i, m in siblings if m.rank is None}
    used = set().union(*groups.values())
    return groups, Counter(reasons.get(i, "in no pair") for i, _ in messages if i not in used)


def test_any_tree_as_defined():
    met, reasons = Counter(), Counter()
    for seed in range(1000):
        tree = random_ranked_tree(seed)
        dropped = Counter()
        result = preference_groups(tree, dropped)
        expected, expected_drops = as_defined(tree)
        assert [sorted(group) for group in result] == result
        assert [set(group) for group in result] == [expected[prompt] for prompt in sorted(expected)]
        assert dropped == expected_drops
        assert len(set().union(*result)) + dropped.total() == len(tree.messages)
        met[len(result)] += 1
        met["deep"] += any(tree.messages[group[2]].role == "user" for group in result if len(group) > 3)
        reasons.update(dropped)
        labelled, groups = labelled_groups(tree, kept_apart := Counter())
        assert len(set().union(*groups)) + kept_apart.total() == len(tree.messages)
        assert [group[0] for group in groups] == [group[0] for group in result]
        for group, whole in zip(groups, result, strict=True):
            prompt = tree.messages[whole[-1]].parent
            ranks = {index: tree.messages[index].rank for index in whole if tree.messages[index].parent == prompt}
            best, worst = min(ranks.values()), max(ranks.values())
            ends = {index: int(rank == worst) for index, rank in ranks.items() if rank in (best, worst)}
            assert {index: labelled.messages[index].rank for index in group if index in ranks} == ends
        met["neither"] += kept_apart["neither best nor worst"]
    assert min(met[number] for number in (0, 1, 2, 3)) > 30
    assert met["deep"] > 100
    assert met["neither"] > 100
    assert min(reasons[reason] for reason in REASONS[REASONS.index("reply without a rank") : -1]) > 100


@pytest.fixture(scope="module")
def oasst(test_data):
    """(the store of ranked groups, {prompt: ranked replies} straight from the file)."""
    file = test_data("oasst/en_100_tree.jsonl")
    replies = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        waiting = [(json.loads(line)["prompt"], ())]
        while waiting:
            message, above = waiting.pop()
            path = (*above, (message["role"], message["text"]))
            waiting += [(reply, path) for reply in message["replies"]]
            ranked = [r for r in message["replies"] if r["role"] == "assistant" and r.get("rank") is not None]
            if ranked:
                replies[path] = {reply["rank"]: reply["text"] for reply in ranked}
                assert len(replies[path]) == len(ranked)  # no ties here
    return file, replies


def test_real_siblings_are_groups(oasst, gpt2_tokenizer, cache):
    file, replies = oasst
    assert sum(map(len, replies.values())) == 641
    assert sum(len(list(combinations(ranks, 2))) for ranks in replies.values()) == 754
    store = open_store(str(file), FilterSettings(), gpt2_tokenizer, cache, kind=PREFERENCES)
    assert len(store) == len(replies) == 212
    roles = {"prompter": "user", "assistant": "assistant"}
    expected = Counter()
    for path, ranks in replies.items():
        turns = [render_turn(gpt2_tokenizer, roles[role], text.replace("\r\n", "\n").strip()) for role, text in path]
        for rank, text in ranks.items():
            reply = render_turn(gpt2_tokenizer, "assistant", text.replace("\r\n", "\n").strip())
            expected[tuple(map(tuple, turns)), rank, tuple(reply)] += 1
    stored = Counter()
    for row in range(len(store)):
        tree, ranks = store.tree(row, 0), store.ranks(row)
        nodes = [tuple(tree.tokens[s : s + n].tolist()) for s, n in zip(tree.starts, tree.lengths, strict=True)]
        inner = set(tree.parents.tolist())
        for node in set(range(len(nodes))) - inner:
            prompt = tuple(nodes[above] for above in tree.path_to(node)[:-1])
            stored[prompt, int(ranks[node]), nodes[node]] += 1
    assert stored == expected
    statistics = store.statistics
    assert statistics.read == statistics.kept + sum(statistics.dropped.values()) == 1167
    assert statistics.dropped == {"in no pair": 267, "reply without a rank": 45}  # one more leads to a group


def test_the_quickstarts_trees_are_ranked(tokenizer, cache):
    store = open_store("quickstart", FilterSettings(), tokenizer, cache, kind=PREFERENCES)
    assert (len(store), store.statistics.dropped) == (263, {})
    assert len(set(store.conversations().tolist())) == store.statistics.conversations == 150
    assert len(set(store.keys().tolist())) == 263
    held_out = open_store("quickstart:held_out", FilterSettings(), tokenizer, cache, kind=PREFERENCES)
    assert not set(store.conversations().tolist()) & set(held_out.conversations().tolist())
