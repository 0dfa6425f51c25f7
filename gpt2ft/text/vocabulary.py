"""GPT-2's vocabulary, byte-level BPE, and how it is read from folders in the layout of Hugging Face.

A folder lists the tokens with their ids (vocab.json, or tokenizer.json), the two parts that each token joins, in the
order in which BPE joins them (merges.txt, or tokenizer.json again), and tokens that were added later
(added_tokens.py). A merge's place in the list is its rank. All of it is checked.

In all these files each byte is written as one printable symbol: itself where it is printable in Latin-1, and
otherwise a letter from U+0100 on, so that a space reads as "Ġ".
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex

from gpt2ft.files import read_json, read_text
from gpt2ft.text.added_tokens import AddedToken, brief, read_added_tokens, read_ids

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + index): byte for index, byte in enumerate(_HIDDEN)}
_SYMBOLS = {byte: symbol for symbol, byte in _BYTES.items()}

# How GPT-2 cuts text before BPE: contractions, words, numbers, other signs (each with one space before it), spaces.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Merges = list[tuple[str, str]]


@dataclass(frozen=True)
class Vocabulary:
    """Text tokens, control tokens and added words; together their ids run from 0 without a gap.

    Attributes:
        tokens: the text tokens by rank: the 256 bytes, then what each merge builds.
        ids: the id of each of them.
        control_ids: the id of each name that is no text.
        words: added words by their text. A word that is a text token as well has its id.
    """

    tokens: list[bytes]
    ids: list[int]
    control_ids: dict[str, int]
    words: Mapping[str, AddedToken] = field(default_factory=dict)

    def __len__(self) -> int:
        return len({*self.ids, *self._added_names()})

    def spellings(self) -> list[bytes]:
        """By id: the bytes of a text token, the name of a control token, the text of a word."""
        by_id = dict(zip(self.ids, self.tokens, strict=True))
        by_id |= {id: name.encode() for id, name in self._added_names().items()}
        return [by_id[id] for id in range(len(by_id))]

    def names(self) -> list[str]:
        """By id: how vocab.json spells each token."""
        by_id = {id: _symbols(token) for id, token in zip(self.ids, self.tokens, strict=True)} | self._added_names()
        return [by_id[id] for id in range(len(by_id))]

    def _added_names(self) -> dict[int, str]:
        words = {word.id: name for name, word in self.words.items()}
        return words | {id: name for name, id in self.control_ids.items()}

    def extends(self, other: "Vocabulary") -> bool:
        """Return True if all ids of `other` mean the same here, and text becomes the same of them."""
        return (
            (self.tokens, self.ids) == (other.tokens, other.ids)
            and self.control_ids.items() >= other.control_ids.items()
            and self.words.items() >= other.words.items()
        )

    def merges(self) -> list[str]:
        """By rank: how merges.txt spells each merge."""
        return [" ".join(map(_symbols, parts)) for parts in _parts_of_merges(self.tokens)]


def read_vocabulary(folder: Path, reserved: Collection[str]) -> Vocabulary:
    """The vocabulary of a folder: vocab.json and merges.txt, or else tokenizer.json.

    Added tokens are control tokens or words, as they are declared. Control tokens are also the `reserved` names and
    those that have a special purpose, where they have an id, and names that no merge builds or could have built.

    Raises:
        ValueError: if a file is missing, damaged, contradicts another, or describes another kind of tokenizer.
    """
    table = _read_folder(folder)
    tokens = _ranked_tokens(table)
    symbols = [_symbols(token) for token in tokens]
    text = set(symbols)
    control_ids = _control_ids(table, text, {*reserved, *(table.special - text)})
    _check_gaps(table)
    words = {name: token for name, token in table.added.items() if name not in control_ids}
    return Vocabulary(tokens, [table.ids[symbol] for symbol in symbols], control_ids, words)


@dataclass(frozen=True)
class _Table:
    """The lists of a folder, in symbols."""

    source: Path  # the file that holds the merges
    ids: dict[str, int]  # of text tokens and added tokens alike
    merges: Merges
    added: dict[str, AddedToken]
    special: set[str]  # names that have a special purpose


def _control_ids(table: _Table, text: Collection[str], reserved: Collection[str]) -> dict[str, int]:
    """The ids of the names that are no text.

    Args:
        text: the names of the text tokens.

    Raises:
        ValueError: if such a name is text as well, or may be text that the merges have lost.
    """
    control_ids = {}
    first_of_bytes = min(table.ids[symbol] for symbol in _BYTES)
    for name, id in table.ids.items():
        added = table.added.get(name)
        is_control = name in reserved or (added is not None and added.special)
        if is_control and name in text:
            raise ValueError(
                f"{table.source}: control token {name!r} must not be built by a merge, or text could forge it, but is"
            )
        if added and name in text and not name.isascii():
            raise ValueError(
                f"{table.source}: added token {name!r} must have an id of its own, but has that of other bytes, which "
                "are spelled alike"
            )
        if not added and not is_control and name not in text:
            if id > first_of_bytes and _may_be_text(name):  # training gives what merges build ids behind the bytes
                raise ValueError(
                    f"{table.source}: a merge must build {name!r} (id {id}), but none does: either the merges are cut "
                    "short, or it is a control token that added_tokens.json must name"
                )
            is_control = True
        if is_control:
            control_ids[name] = id
    return control_ids


def _may_be_text(name: str) -> bool:
    """Return False for a name that no merge can ever have built, in training on text that is cut as GPT-2 cuts it.

    `<s>` is cut into three, and a name with a space is not in symbols. Bytes that are no whole characters may be text.
    """
    if not all(symbol in _BYTES for symbol in name):
        return False
    try:
        text = bytes([_BYTES[symbol] for symbol in name]).decode()
    except UnicodeDecodeError:
        return True
    return not text or regex.fullmatch(PATTERN, text) is not None


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
    vocabulary, merges, description = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    added, special = read_added_tokens(folder)
    found = []
    if vocabulary.exists() and merges.exists():
        ids = _union(vocabulary, read_ids(vocabulary, read_json(vocabulary)), added)
        found.append(_Table(merges, ids, _read_merges(merges), added, special))
    if description.exists():
        ids, described_merges = _read_description(description)
        found.append(_Table(description, _union(description, ids, added), described_merges, added, special))
    if not found:
        missing = " and ".join(path.name for path in (vocabulary, merges) if not path.exists())
        raise ValueError(f"{folder} must hold vocab.json and merges.txt, or tokenizer.json, but lacks {missing}")
    if any((other.ids, other.merges) != (found[0].ids, found[0].merges) for other in found):
        raise ValueError(f"{description} must say the same as vocab.json and merges.txt, but does not; one is stale")
    return found[0]


def _read_merges(path: Path) -> Merges:
    """The pairs of merges.txt: one a line, under a line that gives the version."""
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line and not (number == 1 and line.startswith("#version")):
            merges.append(_merge(f"{path} line {number}", line))
    return merges


def _merge(where: str, merge: Any) -> tuple[str, str]:
    """One merge as a pair; tokenizer.json holds it as a list, older ones and merges.txt as a string."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise ValueError(f"{where}: a merge must be two symbols with a space between, but is {merge!r}")
    return parts[0], parts[1]


