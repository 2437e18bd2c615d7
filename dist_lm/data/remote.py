"""Files in object storage and at other URLs: find them, and read them through failures.

A URL is whatever fsspec opens (s3://, gs://, hf://, https://, file://, memory:// ...), with the
credentials that its packages find.
Invariant: a reader returns the bytes of one version of a file, or raises.
"""

import io
import random
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

from dist_lm.console import printable
from dist_lm.errors import DataError, UserError, in_a_line

BLOCK = 2**22  # bytes fetched at once, and read ahead
LARGEST_READ = 2**25  # bytes of one request
SMALL_FILE = 2**28  # bytes of a manifest or tokenizer

FIRST_WAIT = 0.5  # seconds between the first two tries; the wait is then doubled each time
LONGEST_WAIT = 8.0  # seconds between two tries
PATIENCE = 60.0  # seconds from the first failure to the last try

# Fields of a file's description that change when its content does; the first that is there counts.
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
# Errors that another try cannot mend: of Python, and of botocore by name.
_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    ValueError,
    TypeError,
    NotImplementedError,
)
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "ParamValidationError",
}
_FIRST_PASSING_STATUS = 429  # too many requests; this and what follows may pass

T = TypeVar("T")


class RemoteFile(NamedTuple):
    """A file at a URL."""

    name: str  # relative to the folder or glob
    path: str  # its URL
    size: int
    mark: str  # changes when the content does


class ChangedError(OSError):
    """A file is not what it was when it was found or first opened."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return re.match(r"[a-zA-Z][\w+.-]+://", path) is not None


def find(pattern: str, endings: tuple[str, ...], label: str = "data.input") -> list[RemoteFile]:
    """The files of a URL, ordered by name.

    The URL is a file, a folder (its files, at any depth, with one of the endings), or a glob.
    """
    fs, path = _connect(pattern)
    is_web = pattern.startswith(("http://", "https://"))
    # After a ? in a web address comes a query, so there it is no sign of a glob.
    magic = "[*[]" if is_web else "[*?[]"
    is_glob = re.search(magic, path) is not None
    files = []
    try:
        look = partial(_list, fs, path)
        if is_glob:
            look = partial(_list_glob, fs, path, magic)
        root, infos = _retry(pattern, look)
        is_folder = root == path.rstrip("/")
        wants_hidden = "/." in path[len(root) :]
        for file_path, info in infos.items():
            name = file_path.removeprefix(root).lstrip("/")
            if is_web:
                name = name.partition("?")[0]
            is_hidden = "/." in f"/{name}"
            if info["type"] != "file" or name.endswith("/"):
                continue
            if is_hidden and not wants_hidden:
                continue
            if is_folder and not name.endswith(endings):
                continue
            files.append(_describe(fs, file_path, name, info))
    except FileNotFoundError as error:
        raise DataError(f"{label}={pattern!r}: nothing is there") from error
    except OSError as error:
        raise DataError(f"{label}={pattern!r}: {in_a_line(error)}") from error
    if not files:
        reason = "no file matches" if is_glob else f"it has none of {' '.join(endings)}"
        raise DataError(f"{label}={pattern!r}: {reason}")
    return sorted(files)


def exists(url: str) -> bool:
    """Whether there is a file."""
    fs, path = _connect(url)
    try:
        info = _retry(url, partial(fs.info, path))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(str(error)) from error
    return bool(info["type"] == "file")


def open_file(path: str, size: int | None = None, mark: str | None = None) -> io.BufferedReader:
    """A seekable reader that outlives failures.

    It reads the version with this size and mark, or the one that is there now.
    """
    return io.BufferedReader(RemoteReader(path, size, mark), BLOCK)


def fetch_small(url: str) -> bytes:
    """A whole small file."""
    try:
        with open_file(url) as file:
            content = file.read(SMALL_FILE + 1)
    except OSError as error:
        raise DataError(str(error)) from error
    if len(content) > SMALL_FILE:
        limit = SMALL_FILE // 2**20
        raise DataError(f"{url}: larger than the {limit} MB that such a file may have")
    return content


class RemoteReader(io.RawIOBase):
    """One version of a remote file.

    Each read is one request. If it fails, it is repeated on a new connection.
    """

    def __init__(self, url: str, size: int | None, mark: str | None):
        self.url = url
        self.size = size  # of the version; None until the file is opened
        self.mark = mark
        self.position = 0
        self.file: Any = None  # None while there is no connection
        _retry(url, self._reopen)

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
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}
        position = starts[whence] + offset
        if position < 0:
            raise OSError(f"{self.url}: seek to {position}")
        self.position = position
        return position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed and self.file is not None:
            self.file.close()
        super().close()

    def _reopen(self) -> None:
        """Connect, and refuse another version of the file."""
        fs, path = _connect(self.url)
        fs.invalidate_cache(path)
        # s3fs then asks for the version that it found here.
        file = fs.open(path, "rb", block_size=BLOCK, cache_type="none")
        if isinstance(file, io.BytesIO):
            file = io.BytesIO(file.getvalue())  # memory:// gives every reader the same object
        info = getattr(file, "details", None) or {}
        if not _mark(info):
            info = fs.info(path)
        before = (self.size, self.mark)
        now = (info["size"], _mark(info))
        for old, new in zip(before, now, strict=True):
            if old is not None and old != new:
                raise ChangedError(
                    f"{_without_query(self.url)}: changed while it was read: size and mark were"
                    f" {before}, now {now}"
                )
        self.file = file
        self.size, self.mark = now

    def _fetch(self, count: int) -> bytes:
        """The next bytes; drops the connection if they do not come."""
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


def _connect(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    fsspec keeps a file system for each thread. Lists of files are never remembered.
    """
    import fsspec.core  # slow, and needed for URLs only

    schemes = {part.partition("://")[0].lower() for part in url.split("::")}
    if "reference" in schemes:
        raise UserError(
            f"{_without_query(url)}: a reference file says itself which other files are read; rule:"
            " the URL of the files themselves"
        )
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        scheme = url.partition("://")[0]
        extra = " (pip install 'dist_lm[s3]')" if url.startswith("s3") else ""
        raise UserError(f"{url}: {scheme}:// needs a package: {in_a_line(error)}{extra}") from error
    except ValueError as error:
        raise UserError(
            f"{url}: {in_a_line(error)}; rule: a scheme that fsspec knows, like s3, gs, hf, https"
        ) from error
    return fs, path


