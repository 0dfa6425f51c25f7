"""A source gives the same trees whatever file they come in, and a sentence to act on where it cannot."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gpt2ft.data.sources import SOURCES, DataError, Filters, Totals, read_trees, source_digest

REPOSITORY = Path(__file__).parents[2]
TEST_DATA = Path(os.environ.get("GPT2FT_TEST_DATA", REPOSITORY / "../shared/data"))
KEEP_ALL = Filters(reviewed_only=False)
ROWS = [
    {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Tea?", "lang": "en", "rank": None},
    {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "Thé — 茶.", "lang": "en", "rank": 1},
    {"message_id": "c", "parent_id": "a", "role": "assistant", "text": "Two\u2028lines.", "lang": "en", "rank": 0},
]


def real_file(name):
    file = TEST_DATA / "oasst" / name
    if not file.exists():
        pytest.skip(f"needs the real data file {file}: set GPT2FT_TEST_DATA")
    return file


def real_rows(name):
    return [json.loads(line) for line in real_file(name).read_bytes().splitlines()]


def read(source, filters=KEEP_ALL):
    dropped, totals = Counter(), Totals()
    trees = list(read_trees(str(source), filters, dropped, totals))
    return trees, dict(dropped), totals


def error(source, filters=KEEP_ALL):
    with pytest.raises(DataError) as raised:
        read(source, filters)
    return str(raised.value)


def write_jsonl(file, records):
    """Plain or gzipped, by the name of the file."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    file.write_bytes(gzip.compress(lines) if file.suffix == ".gz" else lines)
    return file


def write_parquet(file, records):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), file)
    return file


def flatten(trees):
    """The same messages as flat rows; roots stay in order."""
    waiting = [(tree["message_tree_id"], tree["prompt"]) for tree in trees]
    for tree_id, message in waiting:
        yield {**message, "message_tree_id": tree_id, "replies": None}
        waiting += [(tree_id, reply) for reply in message["replies"]]


def by_id(trees):
    return {tree.id: tree.messages for tree in trees}


# --- real data ------------------------------------------------------------------------------------------------------


def test_one_hundred_english_trees():
    trees, dropped, totals = read(real_file("en_100_tree.jsonl"))
    messages = [message for tree in trees for message in tree.messages]
    assert (len(trees), len(messages), dropped) == (100, 1167, {})
    assert sum(message.rank is not None for message in messages) == 641
    assert totals == Totals(trees=100, messages=1167)
    assert {tree.source for tree in trees} == {"en_100_tree"}


def test_the_best_replies_of_one_hundred_trees():
    trees, dropped, totals = read(real_file("en_100_tree.jsonl"), Filters(max_rank=0))
    assert sum(len(tree.messages) for tree in trees) + sum(dropped.values()) == totals.messages
    replies = [message for tree in trees for message in tree.messages if message.role == "assistant"]
    assert {message.rank for message in replies} == {0, None}
    assert set(dropped) == {"rank above limit", "below a dropped message"}


def test_the_validation_messages():
    file = real_file("oasst1_en_validation.messages.jsonl")
    trees, dropped, totals = read(file)
    assert totals == Totals(trees=188, messages=2022)
    assert dropped == {"deleted": 40, "orphan": 3}
    assert (len(trees), sum(len(tree.messages) for tree in trees)) == (188, 1979)
    trees, dropped, _ = read(file, Filters(languages=("en",)))
    assert dropped == {"deleted": 40, "not reviewed": 46}  # 53 were rejected: 7 are deleted too, 3 are the orphans
    assert (len(trees), sum(len(tree.messages) for tree in trees)) == (188, 1936)
    assert read(file, Filters(languages=("de",)))[0] == []


def test_real_messages_are_the_same_in_any_file_and_any_order(tmp_path):
    rows = real_rows("oasst1_en_validation.messages.jsonl")
    expected = read(real_file("oasst1_en_validation.messages.jsonl"), Filters())[0]
    assert len(expected) == 188
    for file in (write_jsonl(tmp_path / "t.jsonl.gz", rows), write_parquet(tmp_path / "t.parquet", rows)):
        trees = read(file, Filters())[0]
        assert [tree.messages for tree in trees] == [tree.messages for tree in expected]
        assert {tree.source for tree in trees} == {"t"}
    shuffled = write_jsonl(tmp_path / "shuffled.jsonl", random.Random(0).sample(rows, len(rows)))
    assert by_id(read(shuffled, Filters())[0]) == by_id(expected)


