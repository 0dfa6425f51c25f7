"""Text for people to look at: in colour and as wide as a terminal, plain and unbroken elsewhere."""

import io
import os
import shutil
import stat
import sys
import textwrap
from typing import Any, ClassVar, TextIO

from gpt2ft.system import is_pipe_unread, speak_utf8

LABEL_WIDTH = 10

# Control characters but newline and tab: those of ASCII, delete, and the eight-bit ones that terminals obey too.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def escape_control_characters(text: str) -> str:
    r"""Return `text` with its control characters spelled out, `\x1b` for escape, so that no text drives a terminal."""
    return text.translate(_ESCAPES)


def uses_colour(stream: TextIO) -> bool:
    """Return True if a stream is a terminal that shows colours, and nobody has asked for none."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def fit(line: str, indent: int) -> str:
    """Return a line for stdout: broken between words, with a hanging indent, where that is a terminal."""
    if not sys.stdout.isatty():
        return line
    width = max(40, shutil.get_terminal_size().columns)
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_on_hyphens=False)


def print_row(label: str, text: str) -> None:
    """Print a row of the table that a run opens with."""
    line = fit(f"{label:<{LABEL_WIDTH}}{escape_control_characters(text)}", LABEL_WIDTH)
    if uses_colour(sys.stdout):
        colour = "33" if label == "warning" else "36"
        line = f"\x1b[1;{colour}m{line[:LABEL_WIDTH]}\x1b[0m{line[LABEL_WIDTH:]}"
    print(line, flush=True)


class _Pipe(io.FileIO):
    """A pipe that what is written vanishes in once nobody reads it."""

    nobody_reads: ClassVar[bool] = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not is_pipe_unread(error):
                raise
            type(self).nobody_reads = True
            return len(data)


def outlive_readers() -> None:
    """Let a script go on, in silence, once nobody reads what it prints: under `| head` it still does all its work."""
    speak_utf8()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
            pipe = io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
            at_once = stream.line_buffering or stream.write_through
            setattr(sys, name, io.TextIOWrapper(pipe, stream.encoding, stream.errors, line_buffering=at_once))


def nobody_reads() -> bool:
    """Return True once something printed has found no reader."""
    return _Pipe.nobody_reads
