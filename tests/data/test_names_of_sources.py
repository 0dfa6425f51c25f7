"""Names of data sources; one that does not exist is answered with the one that is meant."""

from pathlib import Path

import pytest
from facts import tells

from gpt2ft.data.blocks import stem
from gpt2ft.data.hub_source import SOURCES
from gpt2ft.data.reading import DataError
from gpt2ft.data.sources import BUNDLED, open_source, read_trees
from gpt2ft.settings.sections import FilterSettings


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("oast1", "`oasst1`"),
        ("alpacca", "`alpaca`"),
        ("quikstart", "`quickstart`"),
        ("chat.jsonl", "`chats.jsonl`"),
        ("chats", "`chats.jsonl`"),
        ("wikitext", "ultrafeedback"),  # none is near, so all are named
    ],
)
def test_a_name_that_is_nearly_one_is_answered_with_it(name, said, tmp_path, monkeypatch):
    (tmp_path / "chats.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        open_source(name)
    assert said in str(error.value)
    assert ("did you mean" in str(error.value)) == (name != "wikitext")


@pytest.mark.parametrize("inside", [".", "model"])
def test_a_model_that_is_named_as_data(inside, tmp_path):
    """As the last word of a list of data, where it was to be the model."""
    (tmp_path / "run" / inside).mkdir(parents=True)
    (tmp_path / "run" / inside / "config.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="is a model"):
        open_source(str(tmp_path / "run"))


def test_a_missing_file_is_answered_at_once_with_the_nearest_name(error, write, tmp_path):
    write(tmp_path / "trees.jsonl", [{"text": "Tea."}])
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
