"""Instructions that can be checked without a judge, found in the words of a prompt. English alone.

in one sentence | in at most 20 words | use the word "kettle" | do not use the word "tea" | begin with "Dear" |
end with "Goodbye" | answer yes or no | in capital letters | in lower case | list three ... | as a list | as JSON
"""

import json
from collections.abc import Callable

import regex

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_NUMBER = rf"(?P<number>\d{{1,9}}|{'|'.join(NUMBERS)})"
_QUOTED = r"(?:[\"“'‘`](?P<text>[^\"”'’`]+)[\"”'’`]|(?P<bare>\w+))"
_MOST = r"(?P<most>at most|no more than|up to|fewer than|less than|under)"
_NOT = r"(?:do not|don't|don’t|never|without) "


def _number(found: regex.Match) -> int:
    word = found["number"].lower()
    return NUMBERS.get(word) or int(word)


def _text(found: regex.Match) -> str:
    return (found["text"] or found["bare"]).lower()


def _sentences(reply: str) -> int:
    return len(
        [part for part in regex.split(r"(?<![.!?。！？])[.!?。！？]+[\"”'’)]*(?:\s+|$)", reply.strip()) if part.strip()]
    )


def _words(reply: str) -> int:
    return len(reply.split())


def _items(reply: str) -> int:
    """Return the lines that begin as those of a list do."""
    return len(regex.findall(r"^[^\S\n]*(?:[-*•]|\d+[.)])\s+\S", reply, regex.MULTILINE))


def _holds(reply: str, found: regex.Match) -> bool:
    return regex.search(rf"(?<!\w){regex.escape(_text(found))}(?!\w)", reply.lower()) is not None


def _is_json(reply: str) -> bool:
    try:
        json.loads(reply)
    except (ValueError, RecursionError):
        return False
    return True


def _within(count: int, found: regex.Match) -> bool:
    most = found["most"].lower()
    return 0 < count < _number(found) + (most not in ("fewer than", "less than", "under"))


_CHECKS: list[tuple[str, Callable[[str, regex.Match], bool]]] = [
    (rf"\bin (?:exactly )?{_NUMBER} sentences?\b", lambda reply, found: _sentences(reply) == _number(found)),
    (rf"\b{_MOST} {_NUMBER} sentences?\b", lambda reply, found: _within(_sentences(reply), found)),
    (rf"\b(?:in|with) (?:exactly )?{_NUMBER} words?\b(?! or)", lambda reply, found: _words(reply) == _number(found)),
    (rf"\b{_NUMBER} words? or (?:fewer|less)\b", lambda reply, found: 0 < _words(reply) <= _number(found)),
    (rf"\b{_MOST} {_NUMBER} words?\b", lambda reply, found: _within(_words(reply), found)),
    (rf"(?<!{_NOT})\b(?:use|include|with) the word {_QUOTED}", _holds),
    (rf"{_NOT}(?:us(?:e|ing) )?the word {_QUOTED}", lambda reply, found: not _holds(reply, found)),
    (rf"\b(?:begin|start)(?: your (?:reply|answer))? with {_QUOTED}", lambda reply, found: _opens(reply, _text(found))),
    (rf"\b(?:end|finish)(?: your (?:reply|answer))? with {_QUOTED}", lambda reply, found: _ends(reply, _text(found))),
    (r"\b(?:answer|reply|say)\b[^.?!]{0,20} yes or no\b", lambda reply, _: _opens(reply, "yes") or _opens(reply, "no")),
    (r"\b(?:in|all) (?:capital letters|capitals|caps|upper ?case)\b", lambda reply, found: reply.isupper()),
    (r"\bin (?:all )?(?:lower ?case|small) ?(?:letters)?\b", lambda reply, found: reply.islower()),
    (rf"\blist (?:of )?(?:exactly )?{_NUMBER}\b", lambda reply, found: _items(reply) == _number(found)),
    (r"\bas a (?:\w+ )?list\b|\bin bullet points\b", lambda reply, found: _items(reply) > 0),
    (r"\b(?:as|in) (?:valid )?json\b", lambda reply, found: _is_json(reply)),
]  # fmt: skip
CHECKS = [(regex.compile(pattern, regex.IGNORECASE), check) for pattern, check in _CHECKS]


def _opens(reply: str, text: str) -> bool:
    return regex.match(rf"\W*{regex.escape(text)}(?!\w)", reply.lower()) is not None


def _ends(reply: str, text: str) -> bool:
    return regex.search(rf"(?<!\w){regex.escape(text)}\W*$", reply.lower()) is not None


def obeys(prompt: str, reply: str) -> bool | None:
    """Return True if the reply obeys every instruction of the prompt that can be checked; None if there is none."""
    results = [check(reply, found) for pattern, check in CHECKS if (found := pattern.search(prompt))]
    return all(results) if results else None
