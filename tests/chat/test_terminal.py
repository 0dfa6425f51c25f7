"""Text that streams onto a screen, who sits there, and what is completed."""

import sys
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pyte
import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.data_structures import Size
from prompt_toolkit.document import Document
from prompt_toolkit.output.vt100 import Vt100_Output
from wcwidth import wcswidth

from gpt2ft.chat import terminal
from gpt2ft.chat.commands import COMMANDS
from gpt2ft.chat.terminal import EntryCompleter, WordWrapper, talk
from gpt2ft.settings.sections import SamplingSettings

# --- what is shown --------------------------------------------------------------------------------------------------


class Paper:
    """A long screen that is written to as a terminal is."""

    def __init__(self, columns):
        self.screen = pyte.Screen(columns, 500)
        self.screen.set_mode(pyte.modes.LNM)
        self.stream = pyte.Stream(self.screen)
        self.output = Vt100_Output(self, lambda: Size(rows=500, columns=columns), term="xterm")
        self.encoding = "utf-8"

    def write(self, text):
        self.stream.feed(text)

    def flush(self):
        pass

    def fileno(self):
        raise OSError

    def line(self, row):
        cells = (self.screen.buffer[row][column].data for column in range(self.screen.columns))
        return "".join(cells).rstrip()

    def lines(self):
        return [self.line(row) for row in range(self.screen.cursor.y + 1)]


def test_streamed_text_breaks_between_words_however_it_is_cut():
    """A word of half a line or less stands on one line, longer ones are broken, and nothing is lost."""
    num_taken_down = num_broken = 0
    for seed in range(150):
        random = Random(seed)
        columns = random.randint(20, 60)
        words = ["".join(random.choices("abcdefg漢é", k=random.randint(1, 25))) for _ in range(random.randint(1, 40))]
        text, paper = " ".join(words), Paper(columns)
        lines = WordWrapper(paper.output, 0)
        pieces = cut(text, random)
        for piece in pieces:
            row = paper.screen.cursor.y
            before = paper.line(row)
            lines.write(piece)
            num_taken_down += not paper.line(row).startswith(before)
        shown = [line for line in paper.lines() if line]
        assert "".join(shown).replace(" ", "") == "".join(words)
        assert all(wcswidth(line) < columns for line in shown)
        whole = " ".join(shown).split()
        short = [word for word in words if wcswidth(word) <= (columns - 1) // 2]
        assert set(short) <= set(whole)
        num_broken += len(short) < len(words) and len(whole) > len(words)
    assert min(num_taken_down, num_broken) > 20


def cut(text, random):
    at = sorted(random.choices(range(len(text) + 1), k=len(text) // 3))
    return [text[start:end] for start, end in pairwise([0, *at, len(text)])]


def test_line_breaks_and_tabs_of_a_text_are_kept():
    paper = Paper(30)
    lines = WordWrapper(paper.output, 0)
    lines.write("one\n\n\ttwo   three\nfour")
    assert paper.lines() == ["one", "", "    two   three", "four"]
    assert lines.column == 4


# --- who is talking -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stdin", "stdout", "term", "plain"),
    [
        (True, True, "xterm", False),
        (True, False, "xterm", True),
        (False, True, "xterm", True),
        (False, False, "xterm", True),
        (True, True, "dumb", True),
    ],
)
def test_a_pipe_on_either_side_makes_it_plain(monkeypatch, stdin, stdout, term, plain):
    met = []
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: stdin))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: stdout))
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(terminal, "_talk_through_pipe", lambda *_: met.append("plain") or True)
    monkeypatch.setattr(terminal, "_talk_at_terminal", lambda *_: met.append("terminal"))
    assert talk(None, Path("history"), completes=False)
    assert met == ["plain" if plain else "terminal"]


def completions(text):
    session = SimpleNamespace(sampling=SamplingSettings(), max_new_tokens=256)
    found = EntryCompleter(session).get_completions(Document(text), CompleteEvent())
    return [completion.text for completion in found]


def test_commands_and_settings_are_completed_and_messages_are_not(tmp_path):
    assert set(completions("/")) == set(COMMANDS)
    assert completions("/se") == ["/set"]
    assert completions("/set top") == ["top_k", "top_p"]
    (tmp_path / "chat.jsonl").touch()
    assert completions(f"/load {tmp_path}/ch") == ["at.jsonl"]
    assert completions("") == completions("hello /s") == completions("/set top_k 1") == completions("//s") == []