def test_real_trees_are_the_same_nested_and_flat(tmp_path):
    nested = real_rows("en_100_tree.jsonl")
    file = write_jsonl(tmp_path / "en_100_tree.jsonl", flatten(nested))
    assert read(file)[0] == read(real_file("en_100_tree.jsonl"))[0]
    files = [write_jsonl(tmp_path / "t.jsonl.gz", nested), write_parquet(tmp_path / "t.parquet", nested[:10])]
    assert read(files[0])[0][:10] == read(files[1])[0]


# --- files ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_trees(tmp_path):
    files = [write_jsonl(tmp_path / name, ROWS) for name in ("t.jsonl", "t.jsonl.gz", "T.JSONL")]
    files.append(write_parquet(tmp_path / "t.parquet", ROWS))
    texts = [[message.text for message in read(file)[0][0].messages] for file in files]
    assert texts == [["Tea?", "Two\u2028lines.", "Thé — 茶."]] * 4


def test_blank_lines_line_ends_of_windows_and_a_byte_order_mark_are_no_errors(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in ROWS) + b"\r\n\n")
    trees, dropped, _ = read(file)
    assert (len(trees[0].messages), dropped) == (3, {})


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"message_id": "x", ', "must be one JSON object, but does not parse: Expecting property name"),
        (b'{"message_id": "x"} {}', "must be one JSON object, but does not parse: Extra data at column 21"),
        (b'{"rank": ' + b"9" * 5000 + b"}", "must be one JSON object, but does not parse: Exceeds the limit"),
        (b'{"text": "\xff"}', "must be UTF-8 text, but is not at byte 11"),
        (b'["a"]', 'must be a JSON object, but is ["a"]'),
        (b"null", "must be a JSON object, but is null"),
        (b'{"prompt": ' * 50_000 + b"{}" + b"}" * 50_000, "must not nest this deep; write long conversations as flat"),
        (b'{"message_id": "x", "role": "user"}', "`text` must be a string, but is missing"),
    ],
)
def test_a_malformed_line_is_an_error_or_skipped_and_counted(tmp_path, name, line, problem):
    lines = [json.dumps(row).encode() for row in ROWS]
    content = b"\n".join([*lines[:2], line, *lines[2:]])
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert error(file).startswith(f"{file}:3: {problem}")
    trees, dropped, _ = read(file, Filters(on_error="skip"))
    assert (len(trees[0].messages), dropped) == (3, {"malformed line": 1})


def test_a_malformed_parquet_row_is_named(tmp_path):
    rows = [*ROWS, {**ROWS[0], "message_id": "x", "text": None}]
    file = write_parquet(tmp_path / "t.parquet", rows)
    assert error(file) == f'{file}: row 4: `text` must be a string, but is null (message "x")'
    assert read(file, Filters(on_error="skip"))[1] == {"malformed line": 1}


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_broken_file_is_always_an_error(tmp_path, on_error):
    contents = {
        "not.jsonl.gz": b'{"message_id": "a"}',
        "cut.jsonl.gz": gzip.compress(json.dumps(ROWS).encode())[:-20],
        "not.parquet": b"PAR1 no PAR1",
        "cut.parquet": write_parquet(tmp_path / "whole.parquet", ROWS).read_bytes()[:-50],
        "empty.parquet": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert f"{tmp_path / name}: must be a whole and readable" in error(tmp_path / name, Filters(on_error=on_error))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_text_in_parquet_that_is_not_utf8(tmp_path, on_error):
    pyarrow = pytest.importorskip("pyarrow")
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers())
    columns = {"message_id": ["a"], "role": ["user"], "text": text}
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    assert "must be a whole and readable parquet file" in error(tmp_path / "t.parquet", Filters(on_error=on_error))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_an_empty_file_is_always_an_error(tmp_path, name, on_error):
    file = tmp_path / name
    if name.endswith(".parquet"):
        write_parquet(file, ROWS[:0])
    else:
        write_jsonl(file, [])
    assert error(file, Filters(on_error=on_error)) == (
        f"{file}: must hold OASST trees or messages, but holds none that can be read"
    )


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_answered_at_once_with_the_nearest_name(tmp_path):
    write_jsonl(tmp_path / "trees.jsonl", ROWS)
    with pytest.raises(DataError) as raised:
        read_trees(str(tmp_path / "tree.jsonl"), KEEP_ALL, Counter())
    assert str(raised.value) == (
        f"data source {str(tmp_path / 'tree.jsonl')!r} must be a name or a file, but no such file exists; "
        f"did you mean {str(tmp_path / 'trees.jsonl')!r}?"
    )
    assert "did you mean 'oasst1'?" in error("osst1")
    assert "the names are oasst1, oasst2, quickstart, quickstart:held_out" in error(tmp_path / "no" / "where.jsonl")


