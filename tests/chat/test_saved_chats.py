"""Chats are saved to files and loaded from them, and no file of others is lost."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from remembering import RememberingChat, notice, problem

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.fixture
def run():
    return RememberingChat()


@given(turns=st.lists(st.tuples(TEXT, TEXT), max_size=4), system=TEXT)
def test_what_is_saved_is_one_line_and_is_loaded_as_it_was(turns, system, tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "a chat.jsonl"
    run, again = RememberingChat(), RememberingChat()
    run.session.system = system or None
    run.session.turns = [turn for user, reply in turns for turn in (("user", user), ("assistant", reply))]
    assert str(file) in notice(run(f"/save {file}"))
    assert file.read_text(encoding="utf-8").count("\n") == 1
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": run.session.to_messages()}
    assert str(file) in notice(again(f"/load {file}")[-1:])
    assert again.session.turns == [(message["role"], message["content"]) for message in run.session.to_messages()]


def conversations(file):
    return [[turn["content"] for turn in json.loads(line)["messages"]] for line in file.read_text().splitlines()]


def test_a_file_of_others_is_never_replaced(run, tmp_path):
    theirs = tmp_path / "theirs.jsonl"
    for content in ("precious", '{"text": "precious"}\n'):
        theirs.write_text(content)
        assert str(theirs) in problem(run(f"/save {theirs}"))
        assert theirs.read_text() == content
    assert str(tmp_path) in problem(run(f"/save {tmp_path}"))


def test_each_conversation_of_a_file_is_kept_and_this_one_is_renewed(run, tmp_path):
    file = tmp_path / "chats.jsonl"
    run("one")
    assert "saved" in notice(run(f"/save {file}"))
    run("two")
    run(f"/save {file}")
    assert conversations(file) == [["one", "reply 1", "two", "reply 2"]]
    run("/new")
    run("three")
    assert "added" in notice(run(f"/save {file}"))
    run("/undo")
    run("four")
    run(f"/save {file}")
    assert conversations(file) == [["one", "reply 1", "two", "reply 2"], ["four", "reply 4"]]


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_conversation_is_added_to_what_earlier_chats_have_saved(end, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "earlier"}]}) + end)
    run, other = RememberingChat(), RememberingChat()
    run("now")
    assert "added" in notice(run(f"/save {file}"))
    other("there")
    other(f"/save {file}")
    run("again")
    run(f"/save {file}")
    expected = [["earlier"], ["now", "reply 1"], ["there", "reply 1"], ["now", "reply 1", "again", "reply 2"]]
    assert conversations(file) == expected


def test_a_conversation_that_is_loaded_is_another_one(run, tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    run("one")
    run(f"/save {one}")
    run(f"/save {other}")
    run(f"/load {other}")
    run("two")
    run(f"/save {one}")
    assert conversations(one) == [["one", "reply 1"], ["one", "reply 1", "two", "reply 2"]]


def test_bytes_that_are_no_text_do_not_keep_a_chat_from_being_saved(run, tmp_path):
    run("what is \udcff?")
    assert notice(run(f"/save {tmp_path / 'chat.jsonl'}"))
    assert json.loads((tmp_path / "chat.jsonl").read_text())["messages"][0]["content"] == "what is ??"


def test_a_file_that_cannot_be_written_is_said(run, tmp_path):
    file = tmp_path / "missing" / "file"
    assert re.search(f"{file}.*No such file", problem(run(f"/save {file}")))
    assert "FILE" in problem(run("/save"))


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, "No such file"),
        (b"", '{"messages": '),
        (b"not json\n", "JSON lines"),
        (b"\xff\xfe\n", "JSON lines"),
        (b"[" * 100_000, "JSON lines"),
        (b'{"text": "hello"}\n', '{"messages": '),
        (b'{"messages": [{"role": "narrator", "content": ""}]}\n', "`role`"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_said_and_nothing_changes(run, tmp_path, content, fact):
    run("hello")
    turns = list(run.session.turns)
    file = tmp_path / "chat.jsonl"
    if content is not None:
        file.write_bytes(content)
    assert re.search(f"{file}.*{fact}", problem(run(f"/load {file}")))
    assert run.session.turns == turns


def test_the_first_of_several_conversations_is_loaded_and_it_is_said(run, tmp_path):
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in ("first\u2028line", "second")]
    (tmp_path / "two.jsonl").write_text("\n" + "\n".join(lines) + "\n")
    shown = run(f"/load {tmp_path / 'two.jsonl'}")
    assert shown[0] == ("transcript", [("user", "first\u2028line")])
    assert "first conversation" in notice(shown[1:])
