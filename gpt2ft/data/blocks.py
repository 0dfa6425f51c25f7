"""Tools of all readers of files: blocks of records, and files that are read to their end, in the encoding they have."""

import csv
import gzip
import io
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TextIO

from gpt2ft.data.reading import DataError, ReadContext, Record

TEXT_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md")  # each also with .gz
FILE_KINDS = (*TEXT_KINDS, *(f"{kind}.gz" for kind in TEXT_KINDS), ".parquet", ".arrow")
BLOCK_BYTES = 4 << 20  # about a million tokens
LONGEST_RECORD = 16 << 20  # bytes of JSON, or of a document
_SAMPLE = 4096  # bytes that tell an encoding

Parsed = Iterator[tuple[str, Record]]  # (where it stands, the record)
Columns = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class RecordBlock:
    """Some records that follow each other."""

    size: int  # bytes, for a progress bar
    parse: Callable[[ReadContext], Parsed]  # yields the records; the context refuses malformed ones


def kind_of(file: Path) -> str:
    """Return how the name of a file ends, without `.gz`; "" if it is no data."""
    name = file.name.lower()
    return next((kind.removesuffix(".gz") for kind in FILE_KINDS if name.endswith(kind)), "")


def stem(file: Path) -> str:
    """Return the name of a file without its kind."""
    return next((file.name[: -len(kind)] for kind in FILE_KINDS if file.name.lower().endswith(kind)), file.name)


def in_blocks(
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


# --- reading to the end ---------------------------------------------------------------------------------------------


def open_bytes(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def open_text(file: Path, errors: str = "strict") -> TextIO:
    """Open a file as UTF-8 with its line ends as they are, without the byte order mark."""
    return io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", errors=errors, newline="")


@contextmanager
def whole(file: Path) -> Iterator[None]:
    """Raise a DataError where a file cannot be read to its end: it is never taken for a shorter one."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        around = bytes(error.object[max(0, error.start - 200) : error.start + 200])
        raise DataError(
            f"{file}: must be a whole and readable file, but is not: {error}{conversion(file, around)}"
        ) from error
    except (EOFError, OSError, zlib.error, csv.Error, pyarrow.ArrowException) as error:
        kind = " parquet" if file.name.lower().endswith(".parquet") else ""
        raise DataError(f"{file}: must be a whole and readable{kind} file, but is not: {error}") from error


# --- encodings ------------------------------------------------------------------------------------------------------


def refuse_wide_characters(file: Path) -> None:
    """Raise a DataError if a file of text has two or four bytes a character, which must not be read as UTF-8."""
    with whole(file), open_bytes(file) as handle:
        sample = handle.read(_SAMPLE)
    if sample.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in sample[:4]:
        raise DataError(f"{file}: must be UTF-8 text, but is not{conversion(file, sample)}")


def conversion(file: Path, sample: bytes) -> str:
    """Return the command that makes UTF-8 of a file, by the encoding of a sample; empty if that is not to be told."""
    encoding = _encoding(sample)
    if not encoding:
        return ""
    name = stem(file)
    old, new = (shlex.quote(str(path)) for path in (file, file.with_name(f"{name}.utf8{file.name[len(name) :]}")))
    convert = f"iconv -f {encoding} -t UTF-8"
    is_packed = file.name.lower().endswith(".gz")
    command = f"gzip -dc {old} | {convert} | gzip > {new}" if is_packed else f"{convert} {old} > {new}"
    return f"; it looks like {encoding}: convert it with `{command}`"


def _encoding(sample: bytes) -> str:
    if sample.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if sample.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    if b"\0" in sample:
        return "UTF-16LE" if sample[1::2].count(0) > sample[::2].count(0) else "UTF-16BE"
    try:
        sample.decode("cp1252")
    except UnicodeDecodeError:
        return ""
    return "WINDOWS-1252" if sample.decode("utf-8", "ignore").isascii() else ""
