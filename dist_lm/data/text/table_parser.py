"""The process that parses Parquet and Arrow files for `TableFile`.

pyarrow believes what a file says of itself. A damaged or hostile file can make it read behind the
end of its memory, or end the process. So it parses in a process that has nothing to lose: it gets
the bytes of one file after another through a pipe, with bounds on memory and time, and sends back
record batches that have been validated. It imports no more than it needs, so that it starts soon.

Each message has two parts, its kind and its content. The parent sends `open`, `read` and `next`.
Back come `want` (the parent answers with bytes of the file), and then one of `facts`, `batch`,
`end` and `error`.
"""

import contextlib
import io
import json
import resource
import signal
import sys
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

MEMORY = 4 * 2**30  # bytes of address space, about 0.3 GB of which are code
CPU_SECONDS = 600  # for one request
CHUNK = 2**20  # bytes of a column that are read at once
BATCH_BYTES = 2**24  # about as many are sent at once


def serve(descriptor: int) -> None:
    """Answer requests until the pipe closes."""
    # These may be sent to all processes of a job. The parent decides when this one ends.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # pyarrow imports numpy if it can, and nothing here needs it. Without it a process starts in
    # half the CPU time (0.07 s, not 0.13 s) and has 51 MB instead of 62 MB.
    sys.modules["numpy"] = None  # type: ignore[assignment]
    _limit(resource.RLIMIT_AS, MEMORY)
    pipe = Connection(descriptor)
    batches: Iterator[Any] = iter(())
    table: Any = None
    # These errors mean that the other end is closed, or its process gone.
    with contextlib.suppress(EOFError, OSError):
        while True:
            kind = pipe.recv_bytes()
            request = json.loads(pipe.recv_bytes())
            _limit_time()
            try:
                if kind == b"open":
                    table = None  # the file before this one
                    batches = iter(())
                    table = _open(pipe, request)
                    answer = b"facts", _facts(table, request["columns"])
                elif kind == b"read":
                    batches = _batches(table, request)
                    answer = b"facts", b""
                else:
                    answer = _next(batches)
            except Exception as error:  # whatever pyarrow raises: the content is at fault
                answer = b"error", _in_words(error).encode(errors="replace")
            for part in answer:
                pipe.send_bytes(part)


class _FarFile(io.RawIOBase):
    """The file that the parent has open."""

    def __init__(self, pipe: Connection, size: int):
        self._pipe = pipe
        self._size = size
        self._position = 0

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        self._pipe.send_bytes(b"want")
        self._pipe.send_bytes(json.dumps([self._position, count]).encode())
        data = self._pipe.recv_bytes()
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        position = starts[whence] + offset
        if position < 0:
            raise OSError(f"seek to {position}")
        self._position = position
        return position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _limit_time() -> None:
    """Let a request that never ends be ended by the system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, round(usage.ru_utime + usage.ru_stime) + CPU_SECONDS)


def _limit(kind: int, most: int) -> None:
    """Set a limit, unless a lower one stands already."""
    _, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(kind, (most, hard))


def _open(pipe: Connection, request: dict[str, Any]) -> Any:
    import pyarrow as pa  # slow, and needed in this process only
    import pyarrow.parquet

    file = io.BufferedReader(_FarFile(pipe, request["size"]), 2**16)
    if request["format"] == ".parquet":
        # Without pre-buffering, a page is read when it is needed.
        return pa.parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK)
    if file.peek()[:6] == b"ARROW1":
        return pa.ipc.open_file(file)
    return pa.ipc.open_stream(file)


def _facts(table: Any, columns: list[str]) -> bytes:
    """A line of JSON about the row groups of Parquet, and then the schema."""
    import pyarrow as pa  # slow, and needed in this process only

    groups = []
    schema = table.schema
    if isinstance(table, pa.parquet.ParquetFile):
        schema = table.schema_arrow
        paths = [table.schema.column(n).path for n in range(len(table.schema.names))]
        indices = [paths.index(name) for name in columns if name in paths]
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            sizes = [group.column(index).total_uncompressed_size for index in indices]
            groups.append([group.num_rows, sizes])
    serialized: bytes = schema.remove_metadata().serialize().to_pybytes()
    return json.dumps(groups).encode() + b"\n" + serialized


def _batches(table: Any, request: dict[str, Any]) -> Iterator[Any]:
    """Valid batches of the columns asked for, without the first rows of them all."""
    import pyarrow as pa  # slow, and needed in this process only

    columns = request["columns"]
    batches: Iterable[Any]
    if isinstance(table, pa.parquet.ParquetFile):
        batches = table.iter_batches(
            batch_size=request["batch_rows"],
            row_groups=request["row_groups"],
            columns=columns,
            use_threads=False,
        )
    elif isinstance(table, pa.ipc.RecordBatchFileReader):
        batches = map(table.get_batch, range(table.num_record_batches))
    else:
        batches = table
    passed_over = request["passed_over"]
    for batch in batches:
        columns_of_batch = [_checked(batch.column(name)) for name in columns]
        whole = pa.RecordBatch.from_arrays(columns_of_batch, names=columns)
        begin = min(passed_over, len(whole))
        passed_over -= begin
        rows = len(whole) or 1
        size = max(1, min(rows, BATCH_BYTES * rows // max(whole.nbytes, 1)))
        for start in range(begin, len(whole), size):
            yield whole.slice(start, size)


def _checked(column: Any) -> Any:
    """A column whose offsets and indices lie inside its memory."""
    import pyarrow as pa  # slow, and needed in this process only

    if pa.types.is_dictionary(column.type):
        values = column.dictionary
        _as_bytes(values).validate(full=True)
        column.indices.validate(full=True)
        pa.DictionaryArray.from_arrays(column.indices, _as_bytes(values))  # checks the indices
        # With its dictionary, all values would be sent with each batch.
        with contextlib.suppress(pa.ArrowNotImplementedError):
            return values.take(column.indices)
        return column
    _as_bytes(column).validate(full=True)
    return column


def _as_bytes(column: Any) -> Any:
    """A column of text as bytes.

    Text is checked row by row, when it is decoded. So one bad row is refused, and not its batch.
    """
    import pyarrow as pa  # slow, and needed in this process only

    raw = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }
    if column.type in raw:
        return column.view(raw[column.type])
    return column


def _next(batches: Iterator[Any]) -> tuple[bytes, bytes]:
    """The next batch, as a stream of its own."""
    import pyarrow as pa  # slow, and needed in this process only

    batch = next(batches, None)
    if batch is None:
        return b"end", b""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return b"batch", sink.getvalue()


def _in_words(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"reading it needs more than {MEMORY // 2**30} GB of memory"
    return " ".join(str(error).split()) or type(error).__name__
