"""A chat in a terminal, or through a pipe where there is none.

    terminal    line editing, history and a status line; Ctrl-C stops a reply, Ctrl-D leaves
    pipe        every line of stdin is an entry; the replies alone go to stdout, all else to stderr

An entry is a message, or a command where it begins with a slash. Whatever is printed has its control characters
spelled out, so that no text can drive the terminal.
"""

import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.styles import Style
from prompt_toolkit.utils import get_cwidth, is_dumb_terminal

from gpt2ft.chat.commands import COMMANDS, Chat, settings_of, spell
from gpt2ft.chat.session import Session
from gpt2ft.inference.prompt_format import Turn
from gpt2ft.settings.sections import SamplingSettings
from gpt2ft.system import typing_unseen
from gpt2ft.text.display import escape_control_characters, nobody_reads
from gpt2ft.wording import counted


def talk(session: Session, history: Path, completes: bool, notice: str = "") -> bool:
    """Hold a conversation until the person leaves or the input ends.

    Args:
        history: the file that keeps what was entered at a terminal.
        completes: continue what is entered as a document instead of answering it; a pipe is one document.
        notice: what to say first.

    Returns:
        True if everything that was entered through a pipe could be done.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or is_dumb_terminal():
        return _talk_through_pipe(session, completes, notice)
    _talk_at_terminal(session, history, completes, notice)
    return True


# --- through a pipe -------------------------------------------------------------------------------------------------


class PipeScreen:
    """Turns on stdout and nothing else; notices and errors on stderr."""

    def interrupted(self) -> bool:
        return nobody_reads()  # Ctrl-C ends the program

    def turn(self, role: str | None, pieces: Iterable[str]) -> None:
        for piece in pieces:
            print(escape_control_characters(piece), end="", flush=True)
        print(flush=True)

    def transcript(self, turns: Sequence[Turn]) -> None:
        pass  # stdout is for replies alone

    def notice(self, text: str) -> None:
        if not nobody_reads():  # whoever reads has enough, and that is no news
            print(escape_control_characters(text), file=sys.stderr)

    def problem(self, text: str) -> None:
        self.notice(f"error: {text}")


def _talk_through_pipe(session: Session, completes: bool, notice: str) -> bool:
    chat = Chat(session, PipeScreen(), completes)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    if notice:
        chat.screen.notice(notice)
    if completes:
        chat.attempt(chat.say, sys.stdin.read().removesuffix("\n"))
    else:
        for line in sys.stdin:
            chat.enter(line.removesuffix("\n"))
            if not chat.is_open or nobody_reads():
                break
    return not chat.problems


# --- at a terminal --------------------------------------------------------------------------------------------------

STYLE = Style.from_dict({"user": "bold", "assistant": "bold ansimagenta", "system": "bold", "problem": "ansired"})

MIN_NAME_WIDTH = 8  # of a model on the status line, whose other parts have the first claim on the width


class WordWrapper:
    """Write text onto a screen as it streams, wrapped between words; `column` is where the cursor stands."""

    def __init__(self, output: Output, column: int) -> None:
        self.output = output
        self.column = column
        self._word = ""  # the characters on the screen since the last space

    def write(self, text: str) -> None:
        last_column = self.output.get_size().columns - 1  # stays empty: the cursor could not go back from it
        for character in text.expandtabs(4):
            width = get_cwidth(character)
            if character == "\n":
                self._break()
            elif self.column + width <= last_column:
                self._put(character, width)
            elif character == " ":
                self._word = ""  # not shown at the end of a line
            else:
                self._take_word_down(last_column)
                self._put(character, width)
        self.output.flush()

    def _put(self, character: str, width: int) -> None:
        self.output.write(character)
        self.column += width
        self._word = "" if character == " " else self._word + character

    def _break(self) -> None:
        self.output.write("\n")
        self.column, self._word = 0, ""

    def _take_word_down(self, last_column: int) -> None:
        """Break the line before its last word, or within it if it is too long for that."""
        word, width = self._word, get_cwidth(self._word)
        if not word or width > last_column // 2:
            self._break()
            return
        self.output.cursor_backward(width)
        self.output.erase_end_of_line()
        self._break()
        for character in word:
            self._put(character, get_cwidth(character))


class TerminalScreen:
    """A person's terminal: prompt with history and completion, labelled turns, a status line."""

    def __init__(self, prompt: str, history: History, session: Session) -> None:
        self.output = create_output(sys.stdout)
        self.session = session
        self._interrupted = False
        self._prompt = PromptSession(
            [("", "\n"), ("class:user", f"{prompt}> ")],
            multiline=True,
            prompt_continuation=" " * (len(prompt) + 2),
            history=history,
            completer=EntryCompleter(session),
            bottom_toolbar=self.status,
            key_bindings=_keys(),
            style=STYLE,
            output=self.output,
            enable_suspend=True,
            reserve_space_for_menu=4,
        )

    def read(self) -> str | None:
        """Return the next entry, None when the person leaves."""
        self._interrupted = False
        try:
            return self._prompt.prompt()
        except EOFError:
            return None

    def interrupted(self) -> bool:
        return self._interrupted

    @contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """Have Ctrl-C set a mark instead of raising KeyboardInterrupt amid a reply."""

        def mark(*_: Any) -> None:
            self._interrupted = True

        before = signal.signal(signal.SIGINT, mark)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def turn(self, role: str | None, pieces: Iterable[str]) -> None:
        self._print(f"{role}> " if role else "", role or "", pieces)

    def transcript(self, turns: Sequence[Turn]) -> None:
        for role, text in turns:
            if role == "user":
                self.notice("")
            self.turn(role, [text])

    def notice(self, text: str) -> None:
        self._print("", "", [text])

    def problem(self, text: str) -> None:
        self._print("error: ", "problem", [text])

    def _print(self, label: str, style: str, pieces: Iterable[str]) -> None:
        """Print a label in its colour, then text as it comes."""
        print_formatted_text(FormattedText([(f"class:{style}", label)]), style=STYLE, output=self.output, end="")
        lines = WordWrapper(self.output, column=len(label))
        try:
            for piece in pieces:
                lines.write(escape_control_characters(piece))
        finally:
            lines.write("\n")

    def status(self) -> str:
        """Return the line below the prompt, as wide as the screen at the most."""
        session, last = self.session, self.session.last
        parts = []
        if last:
            parts.append(f"{counted(last.tokens, 'token')}, {last.tokens_per_second:,.0f} tokens/s")
            parts.append(f"context {last.prompt_tokens + last.tokens:,}/{session.model.n_positions:,}")
        usual = SamplingSettings().model_dump()
        changed = {key: value for key, value in session.sampling.model_dump().items() if value != usual[key]}
        rest = "".join(f" | {part}" for part in [*parts, *([spell(changed)] if changed else [])])
        room = max(MIN_NAME_WIDTH, self.output.get_size().columns - len(rest) - 2)
        name = session.model.source
        name = name if len(name) <= room else f"...{name[3 - room :]}"
        return escape_control_characters(f" {name}{rest}")


