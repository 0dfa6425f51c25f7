"""A source gives the same trees whatever file they come in, and a sentence to act on where it cannot."""

import json
import random
import socket
from pathlib import Path

import pytest
from facts import tells
from processes import run

from gpt2ft.conversation import Message
from gpt2ft.data import hub_source
from gpt2ft.data.blocks import stem
from gpt2ft.data.hub_source import SOURCES
from gpt2ft.data.reading import DataError, Totals
from gpt2ft.data.sources import BUNDLED, open_source, read_trees
from gpt2ft.settings.sections import FilterSettings

REPOSITORY = Path(__file__).parents[2]
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


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_answered_at_once_with_the_nearest_name(error, write, tmp_path):
    write(tmp_path / "trees.jsonl", ROWS)
    with pytest.raises(DataError) as raised:
        read_trees(str(tmp_path / "tree.jsonl"), FilterSettings())
    assert tells(str(raised.value), f"{str(tmp_path / 'tree.jsonl')!r} ... did you mean `{tmp_path / 'trees.jsonl'}`?")
    assert "did you mean `oasst1`?" in error("osst1")
    assert "did you mean `ultrachat`?" in error("ultrachat_200k")
    assert f"the names are {', '.join([*SOURCES, *BUNDLED])}" in error(tmp_path / "no" / "where.jsonl")


def test_other_files_are_refused(error, tmp_path):
    (tmp_path / "t.docx").write_text("a,b")
    assert tells(error(tmp_path / "t.docx"), "t.docx ... .jsonl, .json, .csv ... .parquet")


def test_unknown_splits_are_refused(error):
    assert tells(error("oasst1:test"), "'oasst1:test' ... train or validation ... 'test'")
    assert tells(error("ultrachat:train"), "'ultrachat:train' ... train_sft or test_sft ... 'train'")
    assert tells(error("quickstart:eval"), f"'quickstart:eval' ... {', '.join(BUNDLED)}")


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_sets_are_whole(name, read):
    trees, context = read(name)
    assert not +context.dropped
    assert len(trees) == context.totals.trees > 0
    assert {tree.source for tree in trees} == {name}


@pytest.mark.parametrize("name", ["t.jsonl", "T.JSONL", "t.jsonl.gz", "t.json", "t.parquet", "t.arrow"])
def test_a_file_is_called_by_its_name_alone(name):
    assert stem(Path("somewhere") / name).lower() == "t"


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


@pytest.mark.parametrize("name", SOURCES)
def test_hub_sources_are_pinned_to_a_commit(name):
    source = SOURCES[name]
    assert len(source.revision) == 40
    assert source.split in source.splits
    assert source.size is None
    assert source.place == f"{source.repo}@{source.revision[:8]} {source.split}"


# --- the hub, without network ---------------------------------------------------------------------------------------

READ = """
import json, sys
from gpt2ft.data.reading import DataError, ReadContext
from gpt2ft.settings.sections import FilterSettings
from gpt2ft.data.kinds import CONVERSATIONS, PREFERENCES
from gpt2ft.data.sources import open_source
def read(name, kind):
    try:
        source = open_source(name, PREFERENCES if kind == "preferences" else CONVERSATIONS)
        context = ReadContext(source.name, FilterSettings())
        return [str(tree) for shard in source.shards() for tree in shard.trees(context)]
    except DataError as error:
        return [f"DataError: {error}"]
print(json.dumps([read(*asked) for asked in json.loads(sys.argv[1])]))
"""
TURNS = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]
HUB_ROWS = {
    "oasst1": [{**row, "labels": {"name": ["spam"], "value": [0.0]}} for row in ROWS],
    "smoltalk": [{"messages": TURNS, "source": "smol-magpie-ultra"}],
    "smoltalk:test": [{"messages": TURNS, "source": "smol-magpie-ultra"}],
    "ultrachat": [{"prompt": "Tea?", "prompt_id": "0", "messages": TURNS}],
    "dolly": [{"instruction": "Tea?", "context": "", "response": "Yes.", "category": "open_qa"}],
}
OTHERS = [TURNS[0], {"role": "assistant", "content": "No."}]
COMPLETION = {"model": "a", "critique": "Well.", "annotations": {"honesty": {"Rating": "5"}}, "fine-grained_score": 4.0}
HUB_PREFERENCES = {
    "hh-rlhf": [{"chosen": "\n\nHuman: Tea?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Tea?\n\nAssistant: No."}],
    "hh-rlhf:test": [{"chosen": "\n\nHuman: Tea?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Tea?\n\nAssistant: No."}],
    "ultrafeedback": [
        {
            "source": "flan", "instruction": "Tea?", "models": ["a", "a"],
            "completions": [
                COMPLETION | {"response": text, "overall_score": score} for text, score in (("No.", 1.0), ("Yes.", 2.0))
            ],
            "correct_answers": ["None"], "incorrect_answers": ["None"],
        }
    ],
    "ultrafeedback-binarized:test_prefs": [
        {
            "prompt": "Tea?", "prompt_id": "0", "chosen": TURNS, "rejected": OTHERS, "messages": TURNS,
            "score_chosen": 8.0, "score_rejected": 7.0,
        }
    ],
}  # fmt: skip


