"""Commands are spelled as a person would type them, from a clone and from an installed package."""

import sys
from types import SimpleNamespace

import psutil
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
    arguments = typed[1:] if typed[0].endswith("sft.py") else typed[2:]
    assert command_line.running_command() == " ".join([running, *arguments])


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        (["bash"], "python launch/sft.py mine --data.train 'a b'"),
        (
            ["/usr/bin/python3", "/usr/bin/accelerate", "launch", "--num_processes", "1", "launch/sft.py", "a b"],
            "accelerate launch --num_processes 1 launch/sft.py 'a b'",
        ),
        (["python", "-m", "accelerate.commands.launch", "launch/sft.py"], "accelerate-launch launch/sft.py"),
        (["python", "/usr/bin/torchrun", "--standalone", "launch/sft.py"], "torchrun --standalone launch/sft.py"),
        (["python", "-m", "torch.distributed.run", "launch/sft.py"], "torchrun launch/sft.py"),
    ],
)
def test_the_same_command_has_its_launcher_and_all_arguments(parent, expected, monkeypatch):
    class Process:
        def parent(self):
            return SimpleNamespace(cmdline=lambda: parent)

    monkeypatch.setattr(psutil, "Process", Process)
    monkeypatch.setattr(sys, "argv", ["launch/sft.py", "mine", "--data.train", "a b"])
    assert command_line.same_command() == expected