def _union(path: Path, ids: dict[str, int], added: dict[str, AddedToken]) -> dict[str, int]:
    """Both tables in one.

    Raises:
        ValueError: if a name has two ids.
    """
    for name, token in added.items():
        if ids.get(name, token.id) != token.id:
            raise ValueError(
                f"{path}: {name!r} must have one id, but has {ids[name]} and, as an added token, {token.id}"
            )
    return ids | {name: token.id for name, token in added.items()}


def _read_description(path: Path) -> tuple[dict[str, int], Merges]:
    """The ids and merges of tokenizer.json.

    Raises:
        ValueError: if it describes anything but GPT-2's byte-level BPE, because ids would differ.
    """
    description = read_json(path)
    model = description.get("model") if isinstance(description, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ValueError(f"{path} must describe a BPE tokenizer, but `model` is {brief(model)}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            raise ValueError(f"{path}: `model.{name}` must be off, as in GPT-2, but is {model[name]!r}")
    if description.get("normalizer") is not None:
        raise ValueError(f"{path}: `normalizer` must be null, as in GPT-2, but is {brief(description['normalizer'])}")
    cutter = description.get("pre_tokenizer")
    expected = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if not isinstance(cutter, dict) or {name: cutter.get(name, True) for name in expected} != expected:
        raise ValueError(f"{path}: `pre_tokenizer` must be GPT-2's, {expected}, but is {brief(cutter)}")
    if not isinstance(model["merges"], list):
        raise ValueError(f"{path}: `model.merges` must be a list, but is {brief(model['merges'])}")
    merges = [_merge(f"{path} merge {number}", merge) for number, merge in enumerate(model["merges"], start=1)]
    return read_ids(path, model.get("vocab")), merges
