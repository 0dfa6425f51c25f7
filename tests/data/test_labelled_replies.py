"""Labelled replies: how they are read, which unrelated reply stands beside each, and what is left of them once cut."""

from collections import Counter

import numpy as np
import pytest
from facts import tells

from gpt2ft.data.chunks import chunk
from gpt2ft.data.kinds import CONVERSATIONS, LABELLED
from gpt2ft.data.labelled_replies import LabelledReplies, _other_rows
from gpt2ft.data.reading import DataError
from gpt2ft.data.store import open_store
from gpt2ft.data.token_tree import counts
from gpt2ft.settings.sections import FilterSettings

PLENTY = 1 << 20
ASKED = {"role": "user", "content": "What is tea?"}
TOLD = {"role": "assistant", "content": "A hot drink."}
PAIR = {"prompt": "What is tea?", "completion": "A hot drink."}


def replies_of(trees):
    """(text of the reply, its label) of each tree, whose prompt is unlabelled."""
    assert all(message.label is None for tree in trees for message in tree.messages[:-1])
    return [(tree.messages[-1].text, tree.messages[-1].label) for tree in trees]


# --- records --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad"),
    [(True, False), (1, 0), (1.0, 0.0), ("True", "0")],
    ids=["bools", "ints", "floats", "text"],
)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        {"prompt": [ASKED], "completion": [TOLD]},
        {"messages": [ASKED, TOLD]},
        {"conversations": [{"from": "human", "value": "What is tea?"}, {"from": "gpt", "value": "A hot drink."}]},
        {"instruction": "What is tea?", "input": "", "output": "A hot drink."},
    ],
    ids=lambda record: " ".join(record),
)
def test_records_with_a_label(record, key, good, bad, read):
    trees, context = read([record | {key: good}, record | {key: bad}], LABELLED)
    assert replies_of(trees) == [("A hot drink.", True), ("A hot drink.", False)]
    assert trees[0].id == trees[1].id  # both are of one prompt, and held out together
    assert not +context.dropped


@pytest.mark.parametrize("label", [None, "good", 2, -1, "", "0.5", [], 0.5], ids=repr)
def test_a_label_that_is_none_is_refused(label, read):
    with pytest.raises(DataError) as raised:
        read([PAIR | {"label": True}, PAIR | {"label": label}], LABELLED)
    assert tells(str(raised.value), "test.jsonl:2 ... `label`")
    trees, context = read([PAIR | {"label": True}, PAIR | {"label": label}], LABELLED, on_error="skip")
    assert len(trees) == context.refused_records() == 1


def test_labels_that_disagree_are_refused(read):
    with pytest.raises(DataError) as raised:
        read([PAIR | {"label": True, "kto_tag": False}], LABELLED)
    assert tells(str(raised.value), "`label` ... `kto_tag`")


def test_a_label_is_never_that_of_another_reply(read):
    """An empty reply is dropped, and what stands above it was not labelled."""
    longer = [ASKED, TOLD, {"role": "user", "content": "And cold?"}]
    for last in ({"role": "assistant", "content": " "}, {"role": "user", "content": "Hm?"}):
        trees, context = read([{"messages": [*longer, last], "label": False}], LABELLED)
        assert trees == []
        assert context.dropped["does not end in a reply"] == 2
    (tree,), _ = read([{"messages": [*longer, {"role": "assistant", "content": "Iced."}], "label": False}], LABELLED)
    assert [message.label for message in tree.messages] == [None, None, None, False]


def test_what_stands_beside_a_label_is_refused_as_anywhere(read):
    with pytest.raises(DataError) as raised:
        read([PAIR | {"label": True, "tools": "[...]"}], LABELLED)
    assert tells(str(raised.value), "`tools`")


def test_fine_tuning_still_refuses_what_is_bad(read):
    with pytest.raises(DataError) as raised:
        read([PAIR | {"label": False}], CONVERSATIONS)
    assert tells(str(raised.value), "test.jsonl:1 ... `label` ... kto")
    trees, _ = read([PAIR | {"label": True}], CONVERSATIONS)
    assert len(trees) == 1


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_store(write, tokenizer, cache, tmp_path_factory):
    """make_store(records): the store of a file of them."""

    def make(records):
        file = write(tmp_path_factory.mktemp("labelled") / "rows.jsonl", records)
        return open_store(str(file), FilterSettings(), tokenizer, cache, kind=LABELLED)

    return make


@pytest.fixture(scope="module")
def labelled(make_store):
    """60 conversations of one or two exchanges, of all lengths."""
    random = np.random.default_rng(0)

    def text(most):
        return " ".join(random.choice(["tea", "rain", "cup", "warm"], int(random.integers(1, most))).tolist())

    def record(number):
        turns = [{"role": "user", "content": f"{number} {text(20)}"}, {"role": "assistant", "content": text(50)}]
        later = [{"role": "user", "content": text(20)}, {"role": "assistant", "content": text(50)}]
        return {"messages": turns + (later if number % 2 else []), "label": bool(number % 3)}

    return make_store([record(number) for number in range(60)])


@pytest.fixture(params=["labelled", "ranked"])
def store(request, cache):
    if request.param == "labelled":
        return request.getfixturevalue("labelled")
    return open_store("quickstart", FilterSettings(), request.getfixturevalue("tokenizer"), cache, kind=LABELLED)


def rows_of(store):
    return np.array([(0, row) for row in range(len(store))])


