"""Behaviour of replies, measured without a judge: pure functions on texts, in whatever way these were sampled.

Words are runs of letters and digits, each Chinese, Japanese or Thai character one of its own; punctuation marks count
as words in n-grams, so that a loop of them is seen.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from gpt2ft.report.instructions import obeys
from gpt2ft.report.intervals import mean
from gpt2ft.report.schema import Metric

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}"
_PIECES = regex.compile(rf"[{_UNSPACED}]|[\w--[{_UNSPACED}]]+|[^\w\s]", regex.V1)
_USER = r"user|human|prompter|usuario|utilisateur|benutzer|nutzer|utente|пользователь|用户|ユーザー"
_FORGED = regex.compile(
    rf"(?:^|[.!?]\s)\W{{0,3}}(?:{_USER})\W{{0,3}}[:：]|<\|(?:user|prompter|im_start\|>user)|^\W{{0,9}}instruction\W{{0,9}}:|\[INST\]",
    regex.IGNORECASE | regex.MULTILINE,
)
COPIED = 8  # words of the prompt in a row, or all of it, that a reply must repeat to have copied it
SHORTEST_COPIED = 4  # words; a shorter prompt is copied by a reply that says nothing else


@dataclass(frozen=True)
class Exchange:
    """What the user said last, and the reply to it.

    Attributes:
        stopped: the model ended its turn by itself.
        earlier: words of an earlier turn, one of which a reply that uses that turn holds.
        topic: words, one of which a reply on the topic holds.
    """

    prompt: str
    reply: str
    stopped: bool
    earlier: tuple[str, ...] = ()
    topic: tuple[str, ...] = ()


def pieces(text: str) -> list[str]:
    """Return words and punctuation marks in lower case, in their order."""
    return _PIECES.findall(text.lower())


def num_words(text: str) -> int:
    return sum(piece[0].isalnum() for piece in pieces(text))


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def repeated_share(text: str, n: int = 4) -> float:
    """Return the share of n-grams that stand earlier in the text too (Welleck et al. 2020, "rep"); 0 if there is none.

    A loop comes near 1, and good prose is below 0.05.
    """
    found = ngrams(pieces(text), n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def longest_repeat(text: str) -> int:
    """Return the words of the longest run that stands in the text twice; the two may overlap.

    Runs are compared by numbers for those of half their length (Karp, Miller and Rosenberg 1972): a loop of dots has
    more pieces than could be compared run by run.
    """
    length, codes = 1, pieces(text)  # codes: what stands for each run of `length` words

    def some_twice(longer: int) -> bool:
        runs = list(zip(codes, codes[longer - length :], strict=False))
        return len(set(runs)) < len(runs)

    if not some_twice(1):
        return 0
    while some_twice(2 * length):
        numbers: dict[tuple[Any, Any], int] = {}
        codes = [numbers.setdefault(run, len(numbers)) for run in zip(codes, codes[length:], strict=False)]
        length *= 2
    return length - 1 + bisect_left(range(length, 2 * length), True, key=lambda longer: not some_twice(longer))


def distinct_share(text: str, n: int) -> float | None:
    """Return the share of different n-grams in a reply (Li et al. 2016, "distinct"), or None if it has none."""
    found = ngrams(pieces(text), n)
    return len(set(found)) / len(found) if found else None


def writes_user_turn(text: str) -> bool:
    """Return True if the text goes on to speak for the user, as in "Tea.\\nUser: And cold?"."""
    return _FORGED.search(text) is not None


def copies_prompt(prompt: str, reply: str) -> bool:
    """Return True if the reply says the prompt again, or much of it: COPIED words in a row."""
    asked, said = ([word for word in pieces(text) if word[0].isalnum()] for text in (prompt, reply))
    if len(asked) < SHORTEST_COPIED:
        return bool(asked) and asked == said
    length = min(COPIED, len(asked))
    return not set(ngrams(asked, length)).isdisjoint(ngrams(said, length))


def holds_word(text: str, words: Sequence[str]) -> bool:
    """Return True if one of the words stands in the text as a whole word, in whatever case."""
    pattern = "|".join(map(regex.escape, words))
    return regex.search(rf"(?<!\w)(?:{pattern})(?!\w)", text, regex.IGNORECASE) is not None


METRICS: dict[str, Callable[[Exchange], float | None]] = {  # None where there is nothing to measure
    "ends_by_itself": lambda e: e.stopped,
    "cut": lambda e: not e.stopped,
    "empty": lambda e: not e.reply.strip(),
    "words": lambda e: num_words(e.reply),
    "repeated_4grams": lambda e: repeated_share(e.reply),
    "longest_repeat": lambda e: longest_repeat(e.reply),
    "distinct_1": lambda e: distinct_share(e.reply, 1),
    "distinct_2": lambda e: distinct_share(e.reply, 2),
    "writes_user_turn": lambda e: writes_user_turn(e.reply),
    "copies_prompt": lambda e: copies_prompt(e.prompt, e.reply),
    "uses_earlier_turn": lambda e: holds_word(e.reply, e.earlier) if e.earlier else None,
    "obeys": lambda e: obeys(e.prompt, e.reply),
    "on_topic": lambda e: holds_word(e.reply, e.topic) if e.topic else None,
}


def behaviour(exchanges: Sequence[Exchange], seed: int) -> dict[str, Metric]:
    """Return every metric that at least one exchange has, with its interval."""
    found = {}
    for name, measure in METRICS.items():
        values = [value for value in map(measure, exchanges) if value is not None]
        if values:
            found[name] = mean(values, seed)
    return found
