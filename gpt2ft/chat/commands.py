"""The entries of a chat, which are messages or commands that begin with a slash. Knows nothing of terminals."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from gpt2ft.chat.session import Session
from gpt2ft.files import user_path
from gpt2ft.inference.prompt_format import Turn
from gpt2ft.settings.sections import SamplingSettings
from gpt2ft.wording import counted


class Screen(Protocol):
    """A place where a chat is shown."""

    def interrupted(self) -> bool:
        """True if the reply under way is to stop."""

    def turn(self, role: str | None, pieces: Iterable[str]) -> None:
        """Show a turn as it comes, or a document where there is no role."""

    def transcript(self, turns: Sequence[Turn]) -> None:
        """Show the turns of a conversation that is loaded."""

    def notice(self, text: str) -> None: ...

    def problem(self, text: str) -> None: ...


class Chat:
    """A session and the entries that change it. None of them ends the program, except /quit, /exit, quit and exit."""

    def __init__(self, session: Session, screen: Screen, completes: bool = False) -> None:
        self.session = session
        self.screen = screen
        self.completes = completes
        self.is_open = True
        self.problems = 0
        self._lines: dict[Path, tuple[int, int]] = {}  # of this conversation in files: first byte, and behind the last

    def enter(self, text: str) -> None:
        """Carry out one entry."""
        word = text.strip().lower()
        if word in ("/quit", "/exit") or (word in ("quit", "exit") and not self.completes):
            self.quit(text)
        elif text.startswith("//"):
            self.attempt(self.say, text[1:])
        elif text.startswith("/"):
            self.attempt(self._command, text)
        elif text.strip():
            self.attempt(self.say, text)

    def attempt(self, action: Callable[[str], None], text: str) -> None:
        """Call `action`, and show in a sentence why it cannot be done if so."""
        try:
            action(text)
        except ValueError as error:
            self.problems += 1
            self.screen.problem(str(error))

    def say(self, text: str) -> None:
        if self.completes:
            goes_on = self.session.complete(text, should_stop=self.screen.interrupted)
            self.screen.turn(None, chain([text], goes_on))
        else:
            self.session.say(text)
            self._reply()

    def _reply(self) -> None:
        self.screen.turn("assistant", self.session.reply(should_stop=self.screen.interrupted))
        last = self.session.last
        if last.dropped_turns:
            many = last.dropped_turns > 1
            oldest = f"{last.dropped_turns} oldest turns no longer fit" if many else "oldest turn no longer fits"
            self.screen.notice(f"[the {oldest} the context]")
        if last.finish == "length":
            self.screen.notice(f"[cut off after {counted(last.tokens, 'token')}; /set max_new_tokens allows more]")
        elif last.finish == "context":
            self.screen.notice("[cut off: the context is full]")
        elif last.finish == "interrupted":
            self.screen.notice("[stopped]")

    def _command(self, text: str) -> None:
        name, argument, *_ = (*text.split(maxsplit=1), "")
        if name not in COMMANDS:
            from gpt2ft.settings.suggestions import did_you_mean, nearest_name

            meant = did_you_mean([MEANT[name]]) if name in MEANT else nearest_name(name, COMMANDS)
            raise ValueError(
                f"there is no command {name}{meant or ' (/help lists them)'}; // begins a text with a slash"
            )
        command = COMMANDS[name]
        if self.completes and command.needs_turns:
            raise ValueError(f"{name} needs a conversation, and `--complete` has none")
        if command.needs_argument and not argument:
            raise ValueError(f"{name} must be followed by {command.argument}")
        if argument and not command.argument:
            raise ValueError(f"{name} must stand alone, but is followed by {argument.strip()}")
        command.run(self, argument.strip())

    def new(self, _: str) -> None:
        self.session.new()
        self._lines.clear()
        self.screen.notice("a new conversation")

    def system(self, text: str) -> None:
        self.session.system = text or None
        self.screen.notice("the system text is set" if text else "there is no system text now")

    def undo(self, _: str) -> None:
        self.session.undo()
        turns = len(self.session.turns)
        self.screen.notice(f"the last exchange is taken back; {counted(turns, 'turn')} left")

    def retry(self, _: str) -> None:
        self.session.retry()
        self._reply()

    def save(self, name: str) -> None:
        file = user_path(name)
        line = json.dumps({"messages": self.session.to_messages()}, ensure_ascii=False) + "\n"
        try:
            is_added = self._write(file, line.encode(errors="replace"))  # halves of characters are no text
        except OSError as error:
            raise ValueError(f"{file} cannot be written ({error.strerror})") from error
        self.screen.notice(f"{'added' if is_added else 'saved'} to {file}")

    def _write(self, file: Path, line: bytes) -> bool:
        """Write the conversation's line: over its earlier one while nothing follows that, else at the end of the file.

        Returns:
            True if other lines stand before it.

        Raises:
            ValueError: if there is something else than a file of conversations.
        """
        size = file.stat().st_size if os.path.lexists(file) else 0
        start, end = self._lines.get(file.resolve(), (0, 0))
        if end != size or not file.is_file():
            start = size
            if os.path.lexists(file) and (size or not file.is_file()):
                _read_messages(file)
        with open(file, "r+b" if size else "wb") as lines:
            if start:
                lines.seek(start - 1)
                line = line if lines.read(1) == b"\n" else b"\n" + line
            lines.seek(start)
            lines.write(line)
            lines.truncate()
            self._lines[file.resolve()] = start, lines.tell()
        return start > 0

    def load(self, name: str) -> None:
        file = user_path(name)
        messages, is_only = _read_messages(file)
        try:
            self.session.from_messages(messages)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        self._lines.clear()
        loaded = self.session.to_messages()
        self.screen.transcript([(message["role"], message["content"]) for message in loaded])
        self.screen.notice(f"loaded {'' if is_only else 'the first conversation of '}{file}")

    def set(self, text: str) -> None:
        values = settings_of(self.session)
        if text:
            name, _, value = text.partition(" ")
            if name not in values:
                from gpt2ft.settings.suggestions import setting_meant

                meant = setting_meant(name, list(values))
                raise ValueError(f"there is no setting {name}{meant}; there are {', '.join(values)}")
            values = {name: _number(name, value.strip()) if value else values[name]}
            if name == "max_new_tokens":
                self.session.max_new_tokens = values[name]
            else:
                self.session.sampling = _within_ranges(self.session.sampling.model_dump() | values)
        self.screen.notice(spell(values))

    def help(self, _: str) -> None:
        commands = {name: command for name, command in COMMANDS.items() if not (self.completes and command.needs_turns)}
        lines = {f"{name} {command.argument}": command.meaning for name, command in commands.items()} | KEYS
        self.screen.notice("\n".join(f"{usage:<16} {meaning}" for usage, meaning in lines.items()))

    def quit(self, _: str) -> None:
        self.is_open = False


@dataclass(frozen=True)
class Command:
    argument: str
    meaning: str
    run: Callable[[Chat, str], None]
    needs_argument: bool = False
    needs_turns: bool = True


COMMANDS = {
    "/new": Command("", "begin a new conversation", Chat.new),
    "/system": Command("TEXT", "set the system text; alone, remove it", Chat.system),
    "/undo": Command("", "take the last exchange back", Chat.undo),
    "/retry": Command("", "let the model answer again", Chat.retry),
    "/save": Command("FILE", "save as a line of training data, behind those in the file", Chat.save, True),
    "/load": Command("FILE", "go on with the first conversation of such a file", Chat.load, True),
    "/set": Command("NAME VALUE", "change how replies are made; alone, list it", Chat.set, needs_turns=False),
    "/help": Command("", "show this", Chat.help, needs_turns=False),
    "/quit": Command("", "leave, as exit, quit and Ctrl-D do", Chat.quit, needs_turns=False),
}
MEANT = {  # what the command is called elsewhere
    **dict.fromkeys(("/q", "/bye", "/leave", "/close", "/end", "/stop"), "/quit"),
    **dict.fromkeys(("/clear", "/reset", "/restart", "/c"), "/new"),
    **dict.fromkeys(("/regenerate", "/redo", "/again", "/regen"), "/retry"),
    **dict.fromkeys(("/back", "/delete", "/pop"), "/undo"),
    **dict.fromkeys(("/open", "/import", "/read"), "/load"),
    **dict.fromkeys(("/export", "/write"), "/save"),
    **dict.fromkeys(("/h", "/?", "/commands"), "/help"),
    **dict.fromkeys(("/sys", "/system_prompt", "/prompt"), "/system"),
    **dict.fromkeys(("/settings", "/config", "/options", "/show", "/parameters"), "/set"),
    **{f"/{name}": f"/set {name}" for name in SamplingSettings.model_fields},
    **dict.fromkeys(("/temp",), "/set temperature"),
    **dict.fromkeys(("/max_tokens", "/max_new_tokens", "/length"), "/set max_new_tokens"),
}
KEYS = {
    "//text": "send a text that begins with a slash",
    "Alt+Enter": "begin another line",
    "Ctrl-C": "stop the reply; at the prompt, clear it",
}
MAX_FILE_LENGTH = 16 << 20  # characters of a saved conversation
WHOLE_NUMBERS = ("top_k", "seed", "max_new_tokens")


def settings_of(session: Session) -> dict[str, float | None]:
    """Return what /set can change, with the present values."""
    return session.sampling.model_dump() | {"max_new_tokens": session.max_new_tokens}


def spell(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {'none' if value is None else value}" for name, value in values.items())


def _within_ranges(values: dict[str, Any]) -> SamplingSettings:
    """Raise ValueError if a value is out of its range."""
    try:
        return SamplingSettings(**values)
    except ValidationError as error:
        from gpt2ft.settings.refusals import explain

        raise ValueError("\n".join(explain(SamplingSettings, "/set", error))) from error


def _number(name: str, value: str) -> float | None:
    """Return a setting's value; its range is checked by those who take it."""
    if name == "seed" and value == "none":
        return None
    is_whole = name in WHOLE_NUMBERS
    try:
        return int(value) if is_whole else float(value)
    except ValueError:
        raise ValueError(f"`{name}` must be a {'whole ' if is_whole else ''}number, but is {value!r}") from None


def _read_messages(file: Path) -> tuple[list[Any], bool]:
    """Return the messages of a file's first conversation, and True if it is the only one.

    Raises:
        ValueError: if there are none.
    """
    if os.path.exists(file) and not os.path.isfile(file):
        raise ValueError(f"{file} must be a file, but is not")
    try:
        with open(file, encoding="utf-8") as lines:
            filled = (line for line in iter(lambda: lines.readline(MAX_FILE_LENGTH), "") if line.strip())
            found = list(islice(filled, 2))
        record = json.loads(found[0]) if found else None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must hold JSON lines, but does not") from error
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError(f'{file} must hold lines like {{"messages": [...]}}, but does not')
    return record["messages"], len(found) == 1
