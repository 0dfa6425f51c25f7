"""A person at a terminal, who talks with launch/chat.py in a process of its own."""

import re
import sys
from time import monotonic

import pexpect
import processes
import pyte
from processes import ROOT

SCRIPT = "launch/chat.py"
TIMEOUT = 300  # seconds until a test gives up


class Screen(pyte.Screen):
    """80 x 24 characters that answer when they are asked where the cursor is."""

    answer = staticmethod(lambda data: None)

    def write_process_input(self, data):
        self.answer(data)


class Person:
    """At a terminal: enters text, waits, looks."""

    def __init__(self, arguments, environment):
        command = [SCRIPT, *map(str, arguments)]
        variables = processes.environment(**environment)
        self.child = pexpect.spawn(
            sys.executable, command, env=variables, cwd=str(ROOT), dimensions=(24, 80), timeout=TIMEOUT
        )
        self.screen = Screen(80, 24)
        self.screen.answer = self.child.send
        self.stream = pyte.ByteStream(self.screen)
        self.received = b""
        self.wait_for_prompt(1)

    def lines(self):
        return [line.rstrip() for line in self.screen.display]

    def status(self):
        return self.lines()[-1]

    def num_prompts(self):
        return self.received.count(b"\x1b[?2004h")  # pasting begins to be told from typing

    def wait(self, is_met):
        """Reads until `is_met()`."""
        end = monotonic() + TIMEOUT
        while not is_met():
            assert monotonic() < end, "\n".join(self.lines())
            try:
                data = self.child.read_nonblocking(65536, timeout=0.1)
            except pexpect.TIMEOUT:
                continue
            self.received += data
            self.stream.feed(data)

    def wait_for_prompt(self, number):
        self.wait(lambda: self.num_prompts() >= number and self.is_drawn() and self.status())

    def is_drawn(self):
        """True once the last prompt is there as a whole: while it is drawn, the cursor is hidden."""
        drawing, prompt = self.received.rfind(b"\x1b[?25l"), self.received.rfind(b"\x1b[?2004h")
        return self.received.rfind(b"\x1b[?25h") > max(drawing, prompt)

    def said_since(self, place):
        """Return the text of a reply that began behind so many bytes, whether or not it is still on the screen."""
        text = re.sub(rb"\x1b\[[\d;?]*[a-zA-Z]", b"", self.received[place:])
        return text.rpartition(b"assistant> ")[2] if b"assistant> " in text else b""

    def enter(self, text):
        """Return the screen once there is another prompt."""
        number = self.num_prompts()
        self.child.send(text + "\r")
        self.wait_for_prompt(number + 1)
        return "\n".join(self.lines())

    def leaves(self):
        """Wait for the program's end; True if it ended well."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus == 0