def test_no_bar_is_drawn_into_a_log(monkeypatch):
    import datasets

    def fail(*_, **__):
        assert datasets.are_progress_bars_disabled()
        raise OSError("it was asked")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(hub_source, "rely_on_cache_unless_reachable", lambda: "")
    with pytest.raises(DataError, match="it was asked"):
        open_source("dolly").origin.blocks(())
    datasets.enable_progress_bars()


def read_offline(hugging_face_home, *asked, **environment):
    """{(name, kind): trees, or what the refusal says}, of one process: `datasets` looks for its cache when imported."""
    environment = {"HF_HOME": hugging_face_home, "HF_DATASETS_CACHE": None} | environment
    ended = run(["python", "-c", READ, json.dumps(asked)], **environment)
    assert "Retrying" not in ended.stderr
    return dict(zip(asked, json.loads(ended.stdout), strict=True))


def write_hub_cache(name, hugging_face_home, revision):
    """What `datasets` leaves behind after it has loaded a source at `revision`."""
    import datasets
    import pyarrow

    hub = open_source(name).origin
    owner, _, repository = hub.repo.partition("/")
    config = hub.config or "default"
    snake_case = datasets.naming.camelcase_to_snakecase(repository)
    folder = hugging_face_home / "datasets" / f"{owner}___{snake_case}" / config / "0.0.0" / revision
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "dataset_info.json"
    splits = json.loads(file.read_text())["splits"] if file.exists() else {}
    table = pyarrow.Table.from_pylist((HUB_ROWS | HUB_PREFERENCES)[name])
    with pyarrow.ipc.new_stream(str(folder / f"{snake_case}-{hub.split}.arrow"), table.schema) as stream:
        stream.write_table(table)
    information = {
        "builder_name": "parquet",
        "dataset_name": snake_case,
        "config_name": config,
        "version": {"version_str": "0.0.0"},
        "features": datasets.Features.from_arrow_schema(table.schema).to_dict(),
        "splits": splits | {hub.split: {"name": hub.split, "num_examples": len(table), "dataset_name": snake_case}},
    }
    file.write_text(json.dumps(information))


@pytest.fixture(scope="module", params=["offline", "silent"])
def no_network(request):
    """The environment that keeps the hub away: it is told to, or the hub takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        yield {
            "offline": {"HF_HUB_OFFLINE": "1"},
            "silent": {"HF_HUB_OFFLINE": None, "HF_ENDPOINT": endpoint, "HF_HUB_ETAG_TIMEOUT": 1},
        }[request.param]


@pytest.fixture(scope="module")
def cached(tmp_path_factory, no_network):
    """The answers where all sources lie in the cache in their pinned revision."""
    home = tmp_path_factory.mktemp("hub")
    for name in HUB_ROWS | HUB_PREFERENCES:
        write_hub_cache(name, home, open_source(name).origin.revision)
    asked = [(name, "conversations") for name in HUB_ROWS | HUB_PREFERENCES]
    return read_offline(home, *asked, *((name, "preferences") for name in HUB_PREFERENCES), **no_network)


@pytest.mark.parametrize("name", HUB_ROWS)
def test_without_network_the_cache_answers_with_the_pinned_revision(name, cached):
    (answer,) = cached[name, "conversations"]
    assert f"source={name!r}, messages=(Message(role='user', text='Tea?'" in answer


@pytest.mark.parametrize("name", HUB_PREFERENCES)
def test_preferences_of_the_hub_are_ranked_replies_and_nothing_to_learn_from(name, cached):
    (answer,) = cached[name, "preferences"]
    replies = [Message("assistant", text, parent=0, rank=rank) for rank, text in ((0, "Yes."), (1, "No."))]
    assert f"source={name!r}, messages={(Message('user', 'Tea?', parent=None), *replies)!r}" in answer
    (refusal,) = cached[name, "conversations"]
    assert "is a preference" in refusal


def test_without_network_and_cache_the_error_says_what_to_put_where(tmp_path, no_network):
    """And that another revision lies there, if one does."""
    write_hub_cache("dolly", tmp_path, "0" * 40)
    answers = read_offline(tmp_path, ("oasst1", "conversations"), ("dolly", "conversations"), **no_network)
    ((missing,), (other,)) = answers.values()
    assert missing.startswith("DataError: OpenAssistant/oasst1@fdf72ae0 train: ")
    assert str(tmp_path / "datasets") in missing
    assert f"https://huggingface.co/datasets/OpenAssistant/oasst1/tree/{SOURCES['oasst1'].revision}" in missing
    assert "HF_HUB_OFFLINE is set" in missing or "http://127.0.0.1" in missing
    assert other.startswith(f"DataError: {SOURCES['dolly'].repo}@{SOURCES['dolly'].revision[:8]} train: ")
    assert tells(other, f"{'0' * 40} ... {SOURCES['dolly'].revision}")
    assert "\n" not in missing + other
