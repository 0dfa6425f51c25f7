"""GPT-2's vocabulary, byte-level BPE, and how it is read from folders in the layout of Hugging Face.

A folder lists the tokens with their ids (vocab.json, or tokenizer.json), the two parts that each token joins, in the
order in which BPE joins them (merges.txt, or tokenizer.json again), and the names that are no text
(added_tokens.json). A merge's place in the list is its rank. All of it is checked.

In all these files each byte is written as one printable symbol: itself where it is printable in Latin-1, and
otherwise a letter from U+0100 on, so that a space reads as "Ġ".
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + index): byte for index, byte in enumerate(_HIDDEN)}
_SYMBOLS = {byte: symbol for symbol, byte in _BYTES.items()}

_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json")  # what a folder is read from

Merges = list[tuple[str, str]]


@dataclass(frozen=True)
class Vocabulary:
    """Text tokens and control tokens; together their ids run from 0 without a gap.

    Attributes:
        tokens: the text tokens by rank: the 256 bytes, then what each merge builds.
        ids: the id of each of them.
        control_ids: the id of each name that is no text.
    """

    tokens: list[bytes]
    ids: list[int]
    control_ids: dict[str, int]

    def __len__(self) -> int:
        return len(self.ids) + len(self.control_ids)

    def spellings(self) -> list[bytes]:
        """By id: the bytes of a text token, the name of a control token."""
        by_id = dict(zip(self.ids, self.tokens, strict=True))
        by_id |= {id: name.encode() for name, id in self.control_ids.items()}
        return [by_id[id] for id in range(len(self))]

    def names(self) -> list[str]:
        """By id: how vocab.json spells each token."""
        by_id = {id: _symbols(token) for id, token in zip(self.ids, self.tokens, strict=True)}
        by_id |= {id: name for name, id in self.control_ids.items()}
        return [by_id[id] for id in range(len(self))]

    def merges(self) -> list[str]:
        """By rank: how merges.txt spells each merge."""
        return [" ".join(map(_symbols, parts)) for parts in _parts_of_merges(self.tokens)]


def read_vocabulary(folder: Path, reserved: Collection[str]) -> Vocabulary:
    """The vocabulary of a folder: vocab.json and merges.txt, or else tokenizer.json.

    Added tokens, and the `reserved` names where they have an id, are control tokens.

    Raises:
        ValueError: if a file is missing, damaged, contradicts another, or describes another kind of tokenizer.
    """
    table = _read_folder(folder)
    tokens = _ranked_tokens(table)
    symbols = [_symbols(token) for token in tokens]
    control_ids = _control_ids(table, symbols, reserved)
    _check_gaps(table)
    return Vocabulary(tokens, [table.ids[symbol] for symbol in symbols], control_ids)


@dataclass(frozen=True)
class _Table:
    """The lists of a folder, in symbols."""

    source: Path  # the file that holds the merges
    ids: dict[str, int]  # of text tokens and control tokens alike
    merges: Merges
    added: dict[str, int]  # the ids of names that the folder declares as added tokens


def _control_ids(table: _Table, symbols: Sequence[str], reserved: Collection[str]) -> dict[str, int]:
    """The ids of the names that are no text.

    Raises:
        ValueError: if such a name is text as well, or is declared nowhere.
    """
    text = set(symbols)
    control_ids = {}
    for name, id in table.ids.items():
        declared = name in table.added or name in reserved
        if declared and name in text:
            raise ValueError(
                f"{table.source}: control token {name!r} must not be built by a merge, or text could forge it, but is"
            )
        if not declared and name not in text:
            raise ValueError(
                f"{table.source}: a merge must build {name!r} (id {id}), but none does: either the merges are cut "
                "short, or it is a control token that added_tokens.json must name"
            )
        if declared:
            control_ids[name] = id
    return control_ids


def _check_gaps(table: _Table) -> None:
    """Raise ValueError unless the ids run from 0 without a gap."""
    for expected, (id, name) in enumerate(sorted((id, name) for name, id in table.ids.items())):
        if id != expected:
            found = f"{id} comes twice" if id < expected else f"{expected} is missing"
            raise ValueError(f"{table.source}: the token ids must run from 0 without a gap, but {found} (at {name!r})")


def _symbols(token: bytes) -> str:
    return "".join([_SYMBOLS[byte] for byte in token])


def _ranked_tokens(table: _Table) -> list[bytes]:
    """The text tokens by rank: the 256 bytes, then what each merge builds.

    Raises:
        ValueError: if a byte has no id, a merge joins what no earlier one built, builds what has no id or was built
            before, or joins other parts than tiktoken would, which knows ranks only.
    """
    built = dict.fromkeys(sorted(_BYTES))
    for symbol in built:
        if symbol not in table.ids:
            raise ValueError(f"{table.source}: the vocabulary must hold all 256 bytes, but lacks {symbol!r}")
    for number, (left, right) in enumerate(table.merges, start=1):
        merge = f"{table.source}: merge {number} ({left} {right})"
        for part in (left, right):
            if part not in table.ids:
                raise ValueError(f"{merge} joins {part!r}, which the vocabulary lacks")
            if part not in built:
                raise ValueError(f"{merge} joins {part!r}, which no merge before it builds")
        if left + right not in table.ids:
            raise ValueError(f"{merge} builds {left + right!r}, which the vocabulary lacks")
        if left + right in built:
            raise ValueError(f"{merge} builds {left + right!r} a second time")
        built[left + right] = None
    tokens = [bytes([_BYTES[symbol] for symbol in token]) for token in built]
    _check_order(table, tokens)
    return tokens


def _check_order(table: _Table, tokens: list[bytes]) -> None:
    """Raise ValueError unless each merge joins what the merges before it leave of its token.

    tiktoken joins any two neighbours that make a token. Where this holds, as in every trained vocabulary, those are
    always the two that the merge names.
    """
    for number, (merge, left) in enumerate(zip(table.merges, _parts_of_merges(tokens), strict=True), start=1):
        parts = [_symbols(part) for part in left]
        if parts != list(merge):
            raise ValueError(
                f"{table.source}: merge {number} ({' '.join(merge)}) must join what the merges before it leave, "
                f"but they leave {' '.join(parts)}; are the merges out of order?"
            )


def _parts_of_merges(tokens: Sequence[bytes]) -> Iterator[list[bytes]]:
    """For each token beyond the bytes, what the merges before it make of its bytes: the two parts of its own merge."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return (_parts_before(token, rank, ranks) for rank, token in enumerate(tokens) if len(token) > 1)


