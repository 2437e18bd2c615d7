"""Parquet and Arrow files, read through a process of their own, whose crash is a damaged file.

A process serves one open file at a time, and is kept for the next one. See `table_parser` for what
runs in it.
"""

import atexit
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any, BinaryIO

from dist_lm.data.child import start_child
from dist_lm.data.text.files import LostRestError

_PROGRAM = "import sys; from dist_lm.data.text.table_parser import serve; serve(int(sys.argv[1]))"
# Fewer threads, and memory that goes back to the system.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
# Others end the process from outside, whatever it reads.
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_LIMITS = {signal.SIGXCPU: "takes too long"}


class _Parser:
    """A process that parses, and the pipe to it."""

    def __init__(self) -> None:
        self.pipe, self.process = start_child(_PROGRAM, env=_ENVIRONMENT, is_quiet=True)
        self.is_waiting = True  # for a request
        _all.add(self)

    def send(self, *parts: bytes | memoryview) -> None:
        try:
            for part in parts:
                self.pipe.send_bytes(part)
        except OSError as error:
            raise self._ending() from error

    def receive(self) -> bytes:
        try:
            return self.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._ending() from error

    def end(self) -> None:
        self.process.kill()
        self.pipe.close()
        self.process.wait()
        _all.discard(self)

    def _ending(self) -> Exception:
        """The error that says why the process is gone."""
        code = self.process.wait()
        number = -code if code < 0 else 0
        if number in _LIMITS:
            return LostRestError(f"damaged: reading it {_LIMITS[signal.Signals(number)]}")
        if number in _CRASHES:
            name = signal.Signals(number).name
            return LostRestError(f"damaged: it crashes the process that reads it ({name})")
        return OSError(f"the process that reads it ended with exit code {code}")


_all: set[_Parser] = set()
_idle: list[_Parser] = []


def _end_all() -> None:
    for parser in list(_all):
        parser.end()


def _forget_all() -> None:
    """After a fork: the processes are those of the parent."""
    for parser in _all:
        parser.pipe.close()
        parser.process.returncode = 0  # or its end would warn that it still runs
    _all.clear()
    _idle.clear()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget_all)


class TableFile:
    """An open Parquet or Arrow file.

    - `schema`: of all its columns
    - `groups`: for each row group of Parquet, its rows, and the bytes of each column asked for
    """

    def __init__(self, file: BinaryIO, format: str, columns: list[str]):
        import pyarrow as pa  # slow, and needed for these files only

        self._file = file
        self._columns = columns
        self._parser: _Parser | None = None
        try:
            self._parser = _idle.pop()
        except IndexError:
            self._parser = _Parser()
        size = file.seek(0, os.SEEK_END)
        request = {"format": format, "size": size, "columns": columns}
        try:
            _, facts = self._ask("open", request)
        except BaseException:
            self.close()
            raise
        groups, _, schema = facts.partition(b"\n")
        self.groups: list[tuple[int, list[int]]] = json.loads(groups)
        self.schema = pa.ipc.read_schema(pa.py_buffer(schema))

    def batches(
        self, *, row_groups: list[int] | None = None, batch_rows: int = 0, passed_over: int = 0
    ) -> Iterator[Any]:
        """Its record batches, or those of some row groups, without the first rows of them all."""
        import pyarrow as pa  # loaded before

        request: dict[str, Any] = {"columns": self._columns, "row_groups": row_groups}
        request |= {"batch_rows": batch_rows, "passed_over": passed_over}
        with contextlib.closing(self):
            self._ask("read", request)
            while True:
                kind, content = self._ask("next", {})
                if kind == b"end":
                    return
                yield pa.ipc.open_stream(pa.py_buffer(content)).read_next_batch()

    def close(self) -> None:
        """Let the process parse another file, or end it if it is in the middle of something."""
        parser = self._parser
        self._parser = None
        if parser is None:
            return
        if parser.is_waiting and parser.process.poll() is None:
            _idle.append(parser)
        else:
            parser.end()

    def _ask(self, kind: str, request: dict[str, Any]) -> tuple[bytes, bytes]:
        """Send a request, and give the bytes of the file that are wanted until it is answered."""
        parser = self._parser
        assert parser, "it was closed"
        parser.is_waiting = False
        parser.send(kind.encode(), json.dumps(request).encode())
        while True:
            answer = parser.receive()
            content = parser.receive()
            if answer != b"want":
                break
            offset, count = json.loads(content)
            self._file.seek(offset)
            # Fewer bytes than wanted are there where the file is cut while it is read.
            parser.send(self._file.read(count))
        parser.is_waiting = True
        if answer == b"error":
            raise LostRestError(content.decode())
        return answer, content
