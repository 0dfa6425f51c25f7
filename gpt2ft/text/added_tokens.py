"""Tokens that were added to a vocabulary after its training: how folders declare them, and the words among them.

A control token is no text: no content makes its id. A word is text like any other, but BPE would take it apart, so it
is found before BPE cuts the rest, as tokenizers and transformers do.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import regex

from gpt2ft.files import read_json

FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")  # by precedence

# As Unicode has them and tokenizers uses them; Python's own \w and \s are others.
_LETTER = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")
_SPACE = regex.compile(r"\p{White_Space}")


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary.

    Attributes:
        special: it is no text.
        single_word: as text it counts only where no letter or digit touches it.
        lstrip, rstrip: it swallows the white space before it, behind it.
        normalized: it is looked for in what the tokens without this flag have left.
    """

    id: int
    special: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


def read_added_tokens(folder: Path) -> tuple[dict[str, AddedToken], set[str]]:
    """Return the added tokens that the files of a folder declare, by name, and the names that have a special purpose.

    Where no flag says what a token is, as in added_tokens.json, it is a word unless it is named as a special token or
    stands in brackets, as `<s>` and `[PAD]` do.

    Raises:
        ValueError: if a file is damaged, or two files say different things of a token.
    """
    description, config, plain, purposes = (
        read_json(folder / name) if (folder / name).exists() else {} for name in FILES
    )
    special = {*_named_special(folder / FILES[1], config), *_named_special(folder / FILES[3], purposes)}
    added = _union({}, folder / FILES[0], _listed(folder / FILES[0], description), special)
    added = _union(added, folder / FILES[1], _decoded(folder / FILES[1], config), special)
    ids = {name: {"id": id} for name, id in read_ids(folder / FILES[2], plain).items()}
    return _union(added, folder / FILES[2], ids, special), special


def read_ids(path: Path, table: Any) -> dict[str, int]:
    """Return a table from names to ids, checked."""
    if not isinstance(table, dict):
        raise ValueError(f"{path}: the vocabulary must give each token its id, but is a {type(table).__name__}")
    for name, id in table.items():
        if type(id) is not int or id < 0:
            raise ValueError(f"{path}: the id of {name!r} must be a whole number from 0 on, but is {id!r}")
    return table


def _listed(path: Path, description: Any) -> dict[str, dict[str, Any]]:
    """Return the list of tokenizer.json by name."""
    tokens = (isinstance(description, dict) and description.get("added_tokens")) or []
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise ValueError(f"{path}: `added_tokens` must be a list of objects, but is {brief(tokens)}")
    return _by_name(path, tokens)


def _decoded(path: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the table of tokenizer_config.json by name; its keys are the ids."""
    table = config.get("added_tokens_decoder") or {}
    if not isinstance(table, dict) or not all(isinstance(token, dict) for token in table.values()):
        raise ValueError(f"{path}: `added_tokens_decoder` must be a table of objects, but is {brief(table)}")
    ids = {key: int(key) if key.isdecimal() else key for key in table}
    return _by_name(path, [token | {"id": ids[key]} for key, token in table.items()])


def _by_name(path: Path, tokens: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    names = {field.name for field in fields(AddedToken)}
    for token in tokens:
        if not isinstance(token.get("content"), str):
            raise ValueError(f"{path}: an added token must have `content` and `id`, but is {brief(token)}")
        wrong = [name for name in sorted(names - {"id"}) if not isinstance(token.get(name, False), bool)]
        if wrong:
            raise ValueError(f"{path}: `{wrong[0]}` of {token['content']!r} must be true or false")
    read_ids(path, {token["content"]: token.get("id") for token in tokens})
    return {token["content"]: {name: token[name] for name in token.keys() & names} for token in tokens}


def _named_special(path: Path, purposes: Any) -> Iterator[str]:
    """Yield the names that a file gives a purpose: `eos_token` and the like, one or a list, with flags or without."""
    if not isinstance(purposes, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(purposes).__name__}")
    for key, value in purposes.items():
        if key.endswith(("_token", "_special_tokens")):
            if isinstance(value, dict) and "content" not in value:
                value = list(value.values())
            tokens = value if isinstance(value, list) else [value]
            names = [token.get("content") if isinstance(token, dict) else token for token in tokens]
            yield from (name for name in names if isinstance(name, str))


def _union(
    added: Mapping[str, AddedToken], path: Path, declared: Mapping[str, Mapping[str, Any]], special: set[str]
) -> dict[str, AddedToken]:
    """Return `added` with what `path` declares.

    Raises:
        ValueError: if a token is another there, or has no name.
    """
    union = dict(added)
    for name, values in declared.items():
        if not name:
            raise ValueError(f"{path}: the name of an added token must not be empty, but that of id {values['id']} is")
        if name in added and values.keys() == {"id"}:
            values = asdict(added[name]) | values
        is_special = name in special or values.get("special", name[:1] + name[-1:] in ("<>", "[]"))
        # No text is searched for control tokens, so their other flags mean nothing here.
        token = AddedToken(values["id"], True) if is_special else AddedToken(**{"special": False} | values)
        if union.setdefault(name, token) != token:
            raise ValueError(
                f"{path}: {name!r} must be declared alike, but is {union[name]} elsewhere and here {token}"
            )
    return union


def brief(value: Any) -> str:
    """Return `value` as code, cut after 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


class WordFinder:
    """Added words found in text: the first that begins, of several the longest, and none inside another."""

    def __init__(self, words: Mapping[str, AddedToken]) -> None:
        self._words = words
        passes = [sorted(name for name in words if words[name].normalized == late) for late in (False, True)]
        self._patterns = [_any_of(names) for names in passes if names]

    def split(self, text: str) -> list[str | int]:
        """Cut `text` into the ids of words and the texts between them, none of which is empty."""
        pieces: list[str | int] = [text]
        for pattern in self._patterns:
            pieces = [
                part
                for piece in pieces
                for part in (self._split(piece, pattern) if isinstance(piece, str) else [piece])
            ]
        return [piece for piece in pieces if piece != ""]

    def _split(self, text: str, pattern: regex.Pattern) -> Iterator[str | int]:
        done = 0
        for match in pattern.finditer(text):
            word, (start, end) = self._words[match[0]], match.span()
            touching = text[max(start - 1, 0) : start] + text[end : end + 1]
            if word.single_word and _LETTER.search(touching):
                continue
            while word.lstrip and start > done and _SPACE.match(text, start - 1):
                start -= 1
            while word.rstrip and _SPACE.match(text, end):
                end += 1
            yield text[done:start]
            yield word.id
            done = end
        yield text[done:]


def _any_of(names: list[str]) -> regex.Pattern:
    """Return a pattern for any of the names, the longest where several begin at one place."""
    return regex.compile("|".join(regex.escape(name) for name in sorted(names, key=len, reverse=True)))
