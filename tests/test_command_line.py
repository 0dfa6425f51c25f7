"""Commands are spelled as a person would type them, from a clone and from an installed package."""

import sys

import pytest

from gpt2ft import command_line


@pytest.mark.parametrize(
    ("typed", "running", "program", "following"),
    [
        (["launch/sft.py", "tea"], "launch/sft.py", "sft.py", ["python", "launch/chat.py"]),
        (["/home/me/gpt2ft/launch/sft.py"], "/home/me/gpt2ft/launch/sft.py", "sft.py", ["python", "launch/chat.py"]),
        (["/usr/bin/gpt2ft", "sft", "tea"], "-m gpt2ft sft", "gpt2ft sft", ["gpt2ft", "chat"]),
        (["/usr/lib/python3/gpt2ft/__main__.py", "sft"], "-m gpt2ft sft", "gpt2ft sft", ["gpt2ft", "chat"]),
        (["/usr/bin/gpt2ft"], "-m gpt2ft", "gpt2ft", ["gpt2ft", "chat"]),
    ],
)
def test_commands_are_spelled_as_they_were_typed(typed, running, program, following, monkeypatch):
    monkeypatch.setattr(sys, "argv", typed)
    assert command_line.running_script() == running
    assert command_line.program_name() == program
    assert command_line.words_to_start("chat") == following
    assert command_line.full_command().split()[1:] == typed[1:]