def _parts_before(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """BPE of `token` by the merges below `rank` alone."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        lowest = min(joined)
        if lowest >= rank:
            break
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


# --- the files of a folder ---


def _read_folder(folder: Path) -> _Table:
    """vocab.json with merges.txt, or tokenizer.json; where a folder holds both, they must say the same."""
    vocabulary, merges, description, added_tokens = (folder / name for name in _FILES)
    described = _read_description(description) if description.exists() else None
    added = _id_table(added_tokens, _read_json(added_tokens)) if added_tokens.exists() else {}
    if described:
        added = _union(description, added, described.added)
    found = []
    if vocabulary.exists() and merges.exists():
        ids = _union(vocabulary, _id_table(vocabulary, _read_json(vocabulary)), added)
        found.append(_Table(merges, ids, _read_merges(merges), added))
    if described:
        found.append(_Table(description, _union(description, described.ids, added), described.merges, added))
    if not found:
        missing = " and ".join(path.name for path in (vocabulary, merges) if not path.exists())
        raise ValueError(f"{folder} must hold vocab.json and merges.txt, or tokenizer.json, but lacks {missing}")
    if any((other.ids, other.merges) != (found[0].ids, found[0].merges) for other in found):
        raise ValueError(f"{description} must say the same as vocab.json and merges.txt, but does not; one is stale")
    return found[0]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, but is not ({error}); copy it again") from error


def _read_json(path: Path) -> Any:
    text = _read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, but is cut short or damaged ({error}); copy it again") from error


def _read_merges(path: Path) -> Merges:
    """The pairs of merges.txt: one a line, under a line that gives the version."""
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line and not (number == 1 and line.startswith("#version")):
            merges.append(_merge(f"{path} line {number}", line))
    return merges


def _merge(where: str, merge: Any) -> tuple[str, str]:
    """One merge as a pair; tokenizer.json holds it as a list, older ones and merges.txt as a string."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise ValueError(f"{where}: a merge must be two symbols with a space between, but is {merge!r}")
    return parts[0], parts[1]


def _id_table(path: Path, table: Any) -> dict[str, int]:
    if not isinstance(table, dict):
        raise ValueError(f"{path}: the vocabulary must give each token its id, but is a {type(table).__name__}")
    for name, id in table.items():
        if type(id) is not int or id < 0:
            raise ValueError(f"{path}: the id of {name!r} must be a whole number from 0 on, but is {id!r}")
    return table


def _union(path: Path, ids: dict[str, int], added: dict[str, int]) -> dict[str, int]:
    """Both tables in one.

    Raises:
        ValueError: if a name has two ids.
    """
    for name, id in added.items():
        if ids.get(name, id) != id:
            raise ValueError(f"{path}: {name!r} must have one id, but has {ids[name]} and, as an added token, {id}")
    return ids | added


def _read_description(path: Path) -> _Table:
    """tokenizer.json.

    Raises:
        ValueError: if it describes anything but GPT-2's byte-level BPE, because ids would differ.
    """
    description = _read_json(path)
    model = description.get("model") if isinstance(description, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ValueError(f"{path} must describe a BPE tokenizer, but `model` is {_brief(model)}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            raise ValueError(f"{path}: `model.{name}` must be off, as in GPT-2, but is {model[name]!r}")
    if description.get("normalizer") is not None:
        raise ValueError(f"{path}: `normalizer` must be null, as in GPT-2, but is {_brief(description['normalizer'])}")
    cutter = description.get("pre_tokenizer")
    expected = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if not isinstance(cutter, dict) or {name: cutter.get(name, True) for name in expected} != expected:
        raise ValueError(f"{path}: `pre_tokenizer` must be GPT-2's, {expected}, but is {_brief(cutter)}")
    if not isinstance(model["merges"], list):
        raise ValueError(f"{path}: `model.merges` must be a list, but is {_brief(model['merges'])}")
    merges = [_merge(f"{path} merge {number}", merge) for number, merge in enumerate(model["merges"], start=1)]
    added = _declared(path, description.get("added_tokens") or [])
    return _Table(path, _id_table(path, model.get("vocab")), merges, added)


def _declared(path: Path, added_tokens: Any) -> dict[str, int]:
    """The ids of the added tokens that tokenizer.json lists."""
    if not isinstance(added_tokens, list) or not all(isinstance(token, dict) for token in added_tokens):
        raise ValueError(f"{path}: `added_tokens` must be a list of objects, but is {_brief(added_tokens)}")
    for token in added_tokens:
        if not isinstance(token.get("content"), str):
            raise ValueError(f"{path}: an added token must have `content` and `id`, but is {_brief(token)}")
    return _id_table(path, {token["content"]: token.get("id") for token in added_tokens})


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
