"""Errors end a script once, in words, with a code: who reports them, and from where."""

from types import SimpleNamespace

import pytest

from gpt2ft import errors
from gpt2ft.files import write_text


def test_a_process_that_does_not_speak_leaves_time_to_the_one_that_does(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(errors, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            errors.fail("it is so")
    assert capsys.readouterr().err == "error: it is so\n"
    assert slept == [errors.SECONDS_TO_REPORT]


def test_a_reason_leaves_out_the_path_and_the_words_of_python(tmp_path):
    for action, said in {
        lambda: (tmp_path / "absent").read_text(): "No such file or directory",
        lambda: write_text(tmp_path / "absent" / "file", ""): "No such file or directory",
        lambda: b"\xff".decode(): "it is no text in UTF-8",
        lambda: int("x\ny"): "invalid literal for int() with base 10: 'x\\ny'",
    }.items():
        with pytest.raises((OSError, ValueError)) as error:
            action()
        assert errors.reason(error.value) == said


def test_each_line_is_an_error_and_other_ranks_are_named(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit, match="1"):
        errors.fail("one\ntwo", code=1, everywhere=True)
    assert capsys.readouterr().err == "error on rank 3: one\nerror on rank 3: two\n"
