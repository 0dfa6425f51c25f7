"""Which run a chat takes where none is named, and which others there are."""

import os
import re

import pytest

from gpt2ft.model.pretrained import ModelError
from gpt2ft.runs import chat
from gpt2ft.runs.loaded_model import newest_run
from gpt2ft.settings.using import ChatSettings


@pytest.fixture
def finish(monkeypatch, tmp_path):
    """finish("tea", 5): a run of that name that ended so many seconds after others."""
    monkeypatch.chdir(tmp_path)

    def finish(name, seconds):
        file = tmp_path / "runs" / name / "model" / "config.json"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (1e9 + seconds, 1e9 + seconds))

    return finish


def test_finished_runs_are_listed_newest_first(finish, tmp_path, capsys):
    for name, seconds in (("old", 0), ("new", 9), ("middle", 5)):
        finish(name, seconds)
    (tmp_path / "runs" / "unfinished" / "checkpoints").mkdir(parents=True)
    chat.run(ChatSettings(list=True))
    assert re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d  (\S+)$", capsys.readouterr().out, re.M) == [
        "runs/new", "runs/middle", "runs/old",
    ]  # fmt: skip
    assert newest_run() == "runs/new"
    said = chat.of_newest(newest_run())
    assert "runs/new" in said
    assert "3 finished runs" in said
    assert "--list" in said


def test_the_only_run_has_no_others_to_list(finish):
    finish("one", 0)
    assert chat.of_newest(newest_run()) == "runs/one is the only run"


def test_without_a_run_the_list_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no finished run"):
        chat.run(ChatSettings(list=True))


def test_a_list_stands_alone():
    assert not list(ChatSettings(list=True).problems())
    (problem,) = ChatSettings(list=True, model="runs/a").problems()
    assert "`list`" in problem
