"""From files and the hub to records, in blocks: what a block holds is read, but not parsed until it is asked for.

So that several processes can share the work, each walks over all blocks, which is cheap, and parses its own.

    .jsonl, .jsonl.gz      an object a line
    .json                  one array of objects, or an object a line
    .parquet               an object a row
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any

from gpt2ft.data.reading import DataError, ReadContext, Record, show

FILE_KINDS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
BLOCK_BYTES = 4 << 20  # about a million tokens
LONGEST_RECORD = 16 << 20  # bytes of JSON
_ROWS_IN_A_BLOCK = 2048
_GULP = 1 << 20

Parsed = Iterator[tuple[str, Record]]  # (where it stands, the record)
Columns = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class RecordBlock:
    """Some records that follow each other.

    `parse` gives them; a malformed one is refused by the context that it is handed. `size` is in bytes, for a
    progress bar.
    """

    size: int
    parse: Callable[[ReadContext], Parsed]


def stem(file: Path) -> str:
    """The name of a file without its kind."""
    return next((file.name[: -len(kind)] for kind in FILE_KINDS if file.name.lower().endswith(kind)), file.name)


def read_file(file: Path, columns: Columns) -> Iterator[RecordBlock]:
    """The blocks of a file, by its kind; of a table, the columns that `columns` chooses from their names.

    Raises:
        DataError: while iterating, if it cannot be read to its end.
    """
    name = file.name.lower()
    if name.endswith(".parquet"):
        return _parquet(file, columns)
    if name.endswith(".json") and _opens_with_bracket(file):
        return _array(file)
    return _lines(file)


def read_table(table: Any, place: str, columns: Columns) -> Iterator[RecordBlock]:
    """The blocks of a `datasets.Dataset`."""
    table = table.select_columns(columns(table.column_names)).with_format("arrow")
    return _batches(table.iter(_ROWS_IN_A_BLOCK), place)


# --- lines ----------------------------------------------------------------------------------------------------------


def _lines(file: Path) -> Iterator[RecordBlock]:
    with _whole(file), _open(file) as handle:
        held: list[tuple[int, bytes | None]] = []
        size = 0
        for number in count(1):
            line = handle.readline(LONGEST_RECORD + 1)
            if not line:
                break
            size += len(line)
            if len(line) > LONGEST_RECORD and not line.endswith(b"\n"):
                line = None
                size += _skip_line(handle)
            held.append((number, line))
            if size >= BLOCK_BYTES:
                yield RecordBlock(size, partial(_parse_lines, file, held))
                held, size = [], 0
        if held:
            yield RecordBlock(size, partial(_parse_lines, file, held))


def _skip_line(handle: IO[bytes]) -> int:
    """Passes over the rest of a line and gives its size."""
    skipped = 0
    while rest := handle.readline(_GULP):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def _parse_lines(file: Path, lines: list[tuple[int, bytes | None]], context: ReadContext) -> Parsed:
    """Blank lines hold nothing and are passed over."""
    for number, line in lines:
        if line is None:
            context.refuse(f"{file}:{number}", f"must be at most {LONGEST_RECORD:,} bytes long, but is longer")
        elif line.strip():
            record = _parse(line)
            if isinstance(record, dict):
                yield f"{file}:{number}", record
            else:
                context.refuse(f"{file}:{number}", record)


def _parse(line: bytes) -> Record | str:
    """The object on a line, or what is wrong with the line."""
    try:
        return _as_object(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return f"must be UTF-8 text, but is not at byte {error.start + 1}"
    except RecursionError:
        return "must not nest this deep; write long conversations as flat messages with `parent_id`"
    except json.JSONDecodeError as error:
        return f"must be one JSON object, but does not parse: {error.msg} at column {error.colno}"
    except ValueError as error:
        return f"must be one JSON object, but does not parse: {error}"


def _as_object(value: Any) -> Record | str:
    return value if isinstance(value, dict) else f"must be a JSON object, but is {show(value)}"


# --- an array -------------------------------------------------------------------------------------------------------


def _opens_with_bracket(file: Path) -> bool:
    with _whole(file), open(file, "rb") as handle:
        return handle.read(_GULP).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array(file: Path) -> Iterator[RecordBlock]:
    """The elements of one array, parsed here as nothing else tells where they end."""
    with _whole(file):
        held: list[tuple[int, Any]] = []
        size = 0
        for number, (element, length) in enumerate(_elements(file), start=1):
            held.append((number, element))
            size += length
            if size >= BLOCK_BYTES:
                yield RecordBlock(size, partial(_parsed_elements, file, held))
                held, size = [], 0
        if held:
            yield RecordBlock(size, partial(_parsed_elements, file, held))


def _parsed_elements(file: Path, elements: list[tuple[int, Any]], context: ReadContext) -> Parsed:
    for number, element in elements:
        record = _as_object(element)
        if isinstance(record, dict):
            yield f"{file}: record {number}", record
        else:
            context.refuse(f"{file}: record {number}", record)


def _elements(file: Path) -> Iterator[tuple[Any, int]]:
    """(element, characters) one after the other, with little of the file in memory at a time.

    Raises:
        DataError: if it is not one array, or an element is too long to be one record.
    """
    decoder = json.JSONDecoder()
    with open(file, encoding="utf-8-sig") as handle:
        text, at, number = handle.read(_GULP).lstrip()[1:], 0, 1

        def more() -> bool:
            nonlocal text, at
            gulp = handle.read(max(_GULP, len(text) - at))
            text, at = text[at:] + gulp, 0
            return bool(gulp)

        while True:
            at = _past_space(text, at)
            if at == len(text) and more():
                continue
            if text[at : at + 1] == "]" and number == 1:
                at += 1
                break
            try:
                element, end = decoder.raw_decode(text, at)
                end = _past_space(text, end)
                complete = end < len(text)
            except RecursionError:
                raise DataError(f"{file}: record {number}: must not nest this deep") from None
            except json.JSONDecodeError as error:
                complete, problem = False, f"{error.msg} in record {number}"
            except ValueError as error:  # a number of thousands of digits
                raise DataError(
                    f"{file}: record {number}: must be a JSON object, but does not parse: {error}"
                ) from None
            else:
                problem = f"the array does not end after record {number}"
            if not complete:
                if len(text) - at > LONGEST_RECORD:
                    longest = f"{LONGEST_RECORD:,} characters"
                    raise DataError(f"{file}: record {number}: must be at most {longest} long and parse, but does not")
                if more():
                    continue
                raise DataError(f"{file}: must be one JSON array, but does not parse: {problem}")
            yield element, end - at
            number += 1
            at = end + 1
            if text[end] == "]":
                break
            if text[end] != ",":
                raise DataError(f"{file}: must be one JSON array, but has no comma after record {number - 1}")
        while (at := _past_space(text, at)) == len(text) and more():
            pass
        if at < len(text):
            raise DataError(f"{file}: must be one JSON array, but goes on after its end")


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\n\r":
        at += 1
    return at


# --- tables ---------------------------------------------------------------------------------------------------------


def _parquet(file: Path, columns: Columns) -> Iterator[RecordBlock]:
    import pyarrow.parquet

    with _whole(file), pyarrow.parquet.ParquetFile(file) as table:
        wanted = columns(table.schema_arrow.names)
        yield from _batches(table.iter_batches(_ROWS_IN_A_BLOCK, columns=wanted), str(file))


def _batches(batches: Iterable[Any], place: str) -> Iterator[RecordBlock]:
    first = 1
    for batch in batches:
        yield RecordBlock(batch.nbytes, partial(_rows, batch, place, first))
        first += len(batch)


def _rows(batch: Any, place: str, first: int, context: ReadContext) -> Parsed:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: must be a whole and readable parquet file, but is not: {error}") from error
    for number, row in enumerate(rows, start=first):
        yield f"{place}: row {number}", row


# --- reading to the end ---------------------------------------------------------------------------------------------


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """A file that cannot be read to its end is never taken for a shorter one."""
    import pyarrow

    try:
        yield
    except (EOFError, OSError, zlib.error, UnicodeDecodeError, pyarrow.ArrowException) as error:
        kind = " parquet" if file.name.lower().endswith(".parquet") else ""
        raise DataError(f"{file}: must be a whole and readable{kind} file, but is not: {error}") from error
