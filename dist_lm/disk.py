"""Files that survive a crash.

Invariant: a file has its name only when its content is on disk. It is written aside, fsynced and
renamed, and then its folder is fsynced.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from dist_lm.errors import RetryableError, UserError

_CHUNK = 16 * 2**20  # bytes hashed and written at once
# What no other try changes: a folder that is no folder, or that this user may not write to.
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@contextlib.contextmanager
def disk_may_fail(folder: Path, result: str) -> Iterator[None]:
    """Let a full or failing disk be one line, which says what came of it: `result`.

    What is written by then stays, and the same command goes on from it.
    """
    try:
        yield
    except OSError as error:
        where = f"{error.filename or folder}: {error.strerror or error}; {result}"
        if error.errno in _NOT_OURS:
            raise UserError(f"{where}; nearest: a folder that can be written to") from error
        raise RetryableError(f"{where}; the same command goes on") from error


def open_own(path: str | Path, mode: str, **more: Any) -> IO[Any]:
    """Open a file of ours for writing. Refuses a link: what it leads to may be anybody's."""
    return open(path, mode, opener=_without_links, **more)


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write a file that survives a crash; returns the sha256 of its content.

    An OSError names the file, which those of writing and syncing alone do not.
    """
    aside = path.with_name(f"tmp-{path.name}")
    try:
        _, sha256 = write_parts(aside, parts)
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if error.filename is None:
            error.filename = str(path)
        raise
    return sha256


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that survives a crash."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_file(path, [text.encode()])


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write, hash and fsync a file; returns its size and sha256."""
    digest = hashlib.sha256()
    size = 0
    with open_own(path, "wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            # Hashing and writing release the lock of Python while they work on a chunk.
            for begin in range(0, len(view), _CHUNK):
                chunk = view[begin : begin + _CHUNK]
                digest.update(chunk)
                size += len(chunk)
                while chunk:
                    written = file.write(chunk)
                    chunk = chunk[written:]
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safetensors_head(tensors: Iterable[tuple[str, str, Sequence[int], int]], **more: Any) -> bytes:
    """The beginning of a safetensors file, which the bytes of the tensors follow.

    A tensor is given as its name, type, shape and number of bytes.
    """
    header = dict(more)
    begin = 0
    for name, dtype, shape, size in tensors:
        end = begin + size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    return len(text).to_bytes(8, "little") + text
