"""Find the files of a raw text source, and open them.

A source is a file, glob, folder, URL, hub dataset or the Python standard library.
Invariant: the same input gives the same files in the same order, and each has a mark that changes
when its content does.
"""

import contextlib
import csv
import glob
import io
import re
import sysconfig
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dist_lm.config import SourceConfig
from dist_lm.data import remote
from dist_lm.errors import DataError, nearest

FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow")
_PACKINGS = (".gz", ".zst")
# Parquet and Arrow begin to read at the end of a file, so an unpacked copy must be seekable.
_READ_FROM_THE_END = (".parquet", ".arrow")
# A packed table is unpacked to a file that nobody sees. So that a small one does not fill the disk,
# there is a limit.
_UNPACKED_BASE = 2**26  # bytes
_MOST_EXPANSION = 200  # times
_COPY_CHUNK = 2**20
_NOT_STDLIB = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "ensurepip",
}

# Readers raise these when the content of a file is bad, but also when a disk or network fails.
DAMAGE = (ValueError, OSError, RecursionError, csv.Error)


class LostRestError(ValueError):
    """The rest of a file cannot be read."""


class TextFile(NamedTuple):
    """A file of text, or a hub dataset, which has no path."""

    name: str  # relative to the folder, glob or URL where it was found
    path: str
    size: int  # bytes as stored
    mark: str = ""  # changes when the content does


class Part(NamedTuple):
    """What a stream reads in one go.

    A range of bytes (.jsonl), of row groups (.parquet) or of shards (hub dataset), or a whole file.
    """

    file: int  # number of the file in the source
    begin: int = 0
    end: int = 0  # 0: the whole file


def find_files(spec: SourceConfig, label: str = "data.input") -> list[TextFile]:
    """Find the files of `spec.input`, in the order of their names."""
    path = Path(spec.input)
    setting = f"{label}={spec.input!r}"
    if spec.input == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _describe(root, _stdlib_files(root))
    if remote.is_remote(spec.input):
        endings = [*FORMATS]
        for packing in _PACKINGS:
            endings += [ending + packing for ending in FORMATS]
        return [TextFile(*found) for found in remote.find(spec.input, tuple(endings), label)]
    if path.is_file():
        return _describe(path.parent, [path])
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise DataError(f"{setting}: the folder has none of {' '.join(FORMATS)} (or .gz, .zst)")
        return _describe(path, files)
    if glob.has_magic(spec.input):
        root = Path(re.split(r"[^/]*[*?[]", spec.input)[0] or ".")
        matches = map(Path, glob.glob(spec.input, recursive=True))
        files = [file for file in matches if file.is_file()]
        if not files:
            raise DataError(f"{setting}: no file matches")
        return _describe(root, files)
    if _is_hub_name(spec.input):
        return [TextFile(spec.input, "", 0, _hub_revision(spec))]
    neighbours: list[str] = []
    if path.parent.is_dir():
        neighbours = [str(neighbour) for neighbour in path.parent.iterdir()]
    hint = nearest_hint(spec.input, neighbours)
    raise DataError(f"{setting}: no such file{hint} (a hub dataset is owner/name)")


@contextlib.contextmanager
def open_text_file(text_file: TextFile) -> Iterator[BinaryIO]:
    """Open a local or remote file, and unpack it."""
    with contextlib.ExitStack() as stack:
        file: BinaryIO
        if remote.is_remote(text_file.path):
            opened = remote.open_file(text_file.path, text_file.size, text_file.mark)
            file = stack.enter_context(opened)
        else:
            file = stack.enter_context(open(text_file.path, "rb"))
        # The name and not the path decides, because the path of a URL may end with a signature.
        if text_file.name.endswith(_PACKINGS):
            import pyarrow  # slow, and needed for packed files only

            packing = "gzip" if text_file.name.endswith(".gz") else "zstd"
            # pyarrow raises if the packed file is cut short.
            unpacked = pyarrow.input_stream(file, compression=packing)
            file = stack.enter_context(io.BufferedReader(unpacked))
            if format_of(text_file.name) in _READ_FROM_THE_END:
                copy = stack.enter_context(tempfile.TemporaryFile())
                _copy(file, copy, most=_UNPACKED_BASE + _MOST_EXPANSION * text_file.size)
                file = copy
        yield file


def _copy(file: BinaryIO, copy: BinaryIO, most: int) -> None:
    """Copy an unpacked file; refuses one that is larger than `most` bytes."""
    size = 0
    while chunk := file.read(_COPY_CHUNK):
        size += len(chunk)
        if size > most:
            raise ValueError(f"unpacks to more than {most:,} bytes; nearest: unpack it yourself")
        copy.write(chunk)
    copy.seek(0)


def is_damage(error: BaseException) -> bool:
    """Whether the content of a file is at fault, and not the disk or the network."""
    cause: BaseException | None = error
    while cause:
        # The first OSError decides: the cause of a network's OSError may be of another kind
        # (botocore's are).
        if isinstance(cause, OSError):
            return "Truncated compressed stream" in str(cause)
        cause = cause.__cause__
    return True


def format_of(name: str) -> str:
    """The ending that names the format of a file, packed or not; "" if we read no such format."""
    for packing in _PACKINGS:
        name = name.removesuffix(packing)
    return next((ending for ending in FORMATS if name.endswith(ending)), "")


def nearest_hint(name: str, names: Iterable[str]) -> str:
    """A question for the end of an error message, or "" if no name is near."""
    near = nearest(name, names)
    return f"; did you mean {near}?" if near else ""


def one_line(error: Exception) -> str:
    """The message of an error as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _stdlib_files(root: Path) -> list[Path]:
    """The standard library's own code, without its tests and without generated tables."""
    files = []
    for file in root.rglob("*.py"):
        folders = file.relative_to(root).parts
        if not _NOT_STDLIB.intersection(folders):
            files.append(file)
    return files


def _files_below(folder: Path) -> list[Path]:
    """The files below a folder that we can read, without hidden files and folders."""
    files = []
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in parts)
        if format_of(file.name) and file.is_file() and not is_hidden:
            files.append(file)
    return files


def _describe(root: Path, files: Collection[Path]) -> list[TextFile]:
    """The files as `TextFile`s with names relative to `root`, ordered by name."""
    described = []
    for file in files:
        stat = file.stat()
        name = file.relative_to(root).as_posix()
        described.append(TextFile(name, str(file), stat.st_size, str(stat.st_mtime_ns)))
    return sorted(described)


def _is_hub_name(name: str) -> bool:
    """Whether a name that is no file here looks like owner/name of a hub dataset."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return False
    return not format_of(name) and not Path(name).parent.is_dir()


def _hub_revision(spec: SourceConfig) -> str:
    """The commit that a revision stands for, so that a resumed run reads the same.

    It is "" if the hub cannot be reached, or the dataset is on another host. Then `datasets`
    reports what is wrong, or finds a copy in its cache.
    """
    import huggingface_hub  # slow, and needed for hub names only

    api = huggingface_hub.HfApi()
    try:
        info = api.dataset_info(spec.input, revision=spec.revision, timeout=10)
    except Exception:
        return ""
    return info.sha or ""
