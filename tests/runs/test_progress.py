"""Progress of a part of a longer work: as lines in a file, as a bar in a terminal of 80 columns."""

import io
import sys

from gpt2ft.runs import progress
from gpt2ft.runs.progress import counting


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_tell_what_how_far_and_how_long(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with counting("tuned: replies", 3, True) as advance:
        for _ in range(3):
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tuned: replies 0/3, 00:00 passed, ? left"
    assert [line.split(",")[0] for line in lines[1:4]] == [f"tuned: replies {number}/3" for number in (1, 2, 3)]
    assert all("00:00 left" in line for line in lines[1:])


def test_a_second_pass_counts_anew(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with counting("pairs", 2, True) as advance:
        for _ in range(3):
            advance()
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()][:5] == [
        "pairs 0/2", "pairs 1/2", "pairs 2/2", "pairs 0/2", "pairs 1/2",
    ]  # fmt: skip


def test_one_bar_fits_the_terminal_whatever_it_is_called(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (80, 24))
    monkeypatch.setenv("NO_COLOR", "1")
    with counting("folder/" * 20 + "\x1b[31mtuned (2 of 3): replies", 30, True) as advance:
        advance()
    states = [state for state in terminal.getvalue().replace("\n", "\r").split("\r") if state.strip()]
    assert len(states) > 1
    assert max(map(len, states)) <= 80
    assert all("(2 of 3): replies" in state and state.rstrip().endswith("left") for state in states)
    assert "\x1b[31m" not in terminal.getvalue()


def test_others_show_nothing(capsys):
    with counting("tuned: replies", 1, False) as advance:
        advance()
    assert capsys.readouterr().err == ""
