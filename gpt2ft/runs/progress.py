"""Progress of one part of a longer work, for a person who waits: a bar in a terminal, lines now and then elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from gpt2ft.text.display import escape_control_characters, uses_colour

LINE = "{desc} {n_fmt}/{total_fmt}, {elapsed} passed, {remaining} left"
BAR = "{desc} {n_fmt}/{total_fmt} {bar} {elapsed} passed, {remaining} left"
SECONDS_BETWEEN_LINES = 30.0
WIDEST = 44  # columns of what is counted, so that the figures beside it fit 80


class _Lines:
    """A file that each state of a bar is a line of."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=self._stream, flush=True)

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def counting(what: str, total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of `total` items; what comes after the last begins again.

    Args:
        what: is done, and with what; before the count.
        shown: False makes every call do nothing, so that callers need not ask for their rank.
    """
    from tqdm import tqdm

    in_terminal, what = sys.stderr.isatty(), escape_control_characters(what)
    if in_terminal and len(what) > WIDEST:
        what = f"…{what[1 - WIDEST :]}"  # its end tells most
    how = {"bar_format": BAR, "dynamic_ncols": True, "colour": "cyan" if uses_colour(sys.stderr) else None}
    if not in_terminal:
        often = SECONDS_BETWEEN_LINES
        how = {"bar_format": LINE, "file": _Lines(sys.stderr), "mininterval": often, "maxinterval": often}
    with tqdm(desc=what, total=total, miniters=1, disable=not shown, **how) as bar:

        def advance() -> None:
            if bar.n == total:
                bar.reset()
            bar.update()

        yield advance
