"""Entries of a chat, with a session that only remembers."""

import re

import pytest
from remembering import RememberingChat, notice, problem

from gpt2ft.chat.commands import COMMANDS, settings_of
from gpt2ft.chat.session import Statistics


@pytest.fixture
def run():
    return RememberingChat()


# --- messages -------------------------------------------------------------------------------------------------------


def test_a_message_is_answered(run):
    assert run("What is tea?") == [("assistant", "reply 1")]
    assert run.session.turns == [("user", "What is tea?"), ("assistant", "reply 1")]


def test_two_slashes_send_a_text_with_one(run):
    run("//new is a command")
    run("///")
    assert [text for role, text in run.session.turns if role == "user"] == ["/new is a command", "//"]


@pytest.mark.parametrize("blank", ["", "  ", "\n\n", "\t"])
def test_nothing_is_not_a_message(run, blank):
    assert run(blank) == []
    assert run.session.turns == []


def test_what_the_session_refuses_is_said_and_the_chat_goes_on(run):
    assert run("too long") == [("problem", "a message must be shorter")]
    assert run.chat.problems == 1
    assert run("short") == [("assistant", "reply 1")]


@pytest.mark.parametrize(
    ("finish", "dropped", "facts"),
    [
        ("stop", 0, []),
        ("stop", 1, ["oldest turn no longer fits"]),
        ("stop", 2, ["2 oldest turns no longer fit"]),
        ("length", 0, ["3 tokens.*/set max_new_tokens"]),
        ("context", 4, ["4 oldest turns", "context is full"]),
        ("interrupted", 0, ["stopped"]),
    ],
)
def test_how_a_reply_ended_is_said(run, finish, dropped, facts):
    run.session.next_last = Statistics(3, 1.0, finish, 5, dropped)
    notices = run("hello")[1:]
    assert {kind for kind, _ in notices} <= {"notice"}
    assert len(notices) == len(facts)
    assert all(re.search(fact, text) for fact, (_, text) in zip(facts, notices, strict=True))


# --- commands -------------------------------------------------------------------------------------------------------


def test_the_commands_change_the_conversation(run):
    run("one")
    run("two")
    assert run("/retry") == [("assistant", "reply 3")]
    assert run.session.turns[-2:] == [("user", "two"), ("assistant", "reply 3")]
    assert "2 turns" in notice(run("/undo"))
    run("/system  Be brief. ")
    assert run.session.system == "Be brief."
    run("/system")
    assert run.session.system is None
    run("/new")
    assert run.session.turns == []
    assert run("/undo") == [("problem", "there must be a message")]
    run("/quit")
    assert not run.chat.is_open


@pytest.mark.parametrize(("given", "near"), [("/nwe", "/new"), ("/qiut", "/quit"), ("/Help", "/help"), ("/", "")])
def test_an_unknown_command_is_answered_with_the_nearest(run, given, near):
    [(kind, text)] = run(f"{given} and more")
    assert kind == "problem"
    assert f"no command {given} " in text
    assert (near or "/help") in text
    assert run.session.turns == []


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("/bye", "/quit"),
        ("/clear", "/new"),
        ("/regenerate", "/retry"),
        ("/temperature", "/set temperature"),
        ("/temp", "/set temperature"),
        ("/set temp 1", "`temperature`"),
        ("/set max_tokens 9", "`max_new_tokens`"),
    ],
)
def test_a_command_of_another_chat_is_answered_with_ours(run, given, meant):
    [(kind, text)] = run(given)
    assert kind == "problem"
    assert meant in text


@pytest.mark.parametrize("completes", [False, True])
@pytest.mark.parametrize("command", ["/quit", "/exit", " /Exit "])
def test_these_commands_leave_everywhere(command, completes):
    run = RememberingChat(completes)
    assert run(command) == []
    assert not run.chat.is_open


@pytest.mark.parametrize("word", ["exit", "quit", " Exit "])
def test_a_bare_word_leaves_as_its_command_does(run, word):
    assert run(word) == []
    assert not run.chat.is_open
    assert run.session.turns == []
    completing = RememberingChat(completes=True)
    completing(word)
    assert completing.chat.is_open  # there it is a text to go on with


@pytest.mark.parametrize("said", ["exit now", "//exit", "how do I quit?", "/exi"])
def test_other_lines_do_not_leave(said, run):
    run(said)
    assert run.chat.is_open


def test_help_lists_every_command_on_lines_that_fit(run):
    [(kind, text)] = run("/help")
    assert kind == "notice"
    assert all(re.search(f"^{command} ", text, re.MULTILINE) for command in COMMANDS)
    assert max(map(len, text.splitlines())) < 80


def test_settings_can_be_listed_and_changed(run):
    [(_, listed)] = run("/set")
    assert "temperature 0.7" in listed
    assert "seed none" in listed
    changes = {"temperature": 0.2, "top_k": 40, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 7}
    changes["max_new_tokens"] = 12
    assert changes.keys() == settings_of(run.session).keys()
    for name, value in changes.items():
        assert run(f"/set {name} {value}") == [("notice", f"{name} {value}")]
    assert settings_of(run.session) == changes
    assert run("/set top_k") == [("notice", "top_k 40")]
    run("/set seed none")
    assert run.session.sampling.seed is None


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("warmth 1", "warmth.*temperature"),
        ("temperature high", "`temperature`.*'high'"),
        ("top_k 1.5", "`top_k`.*whole.*'1.5'"),
        ("top_p 0", "`top_p`.*0"),
        ("temperature nan", "`temperature`.*nan"),
        ("temperature none", "`temperature`.*none"),
    ],
)
def test_a_bad_setting_is_refused_in_a_sentence(run, text, facts):
    before = settings_of(run.session)
    assert re.search(facts, problem(run(f"/set {text}")))
    assert settings_of(run.session) == before


# --- documents ------------------------------------------------------------------------------------------------------


def test_documents_are_continued_without_turns():
    run = RememberingChat(completes=True)
    assert run("Once") == [(None, "Once and so on")]
    assert run("//usr") == [(None, "/usr and so on")]
    assert run("too long") == [("problem", "a text must be shorter")]
    assert run("/set top_k 3") == [("notice", "top_k 3")]
    assert re.search("/undo.*`--complete`", problem(run("/undo")))
    [(_, text)] = run("/help")
    assert "/set" in text
    assert "/undo" not in text
    assert run.session.turns == []
