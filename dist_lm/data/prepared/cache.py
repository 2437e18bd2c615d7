"""Local copies of prepared shards that lie at a URL, shared by all processes of a node.

Invariants: a cache folder, half-written files included, never holds more than its limit, and `get`
returns only a copy with the right hash.

Files and locks:
- A copy is in use while a process holds a shared lock (flock) on it.
- A copy that is being written has its full size from the start, and its writer has it locked
  exclusively. So a half-written file that is not locked was left by a crash.
- The file `lock` guards deleting a copy and beginning one: one process at a time does either.
"""

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from dist_lm.data.remote import BLOCK, open_file
from dist_lm.disk import disk_may_fail
from dist_lm.errors import DataError, RetryableError, UserError, in_a_line

# Seconds that other processes have to release copies, before the cache is called too small.
ROOM_WAIT = 30.0
ROOM_PAUSE = 0.05  # seconds between two looks for room
DOWNLOADS = 2  # before a file with the wrong content is given up

_COPY_NAME = re.compile(r"[0-9a-f]{16}-")


class Copy(NamedTuple):
    """A file of the far folder, and where its local copy is or will be."""

    name: str
    size: int
    sha256: str
    path: Path

    @property
    def unfinished(self) -> Path:
        """The path of the copy while it is being written."""
        return self.path.with_name(f"tmp-{self.path.name}")


