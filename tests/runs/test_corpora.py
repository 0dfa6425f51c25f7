"""What is trained on and what is held out: whole conversations, each once, none in both."""

import json

import pytest

from gpt2ft import quickstart
from gpt2ft.data.oasst import DataError
from gpt2ft.runs.assemble import load_corpora
from gpt2ft.settings import DataSettings, SettingsError


@pytest.fixture
def load(tokenizer, cache):
    return lambda **settings: load_corpora(DataSettings(cache=str(cache), **settings), tokenizer)


def ids(corpus):
    return [corpus.stores[store].key(row)[0] for store, row in corpus.rows]


def write(file, ids, question="Tea?", reply="Yes."):
    """A file of small conversations; an id alone does not make a conversation the same one."""
    with open(file, "w", encoding="utf-8") as lines:
        for id in ids:
            replies = [{"message_id": f"{id}-reply", "text": reply, "role": "assistant"}]
            prompt = {"message_id": id, "text": f"{question} {id}", "role": "prompter", "replies": replies}
            lines.write(json.dumps({"message_tree_id": id, "prompt": prompt}) + "\n")
    return str(file)


def test_everything_is_trained_on_by_default(load):
    corpus, held_out = load(train=("quickstart",))
    assert held_out is None
    assert corpus.rows == [(0, row) for row in range(len(corpus.stores[0]))]
    assert not corpus.dropped
    assert corpus.identity() == {"quickstart": corpus.stores[0].digest, "conversations": 150}


def test_the_quickstarts_held_out_set_is_held_out(load):
    corpus, held_out = load(train=("quickstart",), eval=("quickstart:held_out",))
    assert len(held_out.rows) > 10
    assert not held_out.dropped
    assert not set(ids(corpus)) & set(ids(held_out))
    assert not corpus.dropped


class TestFraction:
    def test_whole_trees_none_in_both(self, load):
        whole, _ = load(train=("quickstart",))
        corpus, held_out = load(train=("quickstart",), eval_fraction=0.2)
        assert sorted(corpus.rows + held_out.rows) == whole.rows
        assert len(set(ids(whole))) == len(whole.rows)
        assert 0.1 < len(held_out.rows) / len(whole.rows) < 0.3

    def test_the_same_in_every_run_and_file(self, load, tmp_path):
        _, held_out = load(train=("quickstart",), eval_fraction=0.2)
        _, again = load(train=("quickstart",), eval_fraction=0.2)
        assert held_out.rows == again.rows
        lines = quickstart.TREES.read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "other.jsonl").write_text("".join(lines[::-1][:100]), encoding="utf-8")
        train, some = load(train=(str(tmp_path / "other.jsonl"),), eval_fraction=0.2)
        assert set(ids(some)) == set(ids(held_out)) & {*ids(train), *ids(some)} != set()

    def test_a_larger_fraction_holds_out_more_and_the_same(self, load):
        fifth, half = (set(ids(load(train=("quickstart",), eval_fraction=share)[1])) for share in (0.2, 0.5))
        assert fifth < half

    def test_a_file_given_twice_is_still_split_by_conversation(self, load, tmp_path):
        corpus, held_out = load(train=("quickstart", str(quickstart.TREES)), eval_fraction=0.2)
        assert len(set(ids(corpus)) | set(ids(held_out))) == len(corpus.rows) + len(held_out.rows) == 150
        assert sum(corpus.dropped.values()) == 150

    def test_nothing_held_out_is_refused(self, load):
        with pytest.raises(SettingsError, match=r"`data\.eval_fraction` = 1e-06 holds no conversation out: raise it"):
            load(train=("quickstart",), eval_fraction=1e-6)

    def test_nothing_left_to_train_on_is_refused(self, load, tmp_path):
        with pytest.raises(DataError, match="no conversation is left to train on: all of them are held out"):
            load(train=(write(tmp_path / "a.jsonl", ["x"]),), eval_fraction=0.999)


class TestOverlap:
    def test_a_held_out_conversation_is_dropped_from_training_and_counted(self, load, tmp_path):
        train = write(tmp_path / "train.jsonl", ["a", "b", "c", "d"])
        held = write(tmp_path / "held.jsonl", ["c", "e", "a"])
        corpus, held_out = load(train=(train,), eval=(held,))
        assert ids(corpus) == ["b", "d"]
        assert sorted(ids(held_out)) == ["a", "c", "e"]
        assert corpus.dropped == {"conversations met before or held out": 2}
        assert not held_out.dropped

    def test_the_same_file_for_both_leaves_nothing(self, load):
        with pytest.raises(DataError, match="no conversation is left to train on"):
            load(train=("quickstart",), eval=(str(quickstart.TREES),))

    def test_the_same_file_twice_counts_once(self, load, tmp_path):
        train = write(tmp_path / "train.jsonl", ["a", "b"])
        held = write(tmp_path / "held.jsonl", ["e"])
        corpus, held_out = load(train=(train, train), eval=(held, held))
        assert corpus.rows == [(0, 0), (0, 1)]
        assert corpus.dropped == {"conversations met before or held out": 2}
        assert held_out.rows == [(0, 0)]
        assert held_out.dropped == {"conversations met before": 1}

    def test_another_conversation_under_the_same_id_stays(self, load, tmp_path):
        train = write(tmp_path / "train.jsonl", ["a", "b"])
        other = write(tmp_path / "other.jsonl", ["a"], question="Coffee?")
        corpus, _ = load(train=(train, other))
        assert ids(corpus) == ["a", "b", "a"]
        assert not corpus.dropped

    def test_the_same_tree_with_other_replies_is_the_same_conversation(self, load, tmp_path):
        train = write(tmp_path / "train.jsonl", ["a", "b"])
        held = write(tmp_path / "held.jsonl", ["b"], reply="No.")
        corpus, held_out = load(train=(train,), eval=(held,))
        assert ids(corpus) == ["a"]
        assert ids(held_out) == ["b"]


def test_a_source_that_is_not_there_is_refused(load):
    with pytest.raises(DataError, match="quickstrat"):
        load(train=("quickstrat",))
