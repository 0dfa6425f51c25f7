"""From ids, as they are sampled, to text that can be shown at once: whole characters, no part of a stop string."""

import codecs
from collections.abc import Sequence

from gpt2ft.text.tokenizer import ChatTokenizer


class Utf8Stream:
    """Ids in, text out; all of it together equals `tokenizer.decode` of all ids.

    A character whose bytes are spread over several tokens comes with the last of them.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that is certain now.

        Raises:
            ValueError: if the id is not in use.
        """
        name_or_bytes = self._tokenizer.token_bytes(id) or self._tokenizer.decode([id]).encode()
        return self._decoder.decode(name_or_bytes)

    def finish(self) -> str:
        """The rest: U+FFFD where a character is incomplete."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Text up to the first stop string, however both are cut into pieces.

    The first is the one that is complete first. Text that may be the beginning of one is held back until that is
    decided.

    Attributes:
        found: a stop string has come; it and all that follows is dropped.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if not all(strings):
            raise ValueError("a stop string must have at least one character, but one is empty")
        self.found = False
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may pass."""
        if self.found:
            return ""
        self._held += text
        starts = [(string, self._held.find(string)) for string in self._strings]
        places = [(start + len(string), start) for string, start in starts if start >= 0]
        if places:
            self.found = True
            return self._release(min(places)[1])
        return self._release(len(self._held) - self._num_undecided())

    def finish(self) -> str:
        """The text that was held back, if nothing has come that completes it."""
        return "" if self.found else self._release(len(self._held))

    def _num_undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        ends = (length for length in lengths if any(s.startswith(self._held[-length:]) for s in self._strings))
        return next(ends, 0)

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released


class IncrementalDetokenizer:
    """The text of one reply, piece by piece, as its ids come.

    Args:
        stop_strings: end the reply, and are not part of it.
        strips_leading_space: white space at its beginning is not part of it either.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, stop_strings: Sequence[str] = (), strips_leading_space: bool = False
    ) -> None:
        self._characters = Utf8Stream(tokenizer)
        self._stop = StopStrings(stop_strings)
        self._strips = strips_leading_space

    @property
    def is_stopped(self) -> bool:
        """True once a stop string has come."""
        return self._stop.found

    def push(self, id: int) -> str:
        """The text that is certain now."""
        return self._stripped(self._stop.push(self._characters.push(id)))

    def finish(self) -> str:
        """The rest, where no more ids come."""
        return self._stripped(self._stop.push(self._characters.finish()) + self._stop.finish())

    def _stripped(self, piece: str) -> str:
        if self._strips:
            piece = piece.lstrip()
            self._strips = not piece
        return piece
