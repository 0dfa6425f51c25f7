"""A chat whose session only remembers, and whose screen keeps what is shown."""

from gpt2ft.chat.commands import Chat
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


class RememberingChat:
    """A chat of fakes: run("/new") gives what was shown for it."""

    def __init__(self, completes=False):
        self.session = FakeSession()
        self.screen = FakeScreen()
        self.chat = Chat(self.session, self.screen, completes)

    def __call__(self, text):
        self.screen.shown.clear()
        self.chat.enter(text)
        return list(self.screen.shown)


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
