"""data.files."""

import contextlib
import glob
import io
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dist_lm.config import SourceConfig
from dist_lm.data import remote
from dist_lm.errors import DataError, nearest

CHUNK = 2**20  # bytes read at once


FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow")


_PACKINGS = (".gz", ".zst")


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


class TextFile(NamedTuple):
    """A file, or a hub dataset (no path); `size` in bytes as stored, `mark` changes when the content does."""

    name: str
    path: str
    size: int
    mark: str = ""


class Part(NamedTuple):
    """What a stream reads in one go: a file, row groups or bytes of it, or shards of a hub dataset, from `begin` on."""

    file: int
    begin: int = 0
    end: int = 0  # 0: the whole file


def find_files(spec: SourceConfig, label: str = "data.input") -> list[TextFile]:
    """The files of `spec.input` in a fixed order, named relative to where they were looked for."""
    path, said = Path(spec.input), f"{label}={spec.input!r}"
    if spec.input == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [
            file
            for file in root.rglob("*.py")
            if not _NOT_STDLIB.intersection(file.relative_to(root).parts)
        ]
    elif remote.is_remote(spec.input):
        endings = tuple(ending + packing for ending in FORMATS for packing in ("", *_PACKINGS))
        return [TextFile(*found) for found in remote.find(spec.input, endings, label)]
    elif path.is_file():
        root, files = path.parent, [path]
    elif path.is_dir():
        root = path
        files = [f for f in path.rglob("*") if _format(f.name) and f.is_file()]
        files = [
            f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)
        ]
        if not files:
            raise DataError(f"{said}: the folder has none of {' '.join(FORMATS)} (or .gz, .zst)")
    elif glob.has_magic(spec.input):
        root = Path(re.split(r"[^/]*[*?[]", spec.input)[0] or ".")
        files = [
            Path(name) for name in glob.glob(spec.input, recursive=True) if Path(name).is_file()
        ]
        if not files:
            raise DataError(f"{said}: no file matches")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", spec.input) and not (
        _format(spec.input) or path.parent.is_dir()
    ):
        return [TextFile(spec.input, "", 0, _hub_revision(spec))]
    else:
        near = _near(spec.input, map(str, path.parent.iterdir()) if path.parent.is_dir() else [])
        raise DataError(f"{said}: no such file{near} (a hub dataset is owner/name)")
    named = sorted((file.relative_to(root).as_posix(), file, file.stat()) for file in files)
    return [
        TextFile(name, str(file), stat.st_size, str(stat.st_mtime_ns)) for name, file, stat in named
    ]


def _hub_revision(spec: SourceConfig) -> str:
    """The commit that a revision stands for, so that a resumed run reads the same; "" where no hub is reached."""
    import huggingface_hub  # slow, and needed for hub names only

    try:
        return (
            huggingface_hub.HfApi().dataset_info(spec.input, revision=spec.revision, timeout=10).sha
            or ""
        )
    except (
        Exception
    ):  # offline, or another host's dataset: `datasets` says what is wrong, or has a copy
        return ""


@contextlib.contextmanager
def _open(source: TextFile) -> Iterator[BinaryIO]:
    """A file, unpacked."""
    with contextlib.ExitStack() as stack:
        file: BinaryIO
        if remote.is_remote(source.path):
            opened = remote.open_file(source.path, source.size, source.mark)
            file = stack.enter_context(opened)
        else:
            file = stack.enter_context(open(source.path, "rb"))
        if source.name.endswith(_PACKINGS):  # not the path: behind a URL's may stand a signature
            import pyarrow  # slow, and needed for packed files only

            packing = "gzip" if source.name.endswith(".gz") else "zstd"
            unpacked = pyarrow.input_stream(file, compression=packing)  # raises if cut short
            file = stack.enter_context(io.BufferedReader(unpacked))
            if _format(source.name) in (".parquet", ".arrow"):  # which are read from their end
                whole = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(file, whole)
                whole.seek(0)
                file = whole
        yield file


def _is_damage(error: BaseException) -> bool:
    """Whether the content of a file is at fault, not the disk or the network."""
    cause: BaseException | None = error
    while cause:
        if isinstance(
            cause, OSError
        ):  # it decides: behind a network's may be one that is none, like botocore's
            return "Truncated compressed stream" in str(cause)
        cause = cause.__cause__
    return True


def _format(name: str) -> str:
    for packing in _PACKINGS:
        name = name.removesuffix(packing)
    return next((ending for ending in FORMATS if name.endswith(ending)), "")


def _near(name: str, names: Iterable[str]) -> str:
    found = nearest(name, names)
    return f"; did you mean {found}?" if found else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