class EntryCompleter(Completer):
    """Complete commands and what follows them; never messages."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        name, space, rest = document.text_before_cursor.partition(" ")
        if not space:
            for command, about in COMMANDS.items():
                if name and command.startswith(name):
                    yield Completion(command, -len(name), display_meta=about.meaning)
        elif name == "/set" and " " not in rest:
            for setting, value in settings_of(self.session).items():
                if setting.startswith(rest):
                    yield Completion(setting, -len(rest), display_meta=spell({"now": value}))
        elif name in ("/save", "/load"):
            yield from self.files.get_completions(Document(rest), complete_event)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return keys


def _open_history(file: Path) -> tuple[History, str]:
    """Return what was entered before, and why it cannot be kept if so."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        return FileHistory(file), ""
    except OSError as error:
        return InMemoryHistory(), f"what you enter is not kept: {file} cannot be written ({error.strerror})"


def _talk_at_terminal(session: Session, history: Path, completes: bool, notice: str) -> None:
    kept, trouble = _open_history(history)
    screen = TerminalScreen("text" if completes else "user", kept, session)
    chat = Chat(session, screen, completes)
    for line in (f"{session.model.source}: /help lists what you can do, Ctrl-D leaves", notice, trouble):
        if line:
            screen.notice(line)
    with screen.catching_interrupts(), typing_unseen():
        while chat.is_open and (entered := screen.read()) is not None:
            chat.enter(entered)
