"""From files to records, in blocks: the contents of a block are read, but not parsed until asked for.

So that several processes can share the work, each walks over all blocks, which is cheap, and parses its own.

    .jsonl            an object a line
    .json             one array of objects, alone or in an object ({"data": [...]}), or an object a line
    .csv, .tsv        text_files.py, and .txt and .md there too
    .parquet, .arrow  tables.py

Those of text may be packed: .jsonl.gz, .csv.gz, ...
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal, TextIO

from gpt2ft.data import blocks
from gpt2ft.data.blocks import (
    Columns,
    Parsed,
    RecordBlock,
    conversion,
    in_blocks,
    kind_of,
    open_bytes,
    open_text,
    refuse_wide_characters,
    whole,
)
from gpt2ft.data.formats.column_names import CONTEXTS, CONVERSATIONS, PROMPTS, REPLIES
from gpt2ft.data.reading import DataError, Malformed, ReadContext, Record, show
from gpt2ft.data.tables import read_arrow, read_parquet
from gpt2ft.data.text_files import read_delimited, read_documents

# Keys of an object that is no record, but holds them all in a list.
_WRAPPERS = ("data", "dataset", "records", "rows", "examples", "samples", "entries")
_WRAPPERS += ("train", "training", "test", "validation", "valid", "val", "dev", "eval")
_READ = frozenset((*PROMPTS, *CONTEXTS, *REPLIES, *CONVERSATIONS, "system", "system_prompt", "text"))  # of records
_GULP = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


def read_file(file: Path, columns: Columns, documents: Literal["file", "line"] = "file") -> Iterator[RecordBlock]:
    """Return the blocks of a file, by its kind.

    Args:
        columns: chooses from the names of the columns of a table.
        documents: what is one document of a file of text.

    Raises:
        DataError: at once or while iterating, if it cannot be read to its end.
    """
    kind = kind_of(file)
    if kind == ".parquet":
        return read_parquet(file, columns)
    if kind == ".arrow":
        return read_arrow(file, columns)
    refuse_wide_characters(file)
    if kind in (".csv", ".tsv"):
        return read_delimited(file)
    if kind in (".txt", ".md"):
        return read_documents(file, documents == "line")
    if kind == ".json" and _is_list(file):
        return in_blocks(_elements(file), partial(_parse_elements, file))
    return in_blocks(_lines(file), partial(_parse_lines, file))


def _each_key_once(pairs: list[tuple[str, Any]]) -> Record:
    """Return the object of some pairs.

    Raises:
        Malformed: if a key is repeated: the json module would keep the last value alone.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise Malformed(f"must hold each key once, but holds {show(repeated)} more than once", "repeated key")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_each_key_once)


# --- lines ----------------------------------------------------------------------------------------------------------

Line = tuple[int, bytes | None]  # its number, and None where it is too long to be held


def _lines(file: Path) -> Iterator[tuple[Line, int]]:
    """Yield the lines of a file and their sizes."""
    longest = blocks.LONGEST_RECORD
    with whole(file), open_bytes(file) as handle:
        for number in count(1):
            line = handle.readline(longest + 1)
            if not line:
                break
            if len(line) <= longest or line.endswith(b"\n"):
                yield (number, line), len(line)
            else:
                yield (number, None), len(line) + _skip_line(handle)


def _skip_line(handle: IO[bytes]) -> int:
    """Pass over the rest of a line and return its size."""
    skipped = 0
    while rest := handle.readline(_GULP):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def _parse_lines(file: Path, lines: list[Line], context: ReadContext) -> Parsed:
    """Yield the records of some lines; blank lines hold none."""
    for number, line in lines:
        if line is None:
            context.refuse(f"{file}:{number}", f"must be at most {blocks.LONGEST_RECORD:,} bytes long, but is longer")
        elif line.strip():
            try:
                yield f"{file}:{number}", _as_object(_parse(file, line))
            except Malformed as malformed:
                context.refuse(f"{file}:{number}", str(malformed), malformed.reason)


