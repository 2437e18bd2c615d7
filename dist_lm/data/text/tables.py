"""Rows of Arrow tables: .parquet and .arrow files, and hub datasets that `datasets` streams.

Parquet is read here because the reader of `datasets` was seen to hold a whole row group
(1.8 GB for 0.9 GB of text, against 0.1 GB here).
"""

import contextlib
import gc
from collections.abc import Iterator
from itertools import count
from typing import Any, BinaryIO

from dist_lm.config import SourceConfig
from dist_lm.data.text import lines
from dist_lm.data.text.columns import Columns, Rows, ToText
from dist_lm.data.text.files import Part, TextFile, reason_of
from dist_lm.data.text.table_file import TableFile
from dist_lm.errors import DataError

_BATCH_ROWS = 64  # rows taken from Parquet or the hub at once
_BATCH_BYTES = 2**24  # text that such a batch of Parquet has at most, by the average row


def parquet_rows(file: BinaryIO, part: Part, start: int, columns: Columns) -> tuple[Rows, ToText]:
    """The rows of some row groups, numbered in the whole file, from the row `start` on."""
    table = _open_table(file, ".parquet", columns)
    rows_before = sum(rows for rows, _ in table.groups[: part.begin])
    first = max(start, rows_before + 1)
    batches = table.batches(
        row_groups=list(range(part.begin, part.end or len(table.groups))),
        batch_rows=max(1, min(_BATCH_ROWS, _BATCH_BYTES // _row_bytes(table))),
        passed_over=first - rows_before - 1,
    )
    return zip(count(first), columns.read_tables(batches)), columns.text_of_scalars


def count_row_groups(file: BinaryIO) -> int:
    """The number of row groups of a Parquet file."""
    with contextlib.closing(TableFile(file, ".parquet", [])) as table:
        return len(table.groups)


def arrow_rows(file: BinaryIO, part: Part, start: int, columns: Columns) -> tuple[Rows, ToText]:
    """The rows of an Arrow file, or of a stream of Arrow batches that was saved as a file."""
    table = _open_table(file, ".arrow", columns)
    return zip(count(1), columns.read_tables(table.batches())), columns.text_of_scalars


def open_hub_dataset(dataset: TextFile, spec: SourceConfig) -> Any:
    """A hub dataset as `datasets` streams it, cut into as many shards as it can be."""
    import datasets  # slow, and needed for hub names only

    try:
        stream = datasets.load_dataset(
            dataset.name,
            name=spec.subset,
            split=spec.split,
            revision=dataset.mark or spec.revision,
            streaming=True,
        )
    except (ValueError, OSError) as error:
        raise DataError(
            f"no such file here, and no hub dataset to be had: {reason_of(error)};"
            " a folder of token shards is made by python -m dist_lm.prepare"
        ) from error
    # Only Parquet can be cut finer than its files; other formats raise.
    with contextlib.suppress(NotImplementedError):
        stream = stream.reshard()
    return stream.with_format("arrow")


def hub_rows(stream: Any, part: Part, columns: Columns) -> tuple[Rows, ToText]:
    """The rows of one shard of a hub dataset, or of all."""
    tables = _hub_tables(stream, part, columns)
    return zip(count(1), columns.read_tables(tables)), columns.text_of_scalars


def _hub_tables(stream: Any, part: Part, columns: Columns) -> Iterator[Any]:
    if part.end:
        stream = stream.shard(stream.num_shards, part.begin)
    tables = stream.iter(_BATCH_ROWS)
    try:
        for table in tables:
            columns.check_schema(table.schema)
            yield table
    finally:
        # A streamed iterator that is abandoned and still alive can abort the process at its exit.
        del stream, tables
        gc.collect()


def _open_table(file: BinaryIO, format: str, columns: Columns) -> TableFile:
    """Open a table with these columns; refuses one whose rows are too long to be even read."""
    table = TableFile(file, format, columns.names)
    try:
        columns.check_schema(table.schema)
        _row_bytes(table)
    except ValueError:
        table.close()
        raise
    return table


def _row_bytes(table: TableFile) -> int:
    """Bytes of an average row of Parquet, in the row groups where each column has most."""
    largest: dict[int, int] = {}
    for number, (rows, sizes) in enumerate(table.groups):
        for column, size in enumerate(sizes):
            average = max(size, 0) // max(rows, 1)
            if lines.is_too_long(average):  # row groups count from 1 in messages
                raise ValueError(f"row group {number + 1}: its rows are {lines.TOO_LONG}")
            largest[column] = max(largest.get(column, 0), average)
    return sum(largest.values()) + 1
