"""Any data set on the hub is read by its name, at one commit; `datasets` is replaced, so no network is needed."""

import datasets
import huggingface_hub
import pytest
from facts import tells

import gpt2ft.hub
from gpt2ft.data import hub_source
from gpt2ft.data.hub_source import SOURCES
from gpt2ft.data.reading import DataError
from gpt2ft.data.sources import open_source
from gpt2ft.hub import commit_of
from gpt2ft.settings.sections import split_mixing_weight

NEWEST = "a" * 40


@pytest.fixture
def hub(monkeypatch):
    """What is asked of the hub; it holds one data set, of two questions and their answers."""
    asked = []

    def load_dataset(repository, config, *, revision, split):
        asked.append((repository, config, revision, split))
        if split != "train":
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train'].")
        return datasets.Dataset.from_dict({"question": ["Tea?", "Milk?"], "answer": ["Yes.", "No."]})

    def repo_info(self, repository, *, revision, repo_type, timeout):
        assert repo_type == "dataset"
        return type("Info", (), {"sha": {"main": NEWEST, "v1": "b" * 40}[revision]})

    commit_of.cache_clear()
    for module in (gpt2ft.hub, hub_source):
        monkeypatch.setattr(module, "rely_on_cache_unless_reachable", lambda: "")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    yield asked
    commit_of.cache_clear()


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("openai/gsm8k", ("openai/gsm8k", None, NEWEST, "train")),
        ("openai/gsm8k/main", ("openai/gsm8k", "main", NEWEST, "train")),
        ("openai/gsm8k:train@v1", ("openai/gsm8k", None, "b" * 40, "train")),
        (f"openai/gsm8k/main:train@{'c' * 40}", ("openai/gsm8k", "main", "c" * 40, "train")),
    ],
)
def test_any_data_set_by_its_name(name, asked, hub, read):
    trees, _ = read(name)
    assert [[message.text for message in tree.messages] for tree in trees] == [["Tea?", "Yes."], ["Milk?", "No."]]
    assert set(hub) == {asked}
    origin = open_source(name).origin
    assert origin.place == f"openai/gsm8k@{asked[2][:8]} train"
    assert origin.notes == (f"commit {asked[2]}",)
    assert origin.digest() != open_source(f"openai/gsm8k@{'d' * 40}").origin.digest()


def test_its_columns_have_other_names(hub, read, error):
    trees, _ = read("owner/name", columns="prompt=answer,completion=question")
    assert trees[0].messages[0].text == "Yes."
    assert tells(error("owner/name", columns="prompt=frage"), '"frage" ... "question", "answer"')


def test_one_that_is_pinned_here_keeps_its_revision(hub):
    assert open_source("OpenAssistant/oasst1:validation").origin == open_source("oasst1:validation").origin
    assert open_source("OpenAssistant/oasst1").origin == SOURCES["oasst1"]
    assert open_source("OpenAssistant/oasst1@v1").origin.revision == "b" * 40


def test_an_unknown_split_is_told_with_those_there_are(hub, error):
    assert tells(error("owner/name:test"), f"owner/name@{NEWEST[:8]} test ... Should be one of ['train']")


def test_files_come_first_and_what_looks_like_one_is_never_looked_for(hub, write, tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "owner" / "name" / "t.jsonl", [{"text": "Tea."}])
    assert len(read("owner/name")[0]) == 1
    for missing in ("owner/nme", "other/t.jsonl", "runs/data"):
        with pytest.raises(DataError, match="no such file"):
            open_source(missing)
    assert hub == []


def test_a_mixing_weight_behind_a_revision():
    assert split_mixing_weight("owner/name:train@v1@0.5") == ("owner/name:train@v1", 0.5)
    assert split_mixing_weight("owner/name@0.5") == ("owner/name", 0.5)
    assert split_mixing_weight(f"owner/name@{'a1' * 20}") == (f"owner/name@{'a1' * 20}", 1.0)
