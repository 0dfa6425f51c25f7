"""From files and the hub to records, in blocks: the contents of a block are read, but not parsed until asked for.

So that several processes can share the work, each walks over all blocks, which is cheap, and parses its own.

    .jsonl, .jsonl.gz      an object a line
    .json                  one array of objects, or an object a line
    .parquet               an object a row
    .arrow                 the same, as `datasets` saves it
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any

from gpt2ft.data.reading import DataError, ReadContext, Record, show

FILE_KINDS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow")
BLOCK_BYTES = 4 << 20  # about a million tokens
LONGEST_RECORD = 16 << 20  # bytes of JSON
_ROWS_IN_A_BLOCK = 2048  # at most, of a table
_GULP = 1 << 20
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow
_SPACE = re.compile(r"[ \t\n\r]*")

Parsed = Iterator[tuple[str, Record]]  # (where it stands, the record)
Columns = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class RecordBlock:
    """Some records that follow each other."""

    size: int  # bytes, for a progress bar
    parse: Callable[[ReadContext], Parsed]  # yields the records; the context refuses malformed ones


def stem(file: Path) -> str:
    """Return the name of a file without its kind."""
    return next((file.name[: -len(kind)] for kind in FILE_KINDS if file.name.lower().endswith(kind)), file.name)


def read_file(file: Path, columns: Columns) -> Iterator[RecordBlock]:
    """Return the blocks of a file, by its kind; of a table, the columns that `columns` chooses from their names.

    Raises:
        DataError: while iterating, if it cannot be read to its end.
    """
    name = file.name.lower()
    if name.endswith(".parquet"):
        return _parquet(file, columns)
    if name.endswith(".arrow"):
        return _arrow(file, columns)
    if name.endswith(".json") and _opens_with_bracket(file):
        return _in_blocks(_elements(file), partial(_parse_elements, file))
    return _in_blocks(_lines(file), partial(_parse_lines, file))


def read_table(table: Any, place: str, columns: Columns) -> Iterator[RecordBlock]:
    """Return the blocks of a `datasets.Dataset`."""
    table = table.select_columns(columns(table.column_names)).with_format("arrow")
    return _batches(table.iter(_ROWS_IN_A_BLOCK), place)


def _in_blocks(
    found: Iterable[tuple[Any, int]], parse: Callable[[list[Any], ReadContext], Parsed]
) -> Iterator[RecordBlock]:
    """Gather what is `found`, each with its size, into blocks that `parse` makes records of."""
    held: list[Any] = []
    size = 0
    for one, length in found:
        held.append(one)
        size += length
        if size >= BLOCK_BYTES:
            yield RecordBlock(size, partial(parse, held))
            held, size = [], 0
    if held:
        yield RecordBlock(size, partial(parse, held))


# --- lines ----------------------------------------------------------------------------------------------------------

Line = tuple[int, bytes | None]  # its number, and None where it is too long to be held


def _lines(file: Path) -> Iterator[tuple[Line, int]]:
    """Yield the lines of a file and their sizes."""
    with _whole(file), _open(file) as handle:
        for number in count(1):
            line = handle.readline(LONGEST_RECORD + 1)
            if not line:
                break
            if len(line) <= LONGEST_RECORD or line.endswith(b"\n"):
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
            context.refuse(f"{file}:{number}", f"must be at most {LONGEST_RECORD:,} bytes long, but is longer")
        elif line.strip():
            record = _parse(line)
            if isinstance(record, dict):
                yield f"{file}:{number}", record
            else:
                context.refuse(f"{file}:{number}", record)


def _parse(line: bytes) -> Record | str:
    """Return the object on a line, or a sentence on what is wrong with the line."""
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


def _parse_elements(file: Path, elements: list[tuple[int, Any]], context: ReadContext) -> Parsed:
    """Yield the objects among some elements, which are parsed already: nothing else tells where they end."""
    for number, element in elements:
        record = _as_object(element)
        if isinstance(record, dict):
            yield f"{file}: record {number}", record
        else:
            context.refuse(f"{file}: record {number}", record)


def _elements(file: Path) -> Iterator[tuple[tuple[int, Any], int]]:
    """Yield the elements of one array as (number, value), and their characters, with little of the file in memory.

    Raises:
        DataError: if it is not one array, or an element is too long to be one record.
    """
    with _whole(file), open(file, encoding="utf-8-sig") as handle:
        scanner = _Scanner(file, handle)
        scanner.next_character()
        scanner.at += 1  # past the bracket that opens the array
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
        if scanner.next_character():
            raise scanner.error("goes on after its end")


class _Scanner:
    """JSON in a file, read bit by bit: `text` from `at` on is not used up yet.

    Values are decoded by the json module: streaming parsers refuse some of what Python writes (NaN, long integers), and
    put another character in the place of half a surrogate pair.
    """

    def __init__(self, file: Path, handle: IO[str]) -> None:
        self.file, self.handle = file, handle
        self.text, self.at = "", 0
        self.decode = json.JSONDecoder().raw_decode

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
                value, end = self.decode(self.text, self.at)
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
            if len(self.text) - self.at > LONGEST_RECORD:
                longest = f"must be at most {LONGEST_RECORD:,} characters long and parse, but does not"
                raise DataError(f"{self.file}: record {number}: {longest}")
            if not self.read_on():
                raise self.error(problem)

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.file}: must be one JSON array, but {problem}")


def _unfinished(number: int) -> str:
    return f"does not parse: the array does not end after record {number}"


# --- tables ---------------------------------------------------------------------------------------------------------


def _parquet(file: Path, columns: Columns) -> Iterator[RecordBlock]:
    import pyarrow.parquet

    with _whole(file), pyarrow.parquet.ParquetFile(file) as table:
        wanted = columns(table.schema_arrow.names)
        yield from _batches(table.iter_batches(_rows_at_once(table.metadata, wanted), columns=wanted), str(file))


def _rows_at_once(metadata: Any, wanted: list[str]) -> int:
    """Return how many rows make up a block, by the mean size of a row: little more than one block is in memory."""
    size = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(column) for column in range(group.num_columns)]
        size += sum(it.total_uncompressed_size for it in columns if it.path_in_schema.split(".")[0] in wanted)
    return max(1, min(_ROWS_IN_A_BLOCK, BLOCK_BYTES * metadata.num_rows // max(1, size)))


def _arrow(file: Path, columns: Columns) -> Iterator[RecordBlock]:
    """Yield the blocks of a table in Arrow's stream format, which is complete once its end is marked."""
    import pyarrow

    with _whole(file), pyarrow.memory_map(str(file)) as source:
        start = source.size() - len(_END_OF_STREAM)
        if start < 0 or source.read_at(len(_END_OF_STREAM), start) != _END_OF_STREAM:
            raise pyarrow.ArrowInvalid("the end of Arrow's stream format is missing")
        with pyarrow.ipc.open_stream(source) as stream:
            table = stream.read_all()
        table = table.select(columns(table.column_names))
        yield from _batches(table.to_batches(_ROWS_IN_A_BLOCK), str(file))


def _batches(batches: Iterable[Any], place: str) -> Iterator[RecordBlock]:
    first = 1
    for batch in batches:
        for part in _halved(batch):
            yield RecordBlock(part.nbytes, partial(_rows, part, place, first))
            first += len(part)


def _halved(batch: Any) -> Iterator[Any]:
    """Yield the rows in parts of a block's size: a few rows may be much larger than the mean."""
    if batch.nbytes <= BLOCK_BYTES or len(batch) == 1:
        yield batch
    else:
        middle = len(batch) // 2
        yield from _halved(batch.slice(0, middle))
        yield from _halved(batch.slice(middle))


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
    """Raise a DataError where a file cannot be read to its end: it is never taken for a shorter one."""
    import pyarrow

    try:
        yield
    except (EOFError, OSError, zlib.error, UnicodeDecodeError, pyarrow.ArrowException) as error:
        kind = " parquet" if file.name.lower().endswith(".parquet") else ""
        raise DataError(f"{file}: must be a whole and readable{kind} file, but is not: {error}") from error
