"""Columns of other names are said by `data.columns`, and checked against those that are there."""

import pytest
from facts import tells

from gpt2ft.data.kinds import PREFERENCES
from gpt2ft.data.store import open_store
from gpt2ft.settings.columns import keys_and_columns
from gpt2ft.settings.sections import FilterSettings

ROWS = [{"frage": "Tee?", "antwort": "Ja.", "id": 3}, {"frage": "Milch?", "antwort": "Nein.", "id": 4}]
PAIRED = ("prompt=frage", "completion=antwort")
FILES = ["t.jsonl", "array.json", "t.parquet", "t.arrow", "t.csv"]


@pytest.fixture
def files(write, tmp_path):
    """files(name, rows): the same rows in any kind of file."""

    def files(name, rows):
        if name.endswith(".csv"):
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
            (tmp_path / name).write_text("\n".join(lines))
            return tmp_path / name
        return write(tmp_path / name, rows)

    return files


@pytest.mark.parametrize("name", FILES)
def test_a_column_is_what_it_is_said_to_be(name, files, read, error):
    file = files(name, ROWS)
    assert tells(error(file), '"frage", "antwort" ... `data.columns`')
    trees, _ = read(file, columns=PAIRED)
    assert [[message.text for message in tree.messages] for tree in trees] == [["Tee?", "Ja."], ["Milch?", "Nein."]]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("columns", "facts"),
    [
        (
            "prompt=frgae,completion=antwort",
            '`data.columns` ... "frgae" ... "frage", "antwort" ... did you mean "frage"',
        ),
        ("promt=frage,completion=antwort", '`data.columns` ... "promt" ... did you mean "prompt"'),
        ("prompt=frage,system=antwort", "known layout"),
    ],
)
def test_an_unknown_column_or_key_is_named_with_the_known_ones(name, columns, facts, files, error):
    file = files(name, ROWS)
    assert tells(error(file, columns=[columns]), f"{file}: ... {facts}")


def test_columns_that_are_left_over_are_refused_as_ever(read, error, write, tmp_path):
    rows = [row | {"notiz": "x", "prompt": "An English one."} for row in ROWS]
    for name in ("t.jsonl", "t.parquet"):
        file = write(tmp_path / name, rows)
        assert tells(error(file, columns=PAIRED), '`prompt` ... "frage" ... "prompt"')
        assert tells(error(file, columns=PAIRED, ignore_keys=("prompt",)), "`notiz` ... `data.ignore_keys`")
        assert len(read(file, columns=PAIRED, ignore_keys=("prompt", "notiz"))[0]) == 2


def test_columns_may_change_places(read):
    rows = [{"input": "Yes.", "output": "Tea?"}]
    (tree,), _ = read(rows, columns=("input=output", "output=input"))
    assert [message.text for message in tree.messages] == ["Tea?", "Yes."]


def test_columns_of_preferences_and_of_lists(read):
    (tree,), _ = read(
        [{"q": "Tea?", "good": "Yes.", "bad": "No."}], kind=PREFERENCES, columns="prompt=q,chosen=good,rejected=bad"
    )
    assert [message.text for message in tree.messages] == ["Tea?", "Yes.", "No."]
    (tree,), _ = read([{"text": "### Human: Tea?### Assistant: Yes."}], columns="dialogue=text")
    assert [(message.role, message.text) for message in tree.messages] == [("user", "Tea?"), ("assistant", "Yes.")]


def test_sources_whose_layout_is_known_are_read_as_ever(read):
    assert read("quickstart:held_out", columns=PAIRED)[0] == read("quickstart:held_out")[0]


def test_other_columns_make_another_store(write, tokenizer, tmp_path):
    file = str(write(tmp_path / "t.jsonl", ROWS))
    one, other = (
        open_store(file, FilterSettings(columns=columns), tokenizer, tmp_path)
        for columns in (PAIRED, ("prompt=antwort", "completion=frage"))
    )
    assert one.digest != other.digest
    assert one.statistics.content != other.statistics.content


def test_columns_are_given_as_words_by_commas_or_as_a_mapping():
    for given in (PAIRED, list(PAIRED), "prompt=frage,completion=antwort", ["prompt=frage, completion = antwort"],
                  {"prompt": "frage", "completion": "antwort"}):  # fmt: skip
        assert keys_and_columns(FilterSettings(columns=given).columns) == [
            ("prompt", "frage"),
            ("completion", "antwort"),
        ]
