"""Chunks of stored trees hold all that fits, each message supervised once, and what does not fit is counted."""

import json

import numpy as np
import pytest

from gpt2ft.data.chunks import ConversationTrees, chunk
from gpt2ft.data.plan import Plan
from gpt2ft.data.reading import DataError
from gpt2ft.data.store import open_store
from gpt2ft.data.token_tree import ASSISTANT, fit_context, split, weigh
from gpt2ft.settings.sections import FilterSettings


@pytest.fixture(scope="module")
def store(tokenizer, cache):
    return open_store("quickstart", FilterSettings(), tokenizer, cache)


@pytest.fixture(scope="module")
def texts(tokenizer, cache, write, tmp_path_factory):
    """Ten plain texts of 1 to 400 words."""
    rows = [{"text": " ".join(["tea"] * (1 + number * number * 5))} for number in range(10)]
    file = write(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)
    return open_store(str(file), FilterSettings(), tokenizer, cache)


def rows_of(*stores):
    return np.array([(number, row) for number, store in enumerate(stores) for row in range(len(store))])


def test_what_fits_stays_in_the_store(store):
    chunks = chunk([store], rows_of(store), ConversationTrees("once", max_length=512, capacity=1024))
    assert np.array_equal(chunks.rows, rows_of(store))
    assert not chunks.is_cut.any()
    assert not chunks.left_out
    assert not chunks.repeated.any()
    for index, (size, scored) in enumerate(zip(chunks.sizes, chunks.supervised, strict=True)):
        tree = chunks.tree(index)
        assert (len(tree.tokens), tree.num_supervised) == (size, scored)
    assert chunks.sizes.sum() == store.sizes()[0].sum()


def test_a_large_tree_of_short_paths_stays_there_too(store):
    trees = [store.tree(row, 0) for row in range(len(store))]
    longest = max(int((tree.depths + tree.lengths).max()) for tree in trees)
    assert longest < store.sizes()[0].max()
    assert not chunk([store], rows_of(store), ConversationTrees("once", longest, 4096)).is_cut.any()
    assert chunk([store], rows_of(store), ConversationTrees("once", longest - 1, 4096)).is_cut.any()


@pytest.mark.parametrize("weight", ["once", "leaves"])
@pytest.mark.parametrize(
    ("max_length", "capacity"), [(64, 64), (64, 128), (128, 128), (64, 512), (20, 4096), (512, 512)]
)
def test_the_same_as_one_tree_after_the_other(store, texts, weight, max_length, capacity, monkeypatch):
    """Of two sources out of order, some of whose trees are taken twice."""
    rows = rows_of(store, texts)
    rows = np.random.default_rng(0).permutation(np.concatenate([rows, rows[::3]]))
    chunks = chunk([store, texts], rows, ConversationTrees(weight, max_length, capacity))
    expected, left_out, repeated = [], 0, 0
    for number, row in rows.tolist():
        whole = weigh([store, texts][number].tree(row, group=number), weight)
        fitting, _ = fit_context(whole, max_length)
        parts = [part for tree in fitting for part in split(tree, capacity)]
        expected += [((number, row), part) for part in parts]
        lengths = {m: n for part in parts for m, n in zip(part.messages.tolist(), part.lengths.tolist(), strict=True)}
        left_out += len(whole.lengths) - len(lengths)
        tokens = sum(len(part.tokens) for part in parts)
        repeated += len(parts) - 1 if number else tokens - sum(lengths.values())
    assert len(chunks) == len(expected)
    monkeypatch.setattr(ConversationTrees, "cut", lambda *_: pytest.fail("a part is made without the others"))
    for index, (row, part) in enumerate(expected):
        tree = chunks.tree(index)
        assert tuple(chunks.rows[index].tolist()) == row
        assert (chunks.sizes[index], chunks.supervised[index]) == (len(part.tokens), part.num_supervised)
        assert all(
            np.array_equal(getattr(tree, name), getattr(part, name))
            for name in ("tokens", "lengths", "parents", "roles", "weights", "groups", "messages")
        )
    assert (chunks.left_out.total(), chunks.repeated.sum()) == (left_out, repeated)
    assert chunks.is_cut.any() == (max_length < 512)
    assert bool(left_out) == (max_length < 48)


