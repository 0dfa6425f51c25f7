"""Text on screens: control characters are spelled out, and everything else is left as it is."""

import os
import re
import subprocess
import sys

import pytest
from processes import environment

from gpt2ft.text.display import LABEL_WIDTH, escape_control_characters, print_row


@pytest.mark.parametrize(
    ("code", "shown"), [(0, r"\x00"), (27, r"\x1b"), (13, r"\x0d"), (127, r"\x7f"), (155, r"\x9b")]
)
def test_control_characters_are_spelled_out(code, shown):
    assert escape_control_characters(f"a{chr(code)}b") == f"a{shown}b"


def test_nothing_that_is_left_drives_a_terminal():
    shown = escape_control_characters("".join(map(chr, range(0x250))))
    assert {character for character in shown if not character.isprintable()} == {"\t", "\n", "\xa0", "\xad"}
    for text in ("What is tea?\n\tA hot drink.", "Thé, お茶 🍵", ""):
        assert escape_control_characters(text) == text


@pytest.fixture
def terminal(monkeypatch):
    """terminal(columns): stdout is one that wide."""

    def make(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    return make


LONG = "a source (OASST trees): 150 of 150 conversations, 17,493 tokens, 14,475 supervised; 1,011 messages read"


@pytest.mark.parametrize("columns", [80, 160])
def test_rows_fit_a_terminal_with_a_hanging_indent(columns, terminal, capsys):
    terminal(columns)
    print_row("train", LONG)
    print_row("", LONG)
    lines = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert len(lines) == (4 if columns == 80 else 2)
    assert max(map(len, lines)) <= columns
    assert all(line.startswith(" " * LABEL_WIDTH) != line.startswith("train") for line in lines)
    assert " ".join(line[LABEL_WIDTH:] for line in lines) == f"{LONG} {LONG}"


def test_labels_are_coloured_where_colours_are_shown(terminal, capsys, monkeypatch):
    terminal(80)
    print_row("model", "\x1b[2Jtea")
    shown = capsys.readouterr().out
    assert re.search("\x1b\\[[0-9;]+mmodel", shown)
    assert "\\x1b[2Jtea" in shown
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            print_row("model", "tea")
            assert capsys.readouterr().out == "model     tea\n"


def test_without_a_terminal_a_row_is_a_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    print_row("train", LONG)
    assert capsys.readouterr().out == f"train     {LONG}\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("streams", [["stdout"], ["stdout", "stderr"]])
def test_a_script_goes_on_in_silence_once_nobody_reads(streams, unbuffered, tmp_path):
    """As under `| head` and `2>&1 | head`: all that is printed fails, and the work is done all the same."""
    script = f"""
import sys
from gpt2ft.text.display import nobody_reads, outlive_readers
outlive_readers()
print("tea", flush=True)
print("and rain", file=sys.stderr, flush=True)
print("x" * 1_000_000)
open({str(tmp_path / "done")!r}, "w").write(str(nobody_reads()))
print("left in a buffer")
"""
    reader, writer = os.pipe()
    os.close(reader)
    given = environment(PYTHONUNBUFFERED=unbuffered or None)
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | dict.fromkeys(streams, writer)
    ended = subprocess.run([sys.executable, "-c", script], env=given, check=False, **pipes)
    os.close(writer)
    assert ended.returncode == 0
    assert (tmp_path / "done").read_text() == "True"
    assert ended.stderr in (None, b"and rain\n")


def test_every_script_outlives_its_readers():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "gpt2ft", "sft", "--help"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment(), check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")
