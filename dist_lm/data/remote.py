"""Object storage and other URLs: find files, read them through failures, keep shards in a bounded local cache.

Whatever fsspec opens (s3://, gs://, hf://, https://, file://, memory:// ...), with the credentials its packages find.
Invariants: a reader gives the bytes of one version of a file or raises; a cache folder, half-written files included,
never holds more than its limit, and `get` gives only what has the asked hash.

A copy is in use while a process holds a shared lock (flock) on it; one being written is at its full size from the start
and locked by its writer, so a half-written file without a lock is a crash's. `lock` guards who deletes and who begins.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import math
import os
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from dist_lm.config import UserError
from dist_lm.outcome import in_a_line

BLOCK = 2**22  # bytes fetched at once, and read ahead
LARGEST_READ = 2**25  # bytes of one request
SMALL_FILE = 2**28  # bytes of a manifest or tokenizer
FIRST_WAIT, LONGEST_WAIT, PATIENCE = 0.5, 8.0, 60.0  # seconds: between tries, doubling, and from first failure to last
ROOM_WAIT = 30.0  # seconds for other processes to let go of copies before a cache is called too small
_MARKS = ("blob_id", "md5Hash", "ETag", "etag", "checksum", "VersionId", "Last-Modified", "mtime", "created")
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"}
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, TypeError, NotImplementedError)
_BAD_DATA = 65

T = TypeVar("T")


class Found(NamedTuple):
    """A file at a URL; `mark` is what changes when its content does."""

    name: str
    path: str
    size: int
    mark: str


class ChangedError(OSError):
    """A file is not what it was when it was found or first opened."""


def is_remote(path: str) -> bool:
    return re.match(r"[a-zA-Z][\w+.-]+://", path) is not None


def find(pattern: str, endings: tuple[str, ...], label: str = "data.input") -> list[Found]:
    """The files of a URL that is a file, a folder (all below with such an ending) or a glob, ordered by name."""
    fs, path = _connect(pattern)
    is_web = pattern.startswith(("http://", "https://"))  # what follows a ? in a web address is a query
    magic = "[*[]" if is_web else "[*?[]"
    is_glob = re.search(magic, path) is not None

    def look() -> tuple[str, dict[str, dict[str, Any]]]:
        fs.invalidate_cache(path)
        if is_glob:
            return re.split(rf"[^/]*{magic}", path)[0].rstrip("/"), fs.glob(path, detail=True)
        info = fs.info(path)
        if info["type"] == "file" and not path.endswith("/"):  # a web server's folder looks like a file
            return path.partition("?")[0].rpartition("/")[0], {path: info}
        return path.rstrip("/"), fs.find(path, detail=True)

    try:
        root, infos = _retry(pattern, look)
        found = []
        for path_, info in infos.items():
            name = path_.removeprefix(root).lstrip("/")
            name = name.partition("?")[0] if is_web else name
            hidden = "/." in f"/{name}" and "/." not in path[len(root) :]
            other = root == path.rstrip("/") and not name.endswith(endings)  # a folder's
            if info["type"] != "file" or name.endswith("/") or hidden or other:
                continue
            if info.get("size") is None:  # a web server's list has names only
                info = _retry(path_, partial(fs.info, path_))
            if info.get("size") is None:
                raise OSError(f"{path_}: the server does not say its size; nearest: download it")
            found.append(Found(name, fs.unstrip_protocol(path_), info["size"], _mark(info)))
    except FileNotFoundError as error:
        raise UserError(f"{label}={pattern!r}: nothing is there", _BAD_DATA) from error
    except OSError as error:
        raise UserError(f"{label}={pattern!r}: {in_a_line(error)}", _BAD_DATA) from error
    if not found:
        what = "no file matches" if is_glob else f"it has none of {' '.join(endings)}"
        raise UserError(f"{label}={pattern!r}: {what}", _BAD_DATA)
    return sorted(found)


def exists(url: str) -> bool:
    """Whether there is a file."""
    fs, path = _connect(url)
    try:
        return bool(_retry(url, partial(fs.info, path))["type"] == "file")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(str(error), _BAD_DATA) from error


def open_file(path: str, size: int | None = None, mark: str | None = None) -> io.BufferedReader:
    """A seekable reader that outlives failures; of the version with this size and mark, or of what is there now."""
    return io.BufferedReader(_Reader(path, size, mark), BLOCK)


def fetch_small(url: str) -> bytes:
    """A whole small file."""
    try:
        with open_file(url) as file:
            content = file.read(SMALL_FILE + 1)
    except OSError as error:
        raise UserError(str(error), _BAD_DATA) from error
    if len(content) > SMALL_FILE:
        raise UserError(f"{url}: larger than the {SMALL_FILE // 2**20} MB that such a file may have", _BAD_DATA)
    return content


class _Reader(io.RawIOBase):
    """One version of a remote file; each read is one request, repeated on a new connection when it fails."""

    def __init__(self, url: str, size: int | None, mark: str | None):
        self.url, self.size, self.mark, self.position = url, size, mark, 0
        self.file: Any = None
        _retry(url, self._reopen)

    def _reopen(self) -> None:
        fs, path = _connect(self.url)
        fs.invalidate_cache(path)
        file = fs.open(path, "rb", block_size=BLOCK, cache_type="none")  # s3fs then asks for the version it found here
        if isinstance(file, io.BytesIO):
            file = io.BytesIO(file.getvalue())  # memory:// gives every reader the same object
        info = getattr(file, "details", None) or {}
        if not _mark(info):
            info = fs.info(path)
        now, before = (info["size"], _mark(info)), (self.size, self.mark)
        if any(old is not None and old != new for old, new in zip(before, now, strict=True)):
            raise ChangedError(
                f"{self.url.partition('?')[0]}: changed while it was read: size and mark were {before}, now {now}"
            )
        self.file, (self.size, self.mark) = file, now

    def _fetch(self, count: int) -> bytes:
        if self.file is None:
            self._reopen()
        try:
            self.file.seek(self.position)
            data: bytes = self.file.read(count)
            if len(data) != count:
                raise OSError(f"{len(data)} bytes came of {count}")
        except Exception:
            self.file = None
            raise
        return data

    def readinto(self, buffer: Any) -> int:
        assert self.size is not None, "opening sets it"
        count = min(len(buffer), self.size - self.position, LARGEST_READ)
        if count <= 0:
            return 0
        buffer[:count] = _retry(self.url, lambda: self._fetch(count))
        self.position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert self.size is not None, "opening sets it"
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise OSError(f"{self.url}: seek to {start + offset}")
        self.position = start + offset
        return self.position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed and self.file is not None:
            self.file.close()
        super().close()


def _connect(url: str) -> tuple[Any, str]:
    """The file system of a URL (fsspec keeps one a thread) and the path in it; lists are never remembered."""
    import fsspec.core  # slow, and needed for URLs only

    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        scheme, extra = url.partition("://")[0], " (pip install 'dist_lm[s3]')" if url.startswith("s3") else ""
        raise UserError(f"{url}: {scheme}:// needs a package: {in_a_line(error)}{extra}") from error
    except ValueError as error:
        raise UserError(
            f"{url}: {in_a_line(error)}; rule: a scheme that fsspec knows, like s3, gs, hf, https"
        ) from error
    return fs, path


def _retry(url: str, action: Callable[[], T]) -> T:
    """Do it; on failures that may pass, again and again for about a minute."""
    begin, wait, tries = 0.0, FIRST_WAIT, 0
    url = url.partition("?")[0]  # what follows may be a signature: not for a message
    while True:
        try:
            return action()
        except (ChangedError, UserError):
            raise
        except Exception as error:  # botocore's and aiohttp's are not all OSErrors
            reason = in_a_line(error)
            status = getattr(error.__cause__, "status", 0)  # fsspec calls whatever fails at a web server not found
            is_web = type(error.__cause__).__module__.startswith("aiohttp") and not 400 <= status < 429
            if isinstance(error, FileNotFoundError) and not is_web:
                raise FileNotFoundError(f"{url}: no such file") from error
            if (isinstance(error, _FINAL) and not is_web) or type(error).__name__ in _NO_CREDENTIALS:
                raise OSError(f"{url}: {reason}") from error
            tries += 1
            if tries == 1:
                begin = time.monotonic()
                print(f"{url}: {reason}; trying again for {PATIENCE:g} s", file=sys.stderr, flush=True)
            elif time.monotonic() - begin + wait > PATIENCE:
                raise OSError(f"{url}: given up after {tries} tries in {PATIENCE:g} s; the last: {reason}") from error
        time.sleep(wait * random.SystemRandom().uniform(0.7, 1))  # not the state of `random`, which is a run's
        wait = min(2 * wait, LONGEST_WAIT)


def _mark(info: Mapping[str, Any]) -> str:
    value = next((info[key] for key in _MARKS if info.get(key)), "")
    return str(value.timestamp() if isinstance(value, datetime) else value).strip('"')  # lists and files differ in form


class ShardCache:
    """Local copies of files at a URL, for all processes of a node; one at a time a process deletes or begins a copy."""

    def __init__(self, url: str, folder: Path, limit_bytes: int):
        self.url, self.folder, self.limit = url.rstrip("/"), folder, limit_bytes
        self.held: defaultdict[str, list[int]] = defaultdict(list)  # locked file descriptors, one for each `get`
        self.checked: set[str] = set()  # copies whose hash this process has seen to be right
        folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._sweep()

    def get(self, name: str, size: int, sha256: str) -> Path:
        """The copy of a file, in use until released; any thread may call."""
        copy = f"{sha256[:16]}-{name}"
        assert "/" not in copy, f"{copy}: the manifest's names are checked where it is read, and lead out of no folder"
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
                found = f"sha256 {digest.hexdigest()[:12]}, not {sha256[:12]}" if at == size else f"not {size} bytes"
                raise UserError(f"{url}: {found}, twice; rule: as its manifest has it; prepare again", _BAD_DATA)
            with self._locked():
                os.replace(aside, path)
            self.checked.add(path.name)
        except BaseException as error:
            aside.unlink()
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                limit = f"data.cache_gb={self.limit / 1e9:g}"
                raise UserError(f"{self.folder}: the disk is full before {limit} is; rule: it has that much") from error
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
