"""A source gives the same trees whatever file they come in, and a sentence to act on where it cannot."""

import json
import random

import pytest
from facts import tells

from gpt2ft.data.hub_source import SOURCES
from gpt2ft.data.reading import Totals
from gpt2ft.data.sources import open_source

MESSAGES = "oasst/oasst1_en_validation.messages.jsonl"
TREES = "oasst/en_100_tree.jsonl"
ROWS = [
    {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Tea?", "lang": "en", "rank": None},
    {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "Thé — 茶.", "lang": "en", "rank": 1},
    {"message_id": "c", "parent_id": "a", "role": "assistant", "text": "Two\u2028lines.", "lang": "en", "rank": 0},
]
KINDS = ["t.jsonl", "t.jsonl.gz", "array.json", "lines.json", "t.parquet", "t.arrow"]


@pytest.fixture(scope="module")
def records(test_data):
    """records(name): of a real file."""
    return lambda name: [json.loads(line) for line in test_data(name).read_bytes().splitlines()]


def flatten(trees):
    """The same messages as flat rows; roots stay in order."""
    waiting = [(tree["message_tree_id"], tree["prompt"]) for tree in trees]
    for tree_id, message in waiting:
        yield {**message, "message_tree_id": tree_id, "replies": None}
        waiting += [(tree_id, reply) for reply in message["replies"]]


def messages_of(trees):
    return {tree.id: tree.messages for tree in trees}


# --- real data ------------------------------------------------------------------------------------------------------


def test_one_hundred_english_trees(read, test_data):
    trees, context = read(test_data(TREES), reviewed_only=False)
    messages = [message for tree in trees for message in tree.messages]
    assert (len(trees), len(messages), +context.dropped) == (100, 1167, {})
    assert sum(message.rank is not None for message in messages) == 641
    assert context.totals == Totals(trees=100, messages=1167)
    assert {tree.source for tree in trees} == {"en_100_tree"}


def test_the_best_replies_of_one_hundred_trees(read, test_data):
    trees, context = read(test_data(TREES), max_rank=0)
    replies = [message for tree in trees for message in tree.messages if message.role == "assistant"]
    assert {message.rank for message in replies} == {0, None}
    assert set(context.dropped) == {"rank above limit", "below a dropped message"}


def test_the_validation_messages(read, test_data):
    trees, context = read(test_data(MESSAGES), reviewed_only=False)
    assert context.totals == Totals(trees=188, messages=2022)
    assert +context.dropped == {"deleted": 40, "orphan": 3}
    assert (len(trees), sum(len(tree.messages) for tree in trees)) == (188, 1979)
    trees, context = read(test_data(MESSAGES), languages=("en",))
    # 53 were rejected: 7 are deleted too, 3 are the orphans
    assert +context.dropped == {"deleted": 40, "not reviewed": 46}
    assert (len(trees), sum(len(tree.messages) for tree in trees)) == (188, 1936)
    assert read(test_data(MESSAGES), languages=("de",))[0] == []


@pytest.mark.parametrize("kind", KINDS)
def test_real_messages_are_the_same_in_any_file_and_any_order(kind, read, write, records, test_data, tmp_path):
    rows = records(MESSAGES)
    expected = read(test_data(MESSAGES))[0]
    assert len(expected) == 188
    assert [tree.messages for tree in read(write(tmp_path / kind, rows))[0]] == [tree.messages for tree in expected]
    shuffled = write(tmp_path / kind, random.Random(0).sample(rows, len(rows)))
    assert messages_of(read(shuffled)[0]) == messages_of(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_real_trees_are_the_same_nested_and_flat(kind, read, write, records, test_data, tmp_path):
    nested = records(TREES)[:20]
    expected = read(test_data(TREES), reviewed_only=False)[0][:20]
    for layout in (nested, list(flatten(nested))):
        trees, context = read(write(tmp_path / kind, layout), reviewed_only=False)
        assert [(tree.id, tree.messages) for tree in trees] == [(tree.id, tree.messages) for tree in expected]
        assert not +context.dropped


def test_real_texts(read, test_data):
    trees, context = read(test_data("text/oasst1_en_train_texts.jsonl.gz"))
    assert len(trees) + context.dropped["empty"] == context.totals.trees == 39_283
    assert {tree.messages[0].role for tree in trees} == {"text"}
    assert {len(tree.messages) for tree in trees} == {1}


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "T.JSONL"])
def test_every_kind_of_file_gives_the_same_messages(kind, read, write, tmp_path):
    (tree,), _ = read(write(tmp_path / kind, ROWS))
    assert [message.text for message in tree.messages] == ["Tea?", "Two\u2028lines.", "Thé — 茶."]
    assert tree.source == kind.partition(".")[0]


