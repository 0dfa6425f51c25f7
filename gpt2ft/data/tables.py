"""Tables as records, in blocks of rows: parquet, Arrow's stream format, and the tables of `datasets`."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpt2ft.data import blocks
from gpt2ft.data.blocks import Columns, Parsed, RecordBlock, whole
from gpt2ft.data.reading import DataError, ReadContext

ROWS_IN_A_BLOCK = 2048  # at most
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow


def read_table(table: Any, place: str, columns: Columns) -> Iterator[RecordBlock]:
    """Return the blocks of a `datasets.Dataset`."""
    table = table.select_columns(columns(table.column_names)).with_format("arrow")
    return _batches(table.iter(ROWS_IN_A_BLOCK), place)


def read_parquet(file: Path, columns: Columns) -> Iterator[RecordBlock]:
    import pyarrow.parquet

    with whole(file), pyarrow.parquet.ParquetFile(file) as table:
        wanted = columns(table.schema_arrow.names)
        yield from _batches(table.iter_batches(_rows_at_once(table.metadata, wanted), columns=wanted), str(file))


def _rows_at_once(metadata: Any, wanted: list[str]) -> int:
    """Return how many rows make up a block, by the mean size of a row: little more than one block is in memory."""
    size = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(column) for column in range(group.num_columns)]
        size += sum(it.total_uncompressed_size for it in columns if it.path_in_schema.split(".")[0] in wanted)
    return max(1, min(ROWS_IN_A_BLOCK, blocks.BLOCK_BYTES * metadata.num_rows // max(1, size)))


def read_arrow(file: Path, columns: Columns) -> Iterator[RecordBlock]:
    """Yield the blocks of a table in Arrow's stream format, which is complete once its end is marked."""
    import pyarrow

    with whole(file), pyarrow.memory_map(str(file)) as source:
        start = source.size() - len(_END_OF_STREAM)
        if start < 0 or source.read_at(len(_END_OF_STREAM), start) != _END_OF_STREAM:
            raise pyarrow.ArrowInvalid("the end of Arrow's stream format is missing")
        with pyarrow.ipc.open_stream(source) as stream:
            table = stream.read_all()
        table = table.select(columns(table.column_names))
        yield from _batches(table.to_batches(ROWS_IN_A_BLOCK), str(file))


def _batches(batches: Iterable[Any], place: str) -> Iterator[RecordBlock]:
    first = 1
    for batch in batches:
        for part in _halved(batch):
            yield RecordBlock(part.nbytes, partial(_rows, part, place, first))
            first += len(part)


def _halved(batch: Any) -> Iterator[Any]:
    """Yield the rows in parts of a block's size: a few rows may be much larger than the mean."""
    if batch.nbytes <= blocks.BLOCK_BYTES or len(batch) == 1:
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
