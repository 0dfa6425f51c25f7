"""Conversations that begin alike are one tree, which is exactly what they are alone.

What is expected is worked out from the chunks alone: every target with all the tokens above it, and what it counts.
"""

import tempfile
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch

from gpt2ft.data import turn_nodes
from gpt2ft.data.chunks import ConversationTrees, chunk
from gpt2ft.data.corpus import load_corpora
from gpt2ft.data.kinds import LABELLED, PREFERENCES
from gpt2ft.data.labelled_replies import LabelledReplies
from gpt2ft.data.packing import build_stream
from gpt2ft.data.pairs import PreferencePairs
from gpt2ft.data.plan import Plan
from gpt2ft.data.prefixes import share_prefixes
from gpt2ft.data.store import open_store
from gpt2ft.data.token_tree import counts
from gpt2ft.errors import SettingsError
from gpt2ft.model.logprobs import TargetLogProbs
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.settings.training import DataSettings

WORDS = ["tea", "rain", "cup", "warm", "leaf", "and", "of", "a"]
SYSTEM = {"role": "system", "content": "You talk of tea and of nothing else, and you are kind."}


def conversations(number, seed=0):
    """Flat conversations that fork, begin others, repeat others, and weigh turns; half have one system turn."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        turns = [SYSTEM] if random.random() < 0.5 else []
        if found and random.random() < 0.7:
            other = found[int(random.integers(len(found)))]
            turns = [dict(turn) for turn in other[: int(random.integers(1, len(other) + 1))]]
        roles = {"assistant": "user"}
        while len(turns) < 2 or turns[-1]["role"] != "assistant" or random.random() < 0.5:
            role = roles.get(turns[-1]["role"], "assistant") if turns else "user"
            role = "user" if turns and turns[-1]["role"] == "system" else role
            turns.append({"role": role, "content": " ".join(random.choice(WORDS, int(random.integers(1, 12))))})
        for turn in turns:
            if turn["role"] == "assistant":
                turn["weight"] = random.choice([0, 0.25, 0.5, 1, 1, 1])
        found.append(turns)
    return [{"id": str(index), "messages": turns} for index, turns in enumerate(found)]


def preferences(number):
    """Pairs whose prompts are the same, begin alike or are others, of few replies; every eleventh is too long."""
    random = np.random.default_rng(1)
    replies = [" ".join(random.choice(WORDS, 1 + index)) for index in range(12)]
    found = []
    for index in range(number):
        chosen, rejected = random.permutation(12)[:2].tolist()
        prompt = [SYSTEM, {"role": "user", "content": f"Question {index % 7}?"}]
        if index % 3 == 0:
            prompt += [{"role": "assistant", "content": replies[index % 2]}, {"role": "user", "content": "And now?"}]
        ends = (60, 61) if index % 11 == 0 else (1, 1)
        texts = (replies[reply] * end for reply, end in zip((chosen, rejected), ends, strict=True))
        pair = {
            key: {"role": "assistant", "content": text} for key, text in zip(("chosen", "rejected"), texts, strict=True)
        }
        found.append({"prompt": prompt, **{key: [turn] for key, turn in pair.items()}})
    return found


@pytest.fixture(scope="module")
def store_of(tokenizer, cache, write, tmp_path_factory):
    def store_of(records, **settings):
        file = write(tmp_path_factory.mktemp("flat") / "flat.jsonl", records)
        return open_store(str(file), FilterSettings(), tokenizer, cache, **settings)

    return store_of


@pytest.fixture(scope="module")
def store(store_of):
    return store_of(conversations(150))


def rows_of(*stores):
    return np.array([(number, row) for number, store in enumerate(stores) for row in range(len(store))])


def trees_of(chunks):
    return [chunks.tree(index) for index in range(len(chunks))]


def ids_to(tree, node):
    """All tokens from the root to the end of a node."""
    nodes = (tree.tokens[tree.starts[n] : tree.starts[n] + tree.lengths[n]].tolist() for n in tree.path_to(node))
    return tuple(map(tuple, nodes))


def learnt(trees):
    """{the turns down to a supervised one: its weight over all trees}"""
    found = Counter()
    for tree in trees:
        for node in np.flatnonzero(tree.weights).tolist():
            found[int(tree.groups[node]), ids_to(tree, node)] += float(tree.weights[node])
    return found


def assert_counted(chunks):
    """The figures of chunks are those of their trees."""
    seen = set()
    for index, tree in enumerate(trees_of(chunks)):
        assert tuple(chunks.counts[index].tolist())[:4] == counts(tree)[:4]
        assert chunks.sizes[index] <= chunks.chunking.capacity
        paths = {ids_to(tree, node): int(tree.lengths[node]) for node in range(len(tree.lengths))}
        assert len(paths) == len(tree.lengths), "what is shared is there once"
        if not chunks.together.alone.is_cut.any():
            assert chunks.repeated[index] == sum(length for path, length in paths.items() if path in seen)
        seen |= paths.keys()


CASES = [(512, 512), (512, 4096), (48, 128), (32, 32)]


@pytest.mark.parametrize(("max_length", "capacity"), CASES)
def test_leaves_counts_as_conversations_alone(store, max_length, capacity):
    alone = chunk([store], rows_of(store), ConversationTrees("leaves", max_length, capacity))
    shared = share_prefixes(alone)
    assert learnt(trees_of(shared)) == learnt(trees_of(alone))
    assert_counted(shared)
    assert shared.tokens_alone.sum() == alone.sizes.sum()
    assert shared.sizes.sum() < 0.8 * alone.sizes.sum()
    assert alone.is_cut.any() == (max_length < 512)


@pytest.mark.parametrize(("max_length", "capacity"), CASES)
def test_once_counts_a_turn_once_under_the_same_turns(store, max_length, capacity):
    alone = chunk([store], rows_of(store), ConversationTrees("once", max_length, capacity))
    shared = share_prefixes(alone)
    most = {}
    for tree in trees_of(alone):
        most |= {path: max(weight, most.get(path, 0)) for path, weight in learnt([tree]).items()}
    assert learnt(trees_of(shared)) == most
    assert set(most.values()) == {0.25, 0.5, 1}
    assert max(learnt(trees_of(alone)).values()) > 2
    assert all(tree.num_supervised for tree in trees_of(shared))
    assert_counted(shared)


def oasst_tree(number, texts, asked="Tea?"):
    replies = [{"message_id": f"{number}-{i}", "role": "assistant", "text": t} for i, t in enumerate(texts)]
    prompt = {"message_id": str(number), "role": "prompter", "text": asked, "replies": replies}
    return {"message_tree_id": str(number), "prompt": prompt}


def test_same_replies_of_a_tree_count_once_where_it_begins_like_another(store_of):
    store = store_of([oasst_tree(1, ["Yes."] * 2), oasst_tree(2, ["No."]), oasst_tree(3, ["Yes."] * 2, "Rain?")])
    alone = chunk([store], rows_of(store), ConversationTrees("once", 512, 512))
    assert sorted(learnt(trees_of(alone)).values()) == [1, 2, 2]
    assert [sorted(learnt([tree]).values()) for tree in trees_of(share_prefixes(alone))] == [[1, 1], [2]]


@pytest.mark.parametrize("weight", ["once", "leaves"])
def test_replies_that_are_the_same_are_counted_as_they_stand(store_of, weight):
    """In a tree that shares its first turn, but no stream has room for what shares it."""
    store = store_of([oasst_tree(1, ["tea and rain " * 20] * 2), oasst_tree(2, ["a warm cup of tea " * 30])])
    shared = share_prefixes(chunk([store], rows_of(store), ConversationTrees(weight, 512, 256)))
    assert len(shared) == 2
    for index, tree in enumerate(trees_of(shared)):
        assert tuple(shared.counts[index].tolist())[:4] == counts(tree)[:4]


def test_gradients_are_those_of_the_conversations_alone(store, tokenizer, lively):
    model = TargetLogProbs(lively(tokenizer.padded_size, 512), len(tokenizer), "segments").double()
    alone = chunk([store], rows_of(store)[:40], ConversationTrees("leaves", 64, 256))
    shared = share_prefixes(alone)
    assert shared.sizes.sum() < 0.9 * alone.sizes.sum()
    gradients = []
    for chunks in (alone, shared):
        model.zero_grad()
        plan = Plan(chunks, 256, 1, seed=0)
        for bin in plan.streams:
            stream = plan.stream(bin)
            (-(stream.weights * model(stream)).sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-10 * one.norm()


def test_what_shares_nothing_is_left_as_it_is(store_of):
    plain = [
        {"messages": [{"role": "user", "content": f"Tea {n}?"}, {"role": "assistant", "content": "Yes."}]}
        for n in range(9)
    ]
    store = store_of(plain)
    chunks = chunk([store, store], rows_of(store, store), ConversationTrees("once", 128, 512))
    assert share_prefixes(chunks) is chunks, "nor is anything shared between sources"
    texts = store_of([{"text": "tea and rain " * 60}])
    chunks = chunk([texts], rows_of(texts), ConversationTrees("once", 32, 64))
    assert chunks.is_cut.sum() > 3
    assert share_prefixes(chunks) is chunks, "the parts of a text do not begin alike"


def test_copies_that_a_mixing_weight_makes_stay_copies(store):
    rows = np.concatenate([rows_of(store), rows_of(store)[::2]])
    for rule in ("once", "leaves"):
        alone = chunk([store], rows, ConversationTrees(rule, 512, 512))
        shared = share_prefixes(alone)
        found = learnt(trees_of(shared))
        if rule == "leaves":
            assert found == learnt(trees_of(alone))
        else:
            halves = (
                learnt(trees_of(share_prefixes(chunk([store], part, alone.chunking))))
                for part in (rows_of(store), rows_of(store)[::2])
            )
            assert found == sum(halves, Counter())


def test_the_order_of_the_data_changes_nothing_that_is_learnt(store):
    for rule in ("once", "leaves"):
        rule = ConversationTrees(rule, 512, 1024)
        mixed = np.random.default_rng(2).permutation(rows_of(store))
        found = [learnt(trees_of(share_prefixes(chunk([store], rows, rule)))) for rows in (rows_of(store), mixed)]
        assert found[0] == found[1]


def test_ten_thousand_conversations_of_one_system_turn_are_cut_to_fit(store_of):
    records = [
        {"messages": [SYSTEM, {"role": "user", "content": f"Tea {n}?"}, {"role": "assistant", "content": f"Yes, {n}."}]}
        for n in range(10_000)
    ]
    store = store_of(records)
    alone = chunk([store], rows_of(store), ConversationTrees("once", 512, 1024))
    shared = share_prefixes(alone)
    system = int(store.tree(0, 0).lengths[0])
    assert 100 < len(shared) < 1000
    assert shared.repeated.sum() == (len(shared) - 1) * system
    assert (shared.sizes - shared.repeated).sum() == alone.sizes.sum() - system * (len(alone) - 1)
    assert shared.supervised.sum() == alone.supervised.sum()
    assert sorted(shared.together.members) == list(range(len(alone))), "each is read for one tree alone"
    plan = Plan(shared, 1024, 4, seed=0, epochs=1)
    assert plan.fill > 0.95
    position = plan.position(plan.steps)
    assert position["tree_to_path_tokens"] == plan.tokens / alone.sizes.sum() < 0.7
    assert position["repeated_share"] == plan.repeated / plan.tokens < 0.05
    assert plan.position(3)["data"] != Plan(alone, 1024, 4, seed=0, epochs=1).position(3)["data"]


@pytest.mark.parametrize("weight", ["once", "leaves"])
@pytest.mark.parametrize(("max_length", "capacity"), CASES)
def test_nothing_depends_on_the_size_of_blocks(store, monkeypatch, weight, max_length, capacity):
    """Rows are those of two sources and in no order, so a block is of both, and a turn of many blocks."""
    rows = np.random.default_rng(3).permutation(np.concatenate([rows_of(store, store), rows_of(store)]))
    alone = chunk([store, store], rows, ConversationTrees(weight, max_length, capacity))
    expected = share_prefixes(alone)
    monkeypatch.setattr(turn_nodes, "BLOCK", 100)
    shared = share_prefixes(alone)
    for name in ("rows", "counts", "parts", "repeated", "pieces", "tokens_alone"):
        assert np.array_equal(getattr(shared, name), getattr(expected, name))
    for tree, other in zip(trees_of(shared), trees_of(expected), strict=True):
        assert np.array_equal(tree.tokens, other.tokens)
        assert np.array_equal(tree.weights, other.weights)


def test_memory_grows_with_conversations_and_not_with_their_turns(store_of, monkeypatch):
    """The system turn is that of all, what else comes before the last reply that of two."""

    def peak(number, exchanges):
        """Bytes for `number` conversations: put together, and what is kept of it."""
        records = []
        for row in range(number):
            asked = [{"role": "user", "content": f"Tea {row - row % 2}, {turn}?"} for turn in range(exchanges)]
            turns = [turn for ask in asked for turn in (ask, {"role": "assistant", "content": "Yes."})]
            records.append({"messages": [SYSTEM, *turns[:-1], {"role": "assistant", "content": f"Tea {row}."}]})
        store = store_of(records)
        alone = chunk([store], rows_of(store), ConversationTrees("once", 1024, 2048))
        tracemalloc.start()
        shared = share_prefixes(alone)
        kept, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(shared.together.members) > number / 2
        return np.array([most, kept])

    monkeypatch.setattr(turn_nodes, "BLOCK", 512)
    peak(100, 2)
    few, many, long = peak(1000, 2), peak(3000, 2), peak(1000, 16)
    assert ((many - few) / 2000 <= (240, 64)).all(), "bytes for each conversation"
    assert ((long - few) / 28_000 <= (2, 1)).all(), "bytes for each turn: a bit, and more trees to fill"


def test_a_temporary_file_that_cannot_be_written(store, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(OSError, match=r"data\.share_prefixes.*gone.*TMPDIR"):
        share_prefixes(chunk([store], rows_of(store), ConversationTrees("once", 512, 512)))


def pairs(chunks):
    """{the turns down to either reply, the weight: how often}"""
    return Counter(
        (ids_to(tree, chosen), ids_to(tree, rejected), float(weight))
        for tree in trees_of(chunks)
        for (chosen, rejected), weight in zip(tree.pairs.tolist(), tree.pair_weights, strict=True)
    )


def test_labelled_replies_are_those_of_each_prompt_alone(store_of):
    records = []
    for index in range(9):
        said = (("user", f"Question {index % 5}?"), ("assistant", f"Reply {index}."))
        messages = [SYSTEM, *({"role": role, "content": text} for role, text in said)]
        records.append({"messages": messages, "label": index % 3 > 0})
    store = store_of(records, kind=LABELLED)
    alone = chunk([store], rows_of(store), LabelledReplies(512, 4096))
    shared = share_prefixes(alone)
    assert pairs(shared) == pairs(alone)
    assert_counted(shared)
    assert len(shared) == 1


class TestPreferences:
    @pytest.fixture(scope="class")
    def store(self, store_of):
        return store_of(preferences(120), kind=PREFERENCES)

    @pytest.mark.parametrize(("max_length", "capacity"), [(512, 4096), (96, 256)])
    @pytest.mark.parametrize("weight", ["pair", "prompt"])
    def test_pairs_are_those_of_the_groups_alone(self, store, weight, max_length, capacity):
        alone = chunk([store], rows_of(store), PreferencePairs("all", weight, max_length, capacity))
        shared = share_prefixes(alone)

        assert pairs(shared) == pairs(alone)
        assert_counted(shared)
        assert shared.sizes.sum() < 0.8 * alone.sizes.sum()
        assert shared.replies.sum() < alone.replies.sum(), "replies are shared too"
        assert shared.tokens_if_unpacked.sum() == alone.tokens_if_unpacked.sum()
        assert {float(w) for tree in trees_of(shared) for w in tree.weights} == {0, 1}

    def test_log_probs_are_those_of_the_groups_alone(self, store, tokenizer, lively):
        model = TargetLogProbs(lively(tokenizer.padded_size, 512), len(tokenizer), "segments").double()
        alone = chunk([store], rows_of(store)[:30], PreferencePairs("all", "pair", 256, 1024))
        found = []
        for chunks in (alone, share_prefixes(alone)):
            by_reply = {}
            for tree in trees_of(chunks):
                replies = np.flatnonzero(tree.weights).tolist()
                log_probs = model(build_stream([tree], len(tree.tokens), tree.num_supervised)).detach()
                sizes = (tree.lengths[replies] - 1).tolist()
                by_reply |= {
                    ids_to(tree, n): part.sum() for n, part in zip(replies, log_probs.split(sizes), strict=True)
                }
            found.append(by_reply)
        assert found[0].keys() == found[1].keys()
        assert all(torch.isclose(found[0][reply], found[1][reply], rtol=1e-12) for reply in found[0])


class TestHeldOut:
    @pytest.fixture
    def load(self, tokenizer, cache, write, tmp_path):
        def load(records, **settings):
            file = write(tmp_path / "flat.jsonl", records)
            return load_corpora(DataSettings(train=(str(file),), cache=str(cache), **settings), tokenizer)

        return load

    @staticmethod
    def first_turns(corpus):
        store = corpus.stores[0]
        found = set()
        for _, row in corpus.rows.tolist():
            tree = store.tree(row, 0)
            found.add(ids_to(tree, 0) if tree.roles[0] else ids_to(tree, 1)[1:])
        return found

    def test_no_first_turn_is_on_both_sides(self, load):
        """A system turn is: it is no conversation."""
        train, held_out = load(conversations(200), eval_fraction=0.2, share_prefixes=True)
        assert len(held_out.rows) > 5
        assert not self.first_turns(train) & self.first_turns(held_out)
        train, held_out = load(conversations(200), eval_fraction=0.2)
        assert self.first_turns(train) & self.first_turns(held_out), "without it they are"

    def test_the_same_ones_whatever_else_is_there(self, load):
        records = conversations(200)
        _, all = load(records, eval_fraction=0.2, share_prefixes=True)
        _, half = load(records[::-2], eval_fraction=0.2, share_prefixes=True)
        assert self.first_turns(half) <= self.first_turns(all)

    def test_conversations_that_all_open_alike_cannot_be_split(self, load):
        turns = [{"role": "user", "content": "Tea?"}]
        records = [{"messages": [*turns, {"role": "assistant", "content": f"Yes, {n}."}]} for n in range(30)]
        with pytest.raises(SettingsError, match="share_prefixes"):
            load(records, eval_fraction=0.1, share_prefixes=True)