class ShardCache:
    """The local copies of one far folder. Any thread may call `get` and `release`."""

    def __init__(self, url: str, folder: Path, limit_bytes: int):
        self.url = url.rstrip("/")
        self.folder = folder
        self.limit = limit_bytes
        # Open and locked files by name, one for each `get`.
        self.held: defaultdict[str, list[int]] = defaultdict(list)
        # Names of copies that this process has checked against their hash.
        self.checked: set[str] = set()
        with self._disk_may_fail():
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._sweep()

    def get(self, name: str, size: int, sha256: str) -> Path:
        """The copy of a file, in use until it is released."""
        with self._disk_may_fail():
            return self._get(self._copy(name, size, sha256))

    def _get(self, copy: Copy) -> Path:
        if copy.size > self.limit:
            self._refuse(copy, needed=copy.size)
        deadline = time.monotonic() + ROOM_WAIT
        descriptor = self._take(copy)
        while descriptor is None:
            begun = self._begin(copy, deadline)
            if begun is not None:
                self._download(copy, begun)
            descriptor = self._take(copy)
        os.utime(descriptor)
        self.held[copy.name].append(descriptor)
        return copy.path

    def release(self, name: str) -> None:
        """Allow others to delete the copy. Call it once for each `get`.

        Whoever has mapped the file drops the mapping first.
        """
        os.close(self.held[name].pop())

    def _disk_may_fail(self) -> contextlib.AbstractContextManager[None]:
        return disk_may_fail(self.folder, "the shards at the URL are not copied")

    def _copy(self, name: str, size: int, sha256: str) -> Copy:
        file_name = f"{sha256[:16]}-{name}"
        assert "/" not in file_name, (
            f"{file_name}: the manifest's names are checked where it is read, and lead out of no"
            " folder"
        )
        return Copy(name, size, sha256, self.folder / file_name)

    def _take(self, copy: Copy) -> int | None:
        """Lock a copy as in use, if there is a good one; a damaged one is deleted."""
        try:
            descriptor = os.open(copy.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if self._is_good(copy, descriptor):
            self.checked.add(copy.path.name)
            return descriptor
        with self._locked():
            # Another process may have put a good copy there in the meantime.
            if _is_at(descriptor, copy.path):
                copy.path.unlink()
        os.close(descriptor)
        return None

    def _is_good(self, copy: Copy, descriptor: int) -> bool:
        """Whether an open file is the copy, and whole. Its hash is checked once a process."""
        if not _is_at(descriptor, copy.path) or os.fstat(descriptor).st_size != copy.size:
            return False
        if copy.path.name in self.checked:
            return True
        with open(descriptor, "rb", closefd=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == copy.sha256

    def _begin(self, copy: Copy, deadline: float) -> int | None:
        """Make room for a copy, and a locked file of its size to write to.

        Returns None, after a wait, if the caller should look for the copy again: another process
        has it or writes it, or there is no room yet.
        """
        with self._locked():
            self._sweep()
            if copy.path.exists():
                return None
            is_begun = copy.unfinished.exists()
            bytes_in_use = 0
            if not is_begun:
                bytes_in_use = self._make_room(copy.size)
                if not bytes_in_use:
                    return _create_locked(copy.unfinished, copy.size)
        if is_begun:
            _wait_for_writer(copy.unfinished)
        elif time.monotonic() > deadline:
            self._refuse(copy, needed=bytes_in_use + copy.size)
        else:
            time.sleep(ROOM_PAUSE)
        return None

    def _download(self, copy: Copy, descriptor: int) -> None:
        """Fill the unfinished file, check it and give it its name."""
        try:
            self._fill(copy, descriptor)
            with self._locked():
                os.replace(copy.unfinished, copy.path)
            self.checked.add(copy.path.name)
        except BaseException as error:
            with contextlib.suppress(OSError):  # else it is swept away later
                copy.unfinished.unlink()
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                setting = f"data.cache_gb={self.limit / 1e9:g}"
                raise UserError(
                    f"{self.folder}: the disk is full before {setting} is; rule: it has that much"
                ) from error
            raise
        finally:
            os.close(descriptor)

    def _fill(self, copy: Copy, descriptor: int) -> None:
        """Write the far file's content; refuses it if it is wrong twice."""
        url = f"{self.url}/{copy.name}"
        fault = ""
        for _ in range(DOWNLOADS):
            size, sha256 = _write_content(url, descriptor, most=copy.size)
            if size != copy.size:
                fault = f"not {copy.size} bytes"
            elif sha256 != copy.sha256:
                fault = f"sha256 {sha256[:12]}, not {copy.sha256[:12]}"
            else:
                return
        raise DataError(f"{url}: {fault}, twice; rule: as its manifest has it; prepare again")

    def _make_room(self, size: int) -> int:
        """Delete the least recently used copies until `size` more bytes fit. Under the lock.

        Returns 0 if they fit, else how many bytes are in use.
        """
        files = [(file, file.stat()) for file in self.folder.iterdir() if file.name != "lock"]
        total = sum(stat.st_size for _, stat in files)
        for file, stat in sorted(files, key=lambda entry: entry[1].st_mtime_ns):
            if total + size <= self.limit:
                break
            if _COPY_NAME.match(file.name) and _unlink_unused(file):
                total -= stat.st_size
        return 0 if total + size <= self.limit else total

    def _sweep(self) -> None:
        """Delete the half-written files that a crash left. Under the lock."""
        for file in self.folder.glob("tmp-*"):
            _unlink_unused(file)

    def _locked(self) -> contextlib.AbstractContextManager[int]:
        """Inside, no other process deletes or begins a copy."""
        return _open_locked(self.folder / "lock", fcntl.LOCK_EX, os.O_RDWR | os.O_CREAT)

    def _refuse(self, copy: Copy, needed: int) -> NoReturn:
        gigabytes = math.ceil(needed / 1e7) / 100
        raise UserError(
            f"data.cache_gb={self.limit / 1e9:g} has no room for {copy.name} of"
            f" {copy.size / 1e9:.3g} GB; rule: the shards in use at once fit;"
            f" nearest: {gigabytes:g}"
        )


def _write_content(url: str, descriptor: int, most: int) -> tuple[int, str]:
    """Copy a far file to the beginning of an open one; returns its size and sha256.

    A file of more than `most` bytes is given up, and its size returned as greater than that.
    """
    digest = hashlib.sha256()
    size = 0
    for block in _blocks_of(url, most + 1):
        digest.update(block)
        if size + len(block) <= most:
            _write_at(descriptor, block, size)
        size += len(block)
    return size, digest.hexdigest()


def _blocks_of(url: str, most: int) -> Iterator[bytes]:
    """The first bytes of a far file. Its failures are told from those of our disk here."""
    left = most
    try:
        with open_file(url) as file:
            while left and (block := file.read(min(BLOCK, left))):
                left -= len(block)
                yield block
    except FileNotFoundError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise RetryableError(in_a_line(error)) from error


def _write_at(descriptor: int, data: bytes, place: int) -> None:
    """Write all of it. One call may write a part, and raises at the next call why."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, place)
        view = view[written:]
        place += written


def _create_locked(path: Path, size: int) -> int:
    """A new file of that size, open for writing and locked."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.ftruncate(descriptor, size)
    return descriptor


def _wait_for_writer(path: Path) -> None:
    """Wait until the process that writes a file is done, or dead."""
    with contextlib.suppress(FileNotFoundError), _open_locked(path, fcntl.LOCK_SH):
        pass


@contextlib.contextmanager
def _open_locked(path: Path, how: int, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Inside, this process has the file open and locked."""
    descriptor = os.open(path, flags, 0o644)
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _unlink_unused(file: Path) -> bool:
    """Delete a file unless a process has it locked; returns whether it is gone."""
    try:
        with _open_locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB) as descriptor:
            if _is_at(descriptor, file):
                file.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
