"""Object storage and other URLs: find files, read them through failures, keep shards in a bounded local cache.

Whatever fsspec opens (s3://, gs://, hf://, https://, file://, memory:// ...), with the credentials its packages find.
Invariants: a reader gives the bytes of one version of a file or raises; a cache folder, half-written files included,
never holds more than its limit, and `get` gives only what has the asked hash.

A copy is in use while a process holds a shared lock (flock) on it; one being written is at its full size from the start
and locked by its writer, so a half-written file without a lock is a crash's. `lock` guards who deletes and who begins.
"""

import io
import random
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar

from dist_lm.errors import DataError, UserError, in_a_line

BLOCK = 2**22  # bytes fetched at once, and read ahead
LARGEST_READ = 2**25  # bytes of one request
SMALL_FILE = 2**28  # bytes of a manifest or tokenizer
FIRST_WAIT, LONGEST_WAIT, PATIENCE = (
    0.5,
    8.0,
    60.0,
)  # seconds: between tries, doubling, and from first failure to last
_MARKS = (
    "blob_id",
    "md5Hash",
    "ETag",
    "etag",
    "checksum",
    "VersionId",
    "Last-Modified",
    "mtime",
    "created",
)
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "ParamValidationError",
}
_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    ValueError,
    TypeError,
    NotImplementedError,
)

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
    is_web = pattern.startswith(
        ("http://", "https://")
    )  # what follows a ? in a web address is a query
    magic = "[*[]" if is_web else "[*?[]"
    is_glob = re.search(magic, path) is not None

    def look() -> tuple[str, dict[str, dict[str, Any]]]:
        fs.invalidate_cache(path)
        if is_glob:
            return re.split(rf"[^/]*{magic}", path)[0].rstrip("/"), fs.glob(path, detail=True)
        info = fs.info(path)
        if info["type"] == "file" and not path.endswith(
            "/"
        ):  # a web server's folder looks like a file
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
        raise DataError(f"{label}={pattern!r}: nothing is there") from error
    except OSError as error:
        raise DataError(f"{label}={pattern!r}: {in_a_line(error)}") from error
    if not found:
        what = "no file matches" if is_glob else f"it has none of {' '.join(endings)}"
        raise DataError(f"{label}={pattern!r}: {what}")
    return sorted(found)


def exists(url: str) -> bool:
    """Whether there is a file."""
    fs, path = _connect(url)
    try:
        return bool(_retry(url, partial(fs.info, path))["type"] == "file")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(str(error)) from error


def open_file(path: str, size: int | None = None, mark: str | None = None) -> io.BufferedReader:
    """A seekable reader that outlives failures; of the version with this size and mark, or of what is there now."""
    return io.BufferedReader(_Reader(path, size, mark), BLOCK)


def fetch_small(url: str) -> bytes:
    """A whole small file."""
    try:
        with open_file(url) as file:
            content = file.read(SMALL_FILE + 1)
    except OSError as error:
        raise DataError(str(error)) from error
    if len(content) > SMALL_FILE:
        raise DataError(
            f"{url}: larger than the {SMALL_FILE // 2**20} MB that such a file may have"
        )
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
        file = fs.open(
            path, "rb", block_size=BLOCK, cache_type="none"
        )  # s3fs then asks for the version it found here
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
        scheme, extra = (
            url.partition("://")[0],
            " (pip install 'dist_lm[s3]')" if url.startswith("s3") else "",
        )
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
            status = getattr(
                error.__cause__, "status", 0
            )  # fsspec calls whatever fails at a web server not found
            is_web = (
                type(error.__cause__).__module__.startswith("aiohttp") and not 400 <= status < 429
            )
            if isinstance(error, FileNotFoundError) and not is_web:
                raise FileNotFoundError(f"{url}: no such file") from error
            if (isinstance(error, _FINAL) and not is_web) or type(
                error
            ).__name__ in _NO_CREDENTIALS:
                raise OSError(f"{url}: {reason}") from error
            tries += 1
            if tries == 1:
                begin = time.monotonic()
                print(
                    f"{url}: {reason}; trying again for {PATIENCE:g} s", file=sys.stderr, flush=True
                )
            elif time.monotonic() - begin + wait > PATIENCE:
                raise OSError(
                    f"{url}: given up after {tries} tries in {PATIENCE:g} s; the last: {reason}"
                ) from error
        time.sleep(
            wait * random.SystemRandom().uniform(0.7, 1)
        )  # not the state of `random`, which is a run's
        wait = min(2 * wait, LONGEST_WAIT)


def _mark(info: Mapping[str, Any]) -> str:
    value = next((info[key] for key in _MARKS if info.get(key)), "")
    return str(value.timestamp() if isinstance(value, datetime) else value).strip(
        '"'
    )  # lists and files differ in form