def tokens_of(tree, node):
    return tree.tokens[tree.starts[node] :][: tree.lengths[node]].tolist()


def test_of_ranked_replies_the_best_and_the_worst_are_labelled(make_store):
    def tree(number, ranks):
        ranked = enumerate(ranks)
        replies = [{"message_id": f"{number}-{i}", "role": "assistant", "text": f"{i}", "rank": r} for i, r in ranked]
        prompt = {"message_id": f"{number}", "role": "prompter", "text": f"ask {number}", "replies": replies}
        return {"message_tree_id": f"{number}", "prompt": prompt}

    store = make_store([tree(1, [2, 0, 1, 2]), tree(2, [0]), tree(3, [0, 1])])
    signs = [LabelledReplies(PLENTY, PLENTY).whole(store, row, 0).pair_weights.tolist() for row in range(len(store))]
    assert sorted(signs) == sorted([[1.0, -1.0, -1.0], [1.0, -1.0]])
    assert store.statistics.dropped == {"neither best nor worst": 1, "nothing to compare it with": 1, "in no pair": 1}
    assert store.statistics.kept + sum(store.statistics.dropped.values()) == store.statistics.read


@pytest.mark.parametrize(("max_length", "capacity"), [(PLENTY, PLENTY), (96, PLENTY), (48, 96)])
def test_rows_are_counted_as_they_are_built(max_length, capacity, store):
    rule = LabelledReplies(max_length, capacity)
    counted, fits = rule.count(store)
    for row in range(len(store)):
        tree = rule.whole(store, row, 0)
        assert tuple(counted[row]) == counts(tree)
        assert fits[row] == ((tree.depths + tree.lengths).max() <= max_length and len(tree.tokens) <= capacity)


def test_beside_each_prompt_stands_a_reply_to_another(store):
    rule, ends = LabelledReplies(PLENTY, PLENTY), set()
    trees = [store.tree(row, 0) for row in range(len(store))]
    known = {tuple(tokens_of(tree, node)) for tree in trees for node in range(len(tree.lengths))}
    others = Counter()
    for row in range(len(store)):
        tree, own = rule.whole(store, row, 7), store.tree(row, 7)
        (unrelated,) = set(tree.pairs[:, 1].tolist())
        assert unrelated == len(own.lengths) == len(tree.lengths) - 1
        assert np.array_equal(tree.tokens[: len(own.tokens)], own.tokens)
        assert tuple(tokens_of(tree, unrelated)) in known
        others[tuple(tokens_of(tree, unrelated))] += 1
        assert len(set(tree.parents[tree.pairs].ravel().tolist())) == 1
        labelled = tree.pairs[:, 0]
        assert tree.weights.nonzero()[0].tolist() == [*labelled.tolist(), unrelated]
        assert (tree.pair_weights > 0).tolist() == (store.ranks(row)[labelled] == 0).tolist()
        ends.update(tree.pair_weights.tolist())
    assert ends == {1.0, -1.0}
    assert len(others) > len(store) / 3


@pytest.mark.parametrize(("max_length", "capacity"), [(96, 512), (48, 96)])
def test_every_labelled_reply_is_in_one_chunk_or_counted(max_length, capacity, store):
    rule = LabelledReplies(max_length, capacity)
    chunks = chunk([store], rows_of(store), rule)
    assert chunks.is_cut.any()
    left_out = Counter()
    for row in range(len(store)):
        tree = rule.whole(store, row, 0)
        cut = rule.cut(tree, left_out)
        numbers = np.flatnonzero(chunks.rows[:, 1] == row).tolist()
        assert len(numbers) == len(cut)
        for number, expected in zip(numbers, cut, strict=True):
            found = chunks.tree(number)
            assert found.tokens.tolist() == expected.tokens.tolist()
            assert found.pair_weights.tolist() == expected.pair_weights.tolist()
            assert (found.depths + found.lengths).max() <= max_length
            assert len(found.tokens) <= capacity
    assert chunks.left_out == +left_out


def test_a_reply_to_the_same_prompt_is_not_unrelated(make_store):
    """Where a prompt has a record for each of its replies."""
    records = [{"prompt": "Tea?", "completion": f"Yes, {n}.", "label": n > 3} for n in range(9)]
    store = make_store([*records, {"prompt": "Rain?", "completion": "No.", "label": False}])
    for row in range(len(store)):
        other = int(_other_rows(store)[row])
        assert tokens_of(store.tree(other, 0), 0) != tokens_of(store.tree(row, 0), 0)


def test_labels_on_which_people_disagree_are_both_learnt(make_store):
    """As when several have judged one reply; what says the same twice counts once."""
    said = [(PAIR, True), (PAIR, False), (PAIR, True), ({**PAIR, "prompt": "And rain?"}, True)]
    store = make_store([record | {"label": label} for record, label in said])
    assert len(set(store.keys().tolist())) == 3
    assert len(set(store.conversations().tolist())) == 2


@pytest.mark.parametrize("replies", [1, 2])
def test_one_prompt_is_too_few(replies, make_store):
    store = make_store([PAIR | {"label": True}, {**PAIR, "completion": "Another.", "label": True}][:replies])
    with pytest.raises(DataError) as raised:
        chunk([store], rows_of(store), LabelledReplies(PLENTY, PLENTY))
    assert tells(str(raised.value), "`dpo.loss` ... kto")
