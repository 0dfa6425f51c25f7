"""`data.columns`: what columns of other names are in a known layout, as KEY=COLUMN."""

from collections.abc import Iterator, Sequence
from typing import Any


def column_words(given: Any) -> Any:
    """Return KEY=COLUMN one by one, however they are given: in words, divided by commas, or as a mapping."""
    if isinstance(given, dict):
        return [f"{key}={column}" for key, column in given.items()]
    if not isinstance(given, list | tuple):
        return given
    return [part.strip() for word in given for part in str(word).split(",")]


def keys_and_columns(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return what KEY=COLUMN names, empty where it is not given."""
    parts = (word.partition("=") for word in words)
    return [(key.strip(), column.strip()) for key, _, column in parts]


def column_problems(words: Sequence[str], setting: str) -> Iterator[str]:
    """Yield what is wrong with the words of a setting."""
    pairs = keys_and_columns(words)
    for key, column in pairs:
        if not key or not column:
            yield f"`{setting}` must be KEY=COLUMN, as prompt=question, but holds {key or column or '='}"
    for kind, names in zip(("key", "column"), zip(*pairs, strict=True), strict=False):
        for name in sorted({name for name in names if name and names.count(name) > 1}):
            yield f"`{setting}` must name each {kind} once, but names {name} {names.count(name)} times"
