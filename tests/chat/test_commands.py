"""Entries of a chat, with a session that only remembers."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2ft.chat.commands import COMMANDS, Chat, settings_of
from gpt2ft.chat.session import Statistics
from gpt2ft.conversation import ROLES
from gpt2ft.settings.sections import SamplingSettings


class FakeSession:
    """Replies with what it was told, ends as it was told, and remembers."""

    def __init__(self):
        self.turns, self.system, self.last = [], None, None
        self.sampling, self.max_new_tokens = SamplingSettings(), 256
        self.next_last = Statistics(tokens=3, seconds=1.0, finish="stop", prompt_tokens=5, dropped_turns=0)
        self.num_replies = 0

    def say(self, text):
        if "too long" in text:
            raise ValueError("a message must be shorter")
        self.turns.append(("user", text))

    def reply(self, should_stop):
        self.num_replies += 1
        said = f"reply {self.num_replies}"
        self.turns.append(("assistant", said))
        self.last = self.next_last
        return iter(said.split("(?= )"))

    def complete(self, text, should_stop):
        if "too long" in text:
            raise ValueError("a text must be shorter")
        self.last = self.next_last
        return iter([" and", " so on"])

    def undo(self):
        if not self.turns:
            raise ValueError("there must be a message")
        del self.turns[-2:]

    def retry(self):
        self.turns.pop()

    def new(self):
        self.turns, self.last = [], None

    def to_messages(self):
        system = [("system", self.system)] if self.system else []
        return [{"role": role, "content": text} for role, text in [*system, *self.turns]]

    def from_messages(self, messages):
        if any(message["role"] not in ROLES for message in messages):
            raise ValueError("`role` must be known")
        self.turns = [(message["role"], message["content"]) for message in messages]


class FakeScreen:
    """Remembers all that is shown, as (kind, text)."""

    def __init__(self):
        self.shown = []

    def interrupted(self):
        return False

    def turn(self, role, pieces):
        self.shown.append((role, "".join(pieces)))

    def transcript(self, turns):
        self.shown.append(("transcript", turns))

    def notice(self, text):
        self.shown.append(("notice", text))

    def problem(self, text):
        self.shown.append(("problem", text))


class Run:
    """A chat of fakes: run("/new") gives what was shown for it."""

    def __init__(self, completes=False):
        self.session = FakeSession()
        self.screen = FakeScreen()
        self.chat = Chat(self.session, self.screen, completes)

    def __call__(self, text):
        self.screen.shown.clear()
        self.chat.enter(text)
        return list(self.screen.shown)


@pytest.fixture
def run():
    return Run()


def notice(shown):
    """The text of the one thing that was shown, a notice."""
    [(kind, text)] = shown
    assert kind == "notice"
    return text


def problem(shown):
    """Likewise, a problem."""
    [(kind, text)] = shown
    assert kind == "problem"
    return text


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
    run = Run(completes)
    assert run(command) == []
    assert not run.chat.is_open


@pytest.mark.parametrize("word", ["exit", "quit", " Exit "])
def test_a_bare_word_leaves_as_its_command_does(run, word):
    assert run(word) == []
    assert not run.chat.is_open
    assert run.session.turns == []
    completing = Run(completes=True)
    completing(word)
    assert completing.chat.is_open  # there it is a text to go on with


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


# --- files ----------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(turns=st.lists(st.tuples(TEXT, TEXT), max_size=4), system=TEXT)
def test_what_is_saved_is_one_line_and_is_loaded_as_it_was(turns, system, tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "a chat.jsonl"
    run, again = Run(), Run()
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
    run, other = Run(), Run()
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


@pytest.mark.parametrize("said", ["exit now", "//exit", "how do I quit?", "/exi"])
def test_other_lines_do_not_leave(said, run):
    run(said)
    assert run.chat.is_open


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


# --- documents ------------------------------------------------------------------------------------------------------


def test_documents_are_continued_without_turns():
    run = Run(completes=True)
    assert run("Once") == [(None, "Once and so on")]
    assert run("//usr") == [(None, "/usr and so on")]
    assert run("too long") == [("problem", "a text must be shorter")]
    assert run("/set top_k 3") == [("notice", "top_k 3")]
    assert re.search("/undo.*`--complete`", problem(run("/undo")))
    [(_, text)] = run("/help")
    assert "/set" in text
    assert "/undo" not in text
    assert run.session.turns == []