@pytest.mark.parametrize(("max_length", "capacity"), [(64, 64), (64, 128), (128, 128), (48, 512)])
def test_every_reply_is_supervised_once_or_counted(store, max_length, capacity):
    chunks = chunk([store], rows_of(store), ConversationTrees("once", max_length, capacity))
    assert chunks.is_cut.any()
    assert chunks.repeated.any() or capacity == 512
    replies = 0
    unique, total = set(), 0
    for index, (size, scored) in enumerate(zip(chunks.sizes, chunks.supervised, strict=True)):
        tree = chunks.tree(index)
        assert len(tree.tokens) == size <= capacity
        assert tree.num_supervised == scored > 0
        assert ((tree.depths + tree.lengths)[tree.weights > 0] <= max_length).all()
        replies += int((tree.weights > 0).sum())
        unique |= {(int(chunks.rows[index, 1]), message) for message in tree.messages.tolist()}
        total += len(tree.tokens)
    in_store = [store.tree(row, 0) for row in range(len(store))]
    lost = sum(len(tree.roles) for tree in in_store) - len(unique)
    assert chunks.left_out.total() == lost
    assert replies >= sum(int((tree.roles == ASSISTANT).sum()) for tree in in_store) - lost
    kept = sum(int(in_store[row].lengths[message]) for row, message in unique)
    assert total - chunks.repeated.sum() == kept


def test_a_text_longer_than_the_context_is_a_target_once_token_by_token(texts, tokenizer):
    chunks = chunk([texts], rows_of(texts), ConversationTrees("once", max_length=32, capacity=64))
    assert len(chunks) > len(texts)
    assert (chunks.sizes <= 32).all()
    assert chunks.supervised.sum() == (texts.sizes()[0] - 1).sum()
    assert chunks.repeated.sum() == len(chunks) - len(texts) > 10
    supervised = {row: [] for row in range(len(texts))}
    for index, (_, row) in enumerate(chunks.rows.tolist()):
        opening, *targets = chunks.tree(index).tokens.tolist()
        assert opening == tokenizer.end_of_text_id
        supervised[row] += targets
    assert supervised == {row: texts.tree(row, 0).tokens[1:].tolist() for row in range(len(texts))}
    plan = Plan(chunks, 64, micro_batches_per_step=4, seed=0)
    streams = [plan.stream(bin) for bin in plan.streams]
    assert sum(stream.num_repeated for stream in streams) == len(chunks) - len(texts)
    assert sum(stream.num_supervised for stream in streams) == chunks.supervised.sum()


def test_the_group_is_the_number_of_the_source(store):
    chunks = chunk([store, store], np.array([(1, 0), (0, 0)]), ConversationTrees("once", 128, 128))
    groups = {number: set(chunks.tree(index).groups.tolist()) for index, (number, _) in enumerate(chunks.rows.tolist())}
    assert groups == {1: {1}, 0: {0}}


def test_nothing_that_fits_is_refused(store):
    with pytest.raises(DataError, match=r"`data.max_length` = 3 .* messages that do not fit the context [\d,]+"):
        chunk([store], rows_of(store), ConversationTrees("once", 3, 128))


@pytest.mark.parametrize("turns", [40, 100, 400, 1000])
def test_a_conversation_of_any_length_costs_less_than_twice_its_tokens(turns, tokenizer, cache, write, tmp_path):
    """And what a stream repeats of it is known."""
    roles, words = ("user", "assistant"), ("I would like some tea", "There is always time for another cup of tea")
    record = {"messages": [{"role": roles[turn % 2], "content": f"{words[turn % 2]} {turn}"} for turn in range(turns)]}
    file = write(tmp_path / "long.jsonl", [record])
    store = open_store(str(file), FilterSettings(), tokenizer, cache)
    (tokens,), (supervised,) = store.sizes()
    chunks = chunk([store], rows_of(store), ConversationTrees("once", max_length=256, capacity=512))
    assert tokens > 256
    assert len(chunks) > 1
    assert chunks.supervised.sum() == supervised
    assert chunks.sizes.sum() - chunks.repeated.sum() == tokens
    assert chunks.sizes.sum() < 2 * tokens
    plan = Plan(chunks, 512, micro_batches_per_step=1, seed=0)
    streams = [plan.stream(bin) for bin in plan.streams]
    assert sum(stream.num_tokens - stream.num_repeated for stream in streams) == tokens
    assert plan.repeated == chunks.repeated.sum() > 0.2 * tokens


def test_masked_replies_of_a_long_conversation_are_context_in_every_window(tokenizer, tmp_path):
    turns = []
    for number in range(40):
        turns.append({"role": "user", "content": f"How about tea number {number}?"})
        turns.append({"role": "assistant", "content": f"Number {number} is good.", "loss": number % 3 > 0})
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": turns}))
    store = open_store(str(tmp_path / "t.jsonl"), FilterSettings(), tokenizer, tmp_path)
    chunks = chunk([store], rows_of(store), ConversationTrees("once", 128, 256))
    trees = [chunks.tree(index) for index in range(len(chunks))]
    supervised = [message for tree in trees for message in tree.messages[tree.weights > 0].tolist()]
    assert sorted(supervised) == [2 * number + 1 for number in range(40) if number % 3]
    assert len(trees) > 5
    assert any((tree.weights[tree.roles == ASSISTANT] == 0).any() for tree in trees)
