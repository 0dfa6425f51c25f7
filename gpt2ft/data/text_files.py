"""Files of text that are no JSON: tables whose fields are divided by commas, semicolons, tabs or bars, and documents.

.csv, .tsv     a line that names the columns, then a record a row; a field in quotes may hold line ends
.txt, .md      one document, or one a line
"""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from gpt2ft.data import blocks
from gpt2ft.data.blocks import Parsed, RecordBlock, conversion, in_blocks, kind_of, open_bytes, open_text, whole
from gpt2ft.data.reading import DataError, ReadContext, Record, show

_DELIMITERS = {".csv": (",", ";", "\t", "|"), ".tsv": ("\t",)}
_LONGEST_HEADER = 1 << 16  # characters


# --- tables ---------------------------------------------------------------------------------------------------------


def read_delimited(file: Path) -> Iterator[RecordBlock]:
    """Return the blocks of a table in text.

    Raises:
        DataError: while iterating, if its first line does not name its columns or its quotes are not closed.
    """
    return in_blocks(_rows(file), partial(_parse_rows, file))


def _rows(file: Path) -> Iterator[tuple[tuple[int, Record | str], int]]:
    """Yield (line, row) with its characters; a sentence where the fields do not fit the header."""
    csv.field_size_limit(blocks.LONGEST_RECORD)  # of the whole process; the default is shorter than long documents
    with whole(file), open_text(file) as handle:
        reader = csv.reader(handle, delimiter=_delimiter(file), strict=True)
        names = next(_filled(reader), None)
        if names and names[0].lower().startswith("sep=") and len("".join(names)) <= len("sep=,"):  # Excel's own line
            names = next(_filled(reader), None)
        if names is None:
            return
        columns = _columns(file, names)
        line = reader.line_num + 1
        try:
            for row in reader:
                if len(row) > 1 or "".join(row).strip():  # no blank line
                    yield (line, _record(columns, row)), sum(map(len, row)) + len(row)
                line = reader.line_num + 1
        except csv.Error as error:
            must_be = "must be a row with its quotes closed, and those within a field doubled"
            raise DataError(f"{file}:{line}: {must_be}, but is not: {error}") from error


def _filled(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    return (row for row in reader if any(map(str.strip, row)))


def _delimiter(file: Path) -> str:
    """Return what divides the names of the columns into most."""
    with open_text(file) as handle:
        lines = [line for line in handle.read(_LONGEST_HEADER).splitlines(keepends=True) if line.strip()]
    if lines and lines[0].lower().startswith("sep="):
        return lines[0].strip()[len("sep=") :][:1] or "\t"  # it stands more than once where it was saved again
    choices = _DELIMITERS[kind_of(file)]
    return max(choices, key=lambda choice: len(next(csv.reader(lines, delimiter=choice), ())))


def _columns(file: Path, names: list[str]) -> list[str]:
    """Return the names of the columns; the first may have none, as where pandas has numbered the rows."""
    columns = [name.strip() or f"column {number}" for number, name in enumerate(names, start=1)]
    columns[0] = names[0].strip() or "unnamed"
    for name in columns:
        if columns.count(name) > 1:
            raise DataError(f"{file}: the first line must name each column once, but names {show(name)} more than once")
    return columns


def _record(columns: list[str], row: list[str]) -> Record | str:
    if len(row) == len(columns):
        return dict(zip(columns, row, strict=True))
    return f"must have {len(columns)} fields, as the first line names as many columns, but has {len(row)}"


def _parse_rows(file: Path, rows: list[tuple[int, Record | str]], context: ReadContext) -> Parsed:
    for line, row in rows:
        if isinstance(row, str):
            context.refuse(f"{file}:{line}", row)
        else:
            yield f"{file}:{line}", row


# --- documents ------------------------------------------------------------------------------------------------------


def read_documents(file: Path, one_a_line: bool) -> Iterator[RecordBlock]:
    """Return the blocks of a file of documents: it is one, or has one a line."""
    return in_blocks(_documents(file, one_a_line), partial(_parse_documents, file))


def _documents(file: Path, one_a_line: bool) -> Iterator[tuple[tuple[int, bytes], int]]:
    with whole(file), open_bytes(file) as handle:
        longest = blocks.LONGEST_RECORD
        read = handle.readline if one_a_line else handle.read
        number = 0
        while text := read(longest + 1):
            number += 1
            if len(text) > longest:
                hint = "" if one_a_line else ": set `data.documents` to line, or divide it"
                raise DataError(f"{file}:{number}: must be at most {longest:,} bytes long, but is longer{hint}")
            if text.strip() or not one_a_line:
                yield (number, text), len(text)


def _parse_documents(file: Path, documents: list[tuple[int, bytes]], context: ReadContext) -> Parsed:
    for number, text in documents:
        try:
            yield f"{file}:{number}", {"text": text.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            around = text[max(0, error.start - 200) : error.start + 200]
            problem = f"must be UTF-8 text, but is not at byte {error.start + 1}{conversion(file, around)}"
            context.refuse(f"{file}:{number}", problem)