def _parse(file: Path, line: bytes) -> Any:
    """Return the value on a line, or raise Malformed with a sentence on what is wrong with it."""
    try:
        return _DECODER.decode(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem = f"must be UTF-8 text, but is not at byte {error.start + 1}{conversion(file, line)}"
    except RecursionError:
        problem = "must not nest this deep; write long conversations as flat messages with `parent_id`"
    except json.JSONDecodeError as error:
        problem = f"must be one JSON object, but does not parse: {error.msg} at column {error.colno}"
    except ValueError as error:
        problem = f"must be one JSON object, but does not parse: {error}"
    raise Malformed(problem, "malformed line")


def _as_object(value: Any) -> Record:
    """Return a value that is an object, or raise Malformed."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Malformed):  # an element that could not be decoded
        raise value
    raise Malformed(f"must be a JSON object, but is {show(value)}", "malformed line")


# --- an array -------------------------------------------------------------------------------------------------------


def _is_list(file: Path) -> bool:
    with whole(file), open_text(file, errors="replace") as handle:
        try:
            return _Scanner(file, handle).find_list() is not None
        except DataError:  # its first line is no object, which reading by lines says better
            return False


def _parse_elements(file: Path, elements: list[tuple[int, Any]], context: ReadContext) -> Parsed:
    """Yield the objects among some elements, which are parsed already: nothing else tells where they end."""
    for number, element in elements:
        try:
            yield f"{file}: record {number}", _as_object(element)
        except Malformed as malformed:
            context.refuse(f"{file}: record {number}", str(malformed), malformed.reason)


def _elements(file: Path) -> Iterator[tuple[tuple[int, Any], int]]:
    """Yield the elements of one array as (number, value), and their characters, with little of the file in memory.

    Raises:
        DataError: if it is not one array, or an element is too long to be one record.
    """
    with whole(file), open_text(file) as handle:
        scanner = _Scanner(file, handle)
        wrapper = scanner.find_list()
        scanner.refuse_lost()
        number, following = 0, "]" if scanner.next_character() == "]" else ","
        while following == ",":
            number += 1
            value, length = scanner.value(number)
            following = scanner.next_character()
            if following not in (",", "]"):
                raise scanner.error(f"has no comma after record {number}" if following else _unfinished(number))
            scanner.at += following == ","
            yield (number, value), length
        scanner.at += 1
        if wrapper:
            scanner.close_wrapper(wrapper)
            scanner.refuse_lost()
        if scanner.next_character():
            raise scanner.error("goes on after its end")


class _Scanner:
    """JSON in a file, read bit by bit: `text` from `at` on is not used up yet.

    Values are decoded by the json module: streaming parsers refuse some of what Python writes (NaN, long integers), and
    put another character in the place of half a surrogate pair.
    """

    def __init__(self, file: Path, handle: TextIO) -> None:
        self.file, self.handle = file, handle
        self.text, self.at = "", 0
        self.beside: Record = {}  # what an object holds beside the list of records

    def read_on(self) -> bool:
        """Return false at the end of the file."""
        gulp = self.handle.read(max(_GULP, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + gulp, 0
        return bool(gulp)

    def next_character(self) -> str:
        """Pass over space and return the character that follows it, "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.read_on():
                return self.text[self.at : self.at + 1]

    def value(self, number: int) -> tuple[Any, int]:
        """Return what follows, which is record `number`, and its characters."""
        self.next_character()
        while True:
            try:
                value, end = self._decode()
            except RecursionError:
                raise DataError(f"{self.file}: record {number}: must not nest this deep") from None
            except json.JSONDecodeError as error:
                problem = f"does not parse: {error.msg} in record {number}"
            except ValueError as error:  # a number of thousands of digits
                problem = f"must be a JSON object, but does not parse: {error}"
                raise DataError(f"{self.file}: record {number}: {problem}") from None
            else:
                if end < len(self.text):  # a number might go on in what is not read yet
                    begun, self.at = self.at, end
                    return value, end - begun
                problem = _unfinished(number)
            if len(self.text) - self.at > blocks.LONGEST_RECORD:
                longest = f"must be at most {blocks.LONGEST_RECORD:,} characters long and parse, but does not"
                raise DataError(f"{self.file}: record {number}: {longest}")
            if not self.read_on():
                raise self.error(problem)

    def _decode(self) -> tuple[Any, int]:
        """Return the value here and where it ends; in its place the complaint, where one of its keys is repeated."""
        try:
            return _DECODER.raw_decode(self.text, self.at)
        except Malformed as malformed:
            return malformed, json.JSONDecoder().raw_decode(self.text, self.at)[1]

    def find_list(self) -> str | None:
        """Pass over the bracket that opens the list of records.

        Returns:
            The key under which an object holds it, "" where it stands alone, None if there is no such list.
        """
        found = self.next_character()
        if found == "[":
            self.at += 1
            return ""
        while found in ("{", ","):
            key = self._key()
            if key in _WRAPPERS and self.next_character() == "[":
                self.at += 1
                return key if self.next_character() in ("{", "]") else None
            if key is None:
                return None
            self.beside[key], _ = self.value(1)
            found = self.next_character()
        return None

    def close_wrapper(self, key: str) -> None:
        """Pass over the rest of the object that holds the list, which must hold no other."""
        while self.next_character() == ",":
            other = self._key()
            if other in _WRAPPERS and self.next_character() == "[":
                raise self.error(f"holds two, `{key}` and `{other}`: give each a file of its own")
            if other is None:
                break
            self.beside[other], _ = self.value(1)
        if self.next_character() != "}":
            raise self.error(f"the object around `{key}` does not end")
        self.at += 1

    def refuse_lost(self) -> None:
        """Raise a DataError if text or records that layouts read stand beside the list: they may belong to them all."""
        for key, value in self.beside.items():
            is_text = key in _READ and isinstance(value, str) and value.strip()
            objects = (one for one in value if isinstance(one, dict)) if isinstance(value, list) else ()
            if is_text or any(_READ & one.keys() for one in objects):
                raise self.error(f"holds {show(key)} beside it, which would be lost: move it into the records")

    def _key(self) -> str | None:
        """Pass over a bracket or comma, a key and its colon; None if these do not follow."""
        self.at += 1
        key = self.value(1)[0] if self.next_character() == '"' else None
        if key is None or self.next_character() != ":":
            return None
        self.at += 1
        return key

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.file}: must be one JSON array, but {problem}")


def _unfinished(number: int) -> str:
    return f"does not parse: the array does not end after record {number}"