def _list_glob(fs: Any, path: str, magic: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The folder of a glob, and the description of each file that matches, by path."""
    fs.invalidate_cache(path)
    root = re.split(rf"[^/]*{magic}", path)[0].rstrip("/")
    return root, fs.glob(path, detail=True)


def _list(fs: Any, path: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The folder at a path or of the file there, and the description of each file, by path."""
    fs.invalidate_cache(path)
    info = fs.info(path)
    # A web server's folder looks like a file.
    if info["type"] == "file" and not path.endswith("/"):
        return _without_query(path).rpartition("/")[0], {path: info}
    return path.rstrip("/"), fs.find(path, detail=True)


def _describe(fs: Any, path: str, name: str, info: dict[str, Any]) -> RemoteFile:
    if info.get("size") is None:  # the list of a web server has only names
        info = _retry(path, partial(fs.info, path))
    if info.get("size") is None:
        raise OSError(f"{path}: the server does not say its size; nearest: download it")
    return RemoteFile(name, fs.unstrip_protocol(path), info["size"], _mark(info))


def _mark(info: Mapping[str, Any]) -> str:
    """A mark that changes with the content of a file; "" if the file system has none."""
    mark: Any = ""
    for key in _MARKS:
        if info.get(key):
            mark = info[key]
            break
    if isinstance(mark, datetime):
        mark = mark.timestamp()
    # Lists put quotes around a hash, descriptions of single files do not.
    return str(mark).strip('"')


def _without_query(url: str) -> str:
    """A URL without what follows a ?, which may be a signature and belongs in no message."""
    return url.partition("?")[0]


def _retry(url: str, action: Callable[[], T]) -> T:
    """Do the action; after failures that may pass, again and again for PATIENCE seconds."""
    begin = 0.0
    wait = FIRST_WAIT
    tries = 0
    url = _without_query(url)
    while True:
        try:
            return action()
        except (ChangedError, UserError):
            raise
        except Exception as error:  # not all errors of botocore and aiohttp are OSErrors
            reason = in_a_line(error)
            if not _may_pass(error):
                _raise_final(url, error)
            tries += 1
            if tries == 1:
                begin = time.monotonic()
                message = f"{url}: {reason}; trying again for {PATIENCE:g} s"
                print(printable(message), file=sys.stderr, flush=True)
            elif time.monotonic() - begin + wait > PATIENCE:
                raise OSError(
                    f"{url}: given up after {tries} tries in {PATIENCE:g} s; the last: {reason}"
                ) from error
        # SystemRandom, because the state of `random` is a run's.
        time.sleep(wait * random.SystemRandom().uniform(0.7, 1))
        wait = min(2 * wait, LONGEST_WAIT)


def _may_pass(error: Exception) -> bool:
    """Whether another try may go well."""
    if type(error).__name__ in _NO_CREDENTIALS:
        return False
    cause = error.__cause__
    if type(cause).__module__.startswith("aiohttp"):
        # fsspec says "not found" whatever fails at a web server, so the status decides.
        status = getattr(cause, "status", 0)
        if not 400 <= status < _FIRST_PASSING_STATUS:
            return True
    return not isinstance(error, _FINAL)


def _raise_final(url: str, error: Exception) -> NoReturn:
    if isinstance(error, FileNotFoundError):
        raise FileNotFoundError(f"{url}: no such file") from error
    raise OSError(f"{url}: {in_a_line(error)}") from error
