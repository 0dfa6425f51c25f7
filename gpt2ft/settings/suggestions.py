"""Names that are meant by names that do not exist: by meaning, then by spelling; a wrong guess is worse than none.

Imported where a mistake has been made, and so by no script that runs.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gpt2ft.settings.field_names import FIELD_NAMES

MOST_GUESSES = 3
LEAST_LIKENESS = 0.85


def setting_meant(name: str, known: Sequence[str], sections: Sequence[str] = ()) -> str:
    """Return ` (did you mean `x`?)` for a setting that does not exist; empty if nobody could tell.

    Args:
        known: the dotted names of all settings.
        sections: that may be meant by spelling alone.
    """
    section, _, last = name.rpartition(".")
    within = f"{section.rpartition('.')[2]}.{last}"
    field_name = FIELD_NAMES.get(_plain(within)) or FIELD_NAMES.get(_plain(last))
    meant = [setting for setting in (field_name.settings if field_name else ()) if setting in known]
    if field_name and (meant or not field_name.settings):
        return did_you_mean(meant, field_name.note)
    return did_you_mean(_elsewhere(name, known) or _most_like(name, [*sections, *known], _setting_likeness))


def did_you_mean(names: Sequence[str], note: str = "") -> str:
    """Return a question for these names, and a note where there is one; empty if there is neither."""
    question = f"did you mean {either([f'`{name}`' for name in names])}?" if names else ""
    words = " ".join(part for part in (question, note) if part)
    return f" ({words})" if words else ""


def either(choices: Sequence[str], conjunction: str = "or") -> str:
    """Return `a, b or c`."""
    *others, last = choices
    return f"{', '.join(others)} {conjunction} {last}" if others else last


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean `x`?)` for the known names that are spelled most like `name`; empty if none is."""
    return did_you_mean(_most_like(name, known, _likeness))


def nearest_path(path: str | Path, others: Iterable[str | Path]) -> str:
    """Return the same for files and folders, by their own names and not by where they lie."""
    names = {str(other): Path(other).name for other in others}
    meant = _most_like(Path(path).name, set(names.values()), _file_likeness)
    return did_you_mean([other for other, name in names.items() if name in meant][:MOST_GUESSES])


def _most_like(name: str, known: Iterable[str], likeness: Callable[[str, str], float]) -> list[str]:
    scores = {other: likeness(name, other) for other in known}
    best = max(scores.values(), default=0.0)
    return [other for other in scores if scores[other] == best][:MOST_GUESSES] if best >= LEAST_LIKENESS else []


def _elsewhere(name: str, known: Sequence[str]) -> list[str]:
    """Return the settings of that very name in other sections, or written with other lines between the words."""
    last = _plain(name.rpartition(".")[2])
    return [other for other in known if _plain(other.rpartition(".")[2]) == last][:MOST_GUESSES]


def _setting_likeness(name: str, other: str) -> float:
    """Return how alike the least alike parts of two settings are; a section may be left out."""
    parts, others = name.split("."), other.split(".")
    others = others[-len(parts) :]
    if len(parts) != len(others):
        return 0.0
    compare = _likeness if len(parts) > 1 else _likeness_of_words  # the beginning of a word says little by itself
    return min(map(compare, parts, others))


def _file_likeness(name: str, other: str) -> float:
    """Return how alike two names of files are without their endings, which must be alike too or not be there."""
    parts, others = name.split(".", 1), other.split(".", 1)
    if 5 <= len(others[0]) < len(parts[0]) <= 2 * len(others[0]) and parts[0].startswith(others[0]):  # `alpaca_en`
        parts[0] = others[0]
    if len(parts) == len(others) == 2 and sorted(parts[1]) == sorted(others[1]):  # `.cvs`
        parts[1] = others[1]
    return min(_likeness(part, another) for part, another in zip(parts, others, strict=False))


def _likeness(word: str, other: str) -> float:
    """Return how alike two words are, from 0 to 1; one may be the beginning of the other."""
    is_beginning = len(word) >= 3 and _plain(other).startswith(_plain(word))
    return max(0.9 * is_beginning, _likeness_of_words(word, other))


def _likeness_of_words(word: str, other: str) -> float:
    word, other = _plain(word), _plain(other)
    if len(word) == len(other) >= 4:
        differing = sum(letter != another for letter, another in zip(word, other, strict=True))
        if differing == 1 or (differing and sorted(word) == sorted(other)):  # another letter, or another order
            return 0.9
    return difflib.SequenceMatcher(None, word, other).ratio()


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
