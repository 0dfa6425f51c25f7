"""A data source that does not exist is answered with the one that is meant."""

import pytest

from gpt2ft.data.reading import DataError
from gpt2ft.data.sources import open_source


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
