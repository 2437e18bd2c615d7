"""Rows of Arrow tables: .parquet and .arrow files, and hub datasets that `datasets` streams.

Parquet is read here because the reader of `datasets` was seen to hold a whole row group
(1.8 GB for 0.9 GB of text, against 0.1 GB here).
"""

import contextlib
import gc
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, BinaryIO

from dist_lm.config import SourceConfig
from dist_lm.data.text import lines
from dist_lm.data.text.columns import Columns, Rows, ToText
from dist_lm.data.text.files import Part, TextFile, one_line
from dist_lm.errors import DataError

_BATCH_ROWS = 64  # rows taken from Parquet or the hub at once
_BATCH_BYTES = 2**24  # text that such a batch of Parquet has at most, by the average row


def parquet_rows(file: BinaryIO, part: Part, start: int, columns: Columns) -> tuple[Rows, ToText]:
    """The rows of some row groups, numbered in the whole file, from the row `start` on."""
    import pyarrow.parquet  # slow, and needed for these files only

    # Without pre-buffering, a page is read when it is needed.
    table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=lines.CHUNK)
    columns.check_schema(table.schema_arrow)
    rows_before = 0
    for group in range(part.begin):
        rows_before += table.metadata.row_group(group).num_rows
    first = max(start, rows_before + 1)
    row_bytes = sum(_average_bytes(table, name) for name in columns.names)
    batches = table.iter_batches(
        batch_size=max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes)),
        row_groups=list(range(part.begin, part.end or table.num_row_groups)),
        columns=columns.names,
        use_threads=False,
    )
    wanted = _without_first(first - rows_before - 1, batches)
    return zip(count(first), columns.read_tables(wanted)), columns.text_of_scalars


def count_row_groups(file: BinaryIO) -> int:
    """How many row groups a Parquet file has."""
    import pyarrow.parquet  # slow, and needed for these files only

    groups: int = pyarrow.parquet.ParquetFile(file).num_row_groups
    return groups


def arrow_rows(file: BinaryIO, part: Part, start: int, columns: Columns) -> tuple[Rows, ToText]:
    """The rows of an Arrow file, or of a stream of Arrow batches that was saved as a file."""
    import pyarrow as pa  # slow, and needed for these files only

    batches: Iterable[Any]
    if file.peek()[:6] == b"ARROW1":  # type: ignore[attr-defined]
        table = pa.ipc.open_file(file)
        batches = map(table.get_batch, range(table.num_record_batches))
    else:
        table = pa.ipc.open_stream(file)
        batches = table
    columns.check_schema(table.schema)
    return zip(count(1), columns.read_tables(batches)), columns.text_of_scalars


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
            f"no such file here, and no hub dataset to be had: {one_line(error)};"
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


def _without_first(rows: int, batches: Iterable[Any]) -> Iterator[Any]:
    """Record batches without the first rows of them all."""
    for batch in batches:
        passed = min(rows, len(batch))
        rows -= passed
        yield batch.slice(passed)


def _average_bytes(table: Any, column: str) -> int:
    """Bytes of a column in an average row of the row group where that is most.

    Refuses a row group whose average row is too long, so that it is not even read.
    """
    paths = [table.schema.column(n).path for n in range(len(table.schema.names))]
    if column not in paths:
        return 1
    index = paths.index(column)
    sizes = [0]  # row groups count from 1 in messages
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        sizes.append(group.column(index).total_uncompressed_size // max(group.num_rows, 1))
    largest = max(sizes)
    if lines.is_too_long(largest):
        raise ValueError(f"row group {sizes.index(largest)}: its rows are {lines.TOO_LONG}")
    return largest + 1