def test_other_files_and_folders_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a,b")
    assert "must be a file that ends in .jsonl, .jsonl.gz, .parquet, but is another kind of file" in error(
        tmp_path / "t.csv"
    )
    assert "but is a folder" in error(tmp_path)


def test_unknown_splits_are_refused():
    assert error("oasst1:test") == "data source 'oasst1:test' must name the split train or validation, but names 'test'"
    assert error("quickstart:eval") == "data source 'quickstart:eval' must be one of quickstart, quickstart:held_out"


@pytest.mark.parametrize("name", ["quickstart", "quickstart:held_out"])
def test_the_bundled_sets_are_whole(name):
    try:
        trees, dropped, totals = read(name, Filters())
    except DataError as missing:
        pytest.skip(f"the bundled set is not there yet: {missing}")
    assert dropped == {}
    assert len(trees) == totals.trees > 0
    assert {tree.source for tree in trees} == {name}


def test_digests(tmp_path):
    file = write_jsonl(tmp_path / "t.jsonl", ROWS)
    before = source_digest(str(file))
    write_jsonl(file, ROWS[:2])
    assert source_digest(str(file)) != before
    names = ["oasst1", "oasst2", "oasst1:validation", str(file)]
    digests = [source_digest(name) for name in names]
    assert len(set(digests)) == 4
    assert {len(digest) for digest in digests} == {64}
    assert source_digest("oasst1:train") == digests[0]
    with pytest.raises(DataError, match="no such file"):
        source_digest(str(tmp_path / "missing.jsonl"))


# --- the hub, without network ---------------------------------------------------------------------------------------

READ_OASST1 = """
from collections import Counter
from gpt2ft.data.sources import DataError, Filters, read_trees
try:
    for tree in read_trees("oasst1", Filters(), Counter()):
        print(tree)
except DataError as error:
    print("DataError:", error)
"""


def read_oasst1_offline(hugging_face_home):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(hugging_face_home),
        "PYTHONPATH": str(REPOSITORY),
    }
    environment.pop("HF_DATASETS_CACHE", None)
    command = [sys.executable, "-c", READ_OASST1]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def write_hub_cache(hugging_face_home, revision):
    """What `datasets` leaves behind after it has loaded oasst1 at `revision`."""
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    folder = hugging_face_home / "datasets" / "OpenAssistant___oasst1" / "default" / "0.0.0" / revision
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist([{**row, "labels": {"name": ["spam"], "value": [0.0]}} for row in ROWS])
    with pyarrow.ipc.new_stream(str(folder / "oasst1-train.arrow"), table.schema) as stream:
        stream.write_table(table)
    information = {
        "builder_name": "parquet",
        "dataset_name": "oasst1",
        "config_name": "default",
        "version": {"version_str": "0.0.0"},
        "features": datasets.Features.from_arrow_schema(table.schema).to_dict(),
        "splits": {"train": {"name": "train", "num_examples": len(ROWS), "dataset_name": "oasst1"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(information))


def test_without_network_and_cache_the_error_says_what_to_put_where(tmp_path):
    answer = read_oasst1_offline(tmp_path)
    assert answer.startswith("DataError: OpenAssistant/oasst1@fdf72ae0 train: must be on the hub or in the cache")
    assert str(tmp_path / "datasets") in answer
    assert f"https://huggingface.co/datasets/OpenAssistant/oasst1/tree/{SOURCES['oasst1'].revision}" in answer
    assert answer.count("\n") == 1


def test_without_network_the_cache_answers_with_the_pinned_revision(tmp_path):
    write_hub_cache(tmp_path, SOURCES["oasst1"].revision)
    answer = read_oasst1_offline(tmp_path)
    assert answer.startswith("MessageTree(id='a', source='oasst1', messages=(Message(role='user', text='Tea?'")


def test_another_revision_in_the_cache_is_refused(tmp_path):
    write_hub_cache(tmp_path, "0" * 40)
    answer = read_oasst1_offline(tmp_path)
    assert answer.startswith("DataError: OpenAssistant/oasst1@fdf72ae0 train: must be on the hub or in the cache")
    assert f"the cache holds revision {'0' * 40} instead of {SOURCES['oasst1'].revision}" in answer
