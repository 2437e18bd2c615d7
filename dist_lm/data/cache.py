"""data.cache."""

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
from typing import NoReturn

from dist_lm.data.remote import BLOCK, open_file
from dist_lm.errors import DataError, UserError

ROOM_WAIT = (
    30.0  # seconds for other processes to let go of copies before a cache is called too small
)


class ShardCache:
    """Local copies of files at a URL, for all processes of a node; one at a time a process deletes or begins a copy."""

    def __init__(self, url: str, folder: Path, limit_bytes: int):
        self.url, self.folder, self.limit = url.rstrip("/"), folder, limit_bytes
        self.held: defaultdict[str, list[int]] = defaultdict(
            list
        )  # locked file descriptors, one for each `get`
        self.checked: set[str] = set()  # copies whose hash this process has seen to be right
        folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._sweep()

    def get(self, name: str, size: int, sha256: str) -> Path:
        """The copy of a file, in use until released; any thread may call."""
        copy = f"{sha256[:16]}-{name}"
        assert "/" not in copy, (
            f"{copy}: the manifest's names are checked where it is read, and lead out of no folder"
        )
        path = self.folder / copy
        if size > self.limit:
            self._refuse(name, size, size)
        deadline = time.monotonic() + ROOM_WAIT
        while (descriptor := self._take(path, size, sha256)) is None:
            if (aside := self._begin(name, path, size, deadline)) is not None:
                self._download(name, aside, path, size, sha256)
        os.utime(descriptor)
        self.held[name].append(descriptor)
        return path

    def release(self, name: str) -> None:
        """Let others delete the copy, once for each `get`; who still maps it drops the mapping first."""
        os.close(self.held[name].pop())

    def _take(self, path: Path, size: int, sha256: str) -> int | None:
        """Lock a copy as in use, if there is a good one; a damaged one is deleted."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        good = _is_at(descriptor, path) and os.fstat(descriptor).st_size == size
        if good and path.name not in self.checked:
            with open(descriptor, "rb", closefd=False) as file:
                good = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        if good:
            self.checked.add(path.name)
            return descriptor
        with self._locked():
            if _is_at(descriptor, path):  # not what another process has just put there
                path.unlink()
        os.close(descriptor)
        return None

    def _begin(self, name: str, path: Path, size: int, deadline: float) -> int | None:
        """Make room and a locked file of that size to write to; None, after a wait, if it is to be looked for again."""
        aside = path.with_name(f"tmp-{path.name}")
        with self._locked():
            self._sweep()
            if path.exists():
                return None
            is_begun, in_use = aside.exists(), 0
            if not is_begun and not (in_use := self._make_room(size)):
                descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.ftruncate(descriptor, size)
                return descriptor
        if is_begun:
            with contextlib.suppress(FileNotFoundError), _open_locked(aside, fcntl.LOCK_SH):
                pass  # its writer is done, or dead
        elif time.monotonic() > deadline:
            self._refuse(name, size, in_use + size)
        else:
            time.sleep(0.05)
        return None

    def _download(self, name: str, descriptor: int, path: Path, size: int, sha256: str) -> None:
        """Fill the file, check it and give it its name."""
        aside, url = path.with_name(f"tmp-{path.name}"), f"{self.url}/{name}"
        try:
            for _ in range(2):
                digest, at = hashlib.sha256(), 0
                with open_file(url) as file:
                    while at <= size and (block := file.read(min(BLOCK, size + 1 - at))):
                        digest.update(block)
                        at += len(block)
                        if at <= size:
                            os.pwrite(descriptor, block, at - len(block))
                if at == size and digest.hexdigest() == sha256:
                    break
            else:
                found = (
                    f"sha256 {digest.hexdigest()[:12]}, not {sha256[:12]}"
                    if at == size
                    else f"not {size} bytes"
                )
                raise DataError(
                    f"{url}: {found}, twice; rule: as its manifest has it; prepare again"
                )
            with self._locked():
                os.replace(aside, path)
            self.checked.add(path.name)
        except BaseException as error:
            aside.unlink()
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                limit = f"data.cache_gb={self.limit / 1e9:g}"
                raise UserError(
                    f"{self.folder}: the disk is full before {limit} is; rule: it has that much"
                ) from error
            raise
        finally:
            os.close(descriptor)

    def _make_room(self, size: int) -> int:
        """Delete what was used least recently until `size` more fits; else how much is in use. Under the lock."""
        files = [(file, file.stat()) for file in self.folder.iterdir() if file.name != "lock"]
        total = sum(stat.st_size for _, stat in files)
        for file, stat in sorted(files, key=lambda entry: entry[1].st_mtime_ns):
            if total + size <= self.limit:
                return 0
            if re.match(r"[0-9a-f]{16}-", file.name) and _unlink_unused(file):
                total -= stat.st_size
        return 0 if total + size <= self.limit else total

    def _sweep(self) -> None:
        """Delete what a crash left half-written. Under the lock."""
        for file in self.folder.glob("tmp-*"):
            _unlink_unused(file)

    def _locked(self) -> contextlib.AbstractContextManager[int]:
        return _open_locked(self.folder / "lock", fcntl.LOCK_EX, os.O_RDWR | os.O_CREAT)

    def _refuse(self, name: str, size: int, needed: int) -> NoReturn:
        gigabytes = math.ceil(needed / 1e7) / 100
        raise UserError(
            f"data.cache_gb={self.limit / 1e9:g} has no room for {name} of {size / 1e9:.3g} GB;"
            f" rule: the shards in use at once fit; nearest: {gigabytes:g}"
        )


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
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _unlink_unused(file: Path) -> bool:
    """Delete a file unless a process has it locked."""
    try:
        with _open_locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB) as descriptor:
            if _is_at(descriptor, file):
                file.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