class TestFolder:
    def test_its_files_in_the_order_of_their_names(self, read, write, tmp_path):
        names = ["c.jsonl.gz", "a.parquet", "b/inner.jsonl", "b.json", "d.txt", ".e.jsonl", "lines.json"]
        for name in names:
            write(tmp_path / "tea" / name, [{"text": f"From {name}."}])
        trees, _ = read(tmp_path / "tea")
        assert [tree.messages[0].text for tree in trees] == [
            "From a.parquet.", "From b/inner.jsonl.", "From b.json.", "From c.jsonl.gz.", "From lines.json.",
        ]  # fmt: skip
        assert {tree.source for tree in trees} == {"tea"}

    def test_messages_of_one_tree_may_lie_in_several_files(self, read, write, tmp_path):
        for row in ROWS:
            write(tmp_path / f"{row['message_id']}.jsonl", [row])
        (tree,), _ = read(tmp_path)
        assert len(tree.messages) == 3

    def test_a_file_of_another_format_is_refused_by_its_place(self, error, drops, write, tmp_path):
        write(tmp_path / "a.jsonl", [{"text": "Tea."}] * 2)
        write(tmp_path / "b.parquet", [{"prompt": "Tea?", "completion": "Yes."}] * 3)
        assert tells(error(tmp_path), f'{tmp_path}/b.parquet: row 1: ... plain `text` ... "prompt", "completion"')
        assert drops(tmp_path, on_error="skip") == {"another layout": 3}

    def test_as_save_to_disk_leaves_it(self, read, error, tmp_path):
        """With its metadata, and with what a later `map` has cached beside the tables."""
        import datasets

        rows = datasets.Dataset.from_list([{"prompt": f"Tea {number}?", "completion": "Yes."} for number in range(5)])
        rows.save_to_disk(tmp_path / "saved", num_shards=2)
        loaded = datasets.load_from_disk(tmp_path / "saved")
        loaded.map(lambda row: {"completion": "No."})
        assert list((tmp_path / "saved").glob("cache-*.arrow"))
        trees, context = read(tmp_path / "saved")
        assert [tree.messages[0].text for tree in trees] == [f"Tea {number}?" for number in range(5)]
        assert {tree.messages[1].text for tree in trees} == {"Yes."}
        assert not +context.dropped
        datasets.DatasetDict(train=rows, test=rows.select([4])).save_to_disk(tmp_path / "splits")
        assert tells(error(tmp_path / "splits"), f"{tmp_path}/splits: ... one split ... test, train")
        assert [len(read(tmp_path / "splits" / split)[0]) for split in ("train", "test")] == [5, 1]
        (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
        assert tells(error(tmp_path / "saved"), f"{tmp_path}/saved/data-00001-of-00002.arrow: ... missing")

    def test_a_clone_of_a_data_set_on_the_hub(self, read, write, tmp_path):
        write(tmp_path / "data" / "train-00000-of-00001.parquet", [{"text": "Tea."}])
        (tmp_path / "dataset_infos.json").write_text(json.dumps({"default": {"description": ""}}, indent=2))
        for name in ("dataset_info.json", ".gitattributes", ".git/x.json", ".cache/huggingface/download/x.json"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}")
        (tmp_path / "README.md").write_text("no data")
        (tmp_path / "state.json").write_text('{"step": 1}')
        trees, context = read(tmp_path)
        assert [tree.messages[0].text for tree in trees] == ["Tea."]
        assert not +context.dropped

    @pytest.mark.parametrize(
        "names",
        [
            "train-00000-of-00001.parquet test-00000-of-00001.parquet",
            "a/train.jsonl a/dev.jsonl",
            "Train.jsonl Test.jsonl",
            "train/a.jsonl test/a.jsonl",
            "Train/en/a.jsonl validation/en/a.jsonl",
        ],
    )
    def test_of_several_splits_it_is_refused(self, names, read, error, write, tmp_path):
        """Else what is meant for a test would be trained on."""
        _, test = (write(tmp_path / "all" / name, [{"text": "Tea."}]) for name in names.split())
        assert tells(error(tmp_path / "all"), f"{tmp_path}/all: ... one split ... train")
        test.rename(tmp_path / "all" / f"training-data{test.suffix}")
        assert len(read(tmp_path / "all")[0]) == 2

    def test_without_data_it_is_refused(self, error, tmp_path):
        (tmp_path / "t.docx").write_text("Tea.")
        assert tells(error(tmp_path), f"{str(tmp_path)!r} ... .jsonl, .json, .csv ... .parquet ... none")


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("name", KINDS)
def test_an_empty_file_is_always_an_error(name, on_error, error, write, tmp_path):
    file = write(tmp_path / name, [])
    assert tells(error(file, on_error=on_error), f"{file}: ... holds none")


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_file_in_which_nothing_can_be_read_says_why(on_error, error, tmp_path):
    """One object over many lines, as an editor leaves it."""
    (tmp_path / "t.json").write_text(json.dumps({"messages": [{"role": "user"}]}, indent=2))
    problem = error(tmp_path / "t.json", on_error=on_error)
    assert tells(problem, f"{tmp_path}/t.json:1: ... JSON object ... Expecting property name ... column 1")
    (tmp_path / "t.jsonl").write_text('{"question": "Tea?"}\n')
    problem = error(tmp_path / "t.jsonl", on_error=on_error)
    assert tells(problem, f"{tmp_path}/t.jsonl: ... {tmp_path}/t.jsonl:1 ... question ... `question`")


def test_the_format_is_that_of_the_first_record_that_has_one(error, drops, tmp_path):
    (tmp_path / "t.jsonl").write_text('\nbroken\n{"a": 1}\n{"text": "Tea."}\n{"messages": []}\n')
    assert tells(error(tmp_path / "t.jsonl"), f"{tmp_path}/t.jsonl:2: ... JSON object")
    assert drops(tmp_path / "t.jsonl", on_error="skip") == {"malformed line": 1, "another layout": 2}
    assert open_source(str(tmp_path / "t.jsonl")).format.name == "plain `text`"


def test_digests(write, tmp_path):
    def digest(name):
        return open_source(str(name)).origin.digest()

    file = write(tmp_path / "one" / "t.jsonl", ROWS)
    before = digest(file)
    assert digest(file.parent) == digest(write(tmp_path / "other.jsonl", ROWS)) == before
    write(file, ROWS[:2])
    names = [*SOURCES, "oasst1:validation", "smoltalk:test", file, write(tmp_path / "one" / "u.jsonl", ROWS).parent]
    digests = [before, *map(digest, names)]
    assert len(set(digests)) == len(digests)
    assert {len(one) for one in digests} == {64}
    assert digest("oasst1:train") == digest("oasst1")
