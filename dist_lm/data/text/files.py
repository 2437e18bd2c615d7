"""Find the files of a raw text source, and open them.

A source is a file, glob, folder, URL, hub dataset or the Python standard library.
Invariant: the same input gives the same files in the same order, and each has a mark that changes
when its content does.
"""

import contextlib
import csv
import glob
import io
import json
import re
import sysconfig
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dist_lm.config import SourceConfig
from dist_lm.data import remote
from dist_lm.errors import DataError
from dist_lm.nearest import nearest

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

_CUT_SHORT = "Truncated compressed stream"  # what pyarrow says of a packed file without an end

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
    """A part of a file, which a stream reads in one go.

    A range of bytes (.jsonl), of row groups (.parquet) or of shards (hub dataset), or a whole file.
    """

    file: int  # number of the file in the source
    begin: int = 0
    end: int = 0  # 0: the whole file


def find_files(spec: SourceConfig, label: str = "data.input") -> list[TextFile]:
    """Find the files of a source: input after input, and of each in the order of their names."""
    files: list[TextFile] = []
    names: set[str] = set()
    places: set[str] = set()
    for number, one in enumerate(spec.inputs, 1):
        for file in _find_files_of(one, spec, label):
            place = file.path or file.name
            if place in places:
                raise DataError(f"{label}={spec.title}: {place} is given twice; rule: once")
            # Readers tell files apart by name.
            name = file.name if file.name not in names else f"input-{number}/{file.name}"
            names.add(name)
            places.add(place)
            files.append(file._replace(name=name))
    return files


def _find_files_of(one: str, spec: SourceConfig, label: str) -> list[TextFile]:
    """The files of one input of a source."""
    path = Path(one)
    setting = f"{label}={one!r}"
    if one == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _describe(root, _stdlib_files(root))
    if remote.is_remote(one):
        endings = [*FORMATS]
        for packing in _PACKINGS:
            endings += [ending + packing for ending in FORMATS]
        return [TextFile(*found) for found in remote.find(one, tuple(endings), label)]
    if path.is_file():
        return _describe(path.parent, [path])
    if path.is_dir():
        files = _files_of_saved_dataset(path, spec.split, setting) or _files_below(path)
        if not files:
            raise DataError(f"{setting}: the folder has none of {' '.join(FORMATS)} (or .gz, .zst)")
        return _describe(path, files)
    if glob.has_magic(one):
        root = Path(re.split(r"[^/]*[*?[]", one)[0] or ".")
        matches = map(Path, glob.glob(one, recursive=True))
        files = [file for file in matches if file.is_file()]
        if not files:
            raise DataError(f"{setting}: no file matches")
        return _describe(root, files)
    if _is_hub_name(one):
        return [TextFile(one, "", 0, _hub_revision(one, spec.revision))]
    neighbours: list[str] = []
    if path.parent.is_dir():
        neighbours = [str(neighbour) for neighbour in path.parent.iterdir()]
    hint = nearest_hint(one, neighbours)
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
            packing = "gzip" if text_file.name.endswith(".gz") else "zstd"
            file = stack.enter_context(io.BufferedReader(_Unpacked(file, packing)))
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


class _Unpacked(io.RawIOBase):
    """A packed file as it unpacks. If it is cut short, all that it holds comes before the error.

    pyarrow's stream loses what it unpacked in a read that fails. So that part is unpacked once
    more, byte by byte.
    """

    def __init__(self, packed: BinaryIO, packing: str):
        self._packed = packed
        self._packing = packing
        self._position = 0  # unpacked bytes that were given
        self._is_cut = False
        self._stream = self._open()
        self._spent: list[Any] = []  # kept, because pyarrow closes the file with its stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._read(len(buffer))
        except OSError as error:
            if self._is_cut or _CUT_SHORT not in str(error):
                raise
            self._go_on_byte_by_byte()
            data = self._read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _open(self) -> Any:
        import pyarrow  # slow, and needed for packed files only

        return pyarrow.input_stream(self._packed, compression=self._packing)

    def _go_on_byte_by_byte(self) -> None:
        self._is_cut = True
        self._packed.seek(0)
        self._spent.append(self._stream)
        self._stream = self._open()
        passed = 0
        while passed < self._position:
            passed += len(self._stream.read(min(self._position - passed, 2**20)))

    def _read(self, size: int) -> bytes:
        if not self._is_cut:
            return bytes(self._stream.read(size))
        data = bytearray()
        try:
            while len(data) < size:
                data += self._stream.read(1)
        except OSError:
            if not data:
                raise  # what came before it has been given
        return bytes(data)


def is_damage(error: BaseException) -> bool:
    """Whether the content of a file is at fault, and not the disk or the network."""
    cause: BaseException | None = error
    while cause:
        # The first OSError decides: the cause of a network's OSError may be of another kind
        # (botocore's are).
        if isinstance(cause, OSError):
            return _CUT_SHORT in str(cause)
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


def reason_of(error: Exception) -> str:
    """The reason that an error gives, as one line."""
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


def _files_of_saved_dataset(folder: Path, split: str, setting: str) -> list[Path]:
    """The Arrow files of a folder that `Dataset.save_to_disk` made; none if it is another folder.

    Of a `DatasetDict` those of a split. The JSON files beside them describe the data and are no
    text.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _read_saved(folder / "dataset_dict.json", "splits", setting)
        if split not in splits:
            hint = nearest_hint(split, splits)
            raise DataError(f"{setting}: no split {split!r} among {', '.join(splits)}{hint}")
        folder = folder / split
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return []
    entries = _read_saved(folder / "state.json", "_data_files", setting)
    files = []
    for entry in entries:
        name = str(entry.get("filename")) if isinstance(entry, dict) else ""
        if Path(name).name != name or not (folder / name).is_file():
            raise DataError(f"{setting}: {folder}/state.json names {name!r}, which is not there")
        files.append(folder / name)
    return files


def _read_saved(file: Path, key: str, setting: str) -> list[Any]:
    """A list in a JSON file of a saved dataset."""
    try:
        values = json.loads(file.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{setting}: {file} is not as Dataset.save_to_disk writes it ({type(error).__name__})"
        ) from error
    if not isinstance(values, list) or not values:
        raise DataError(f"{setting}: {file} has no list of {key}")
    return values


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


def _hub_revision(name: str, revision: str | None) -> str:
    """The commit that a revision stands for, so that a resumed run reads the same.

    It is "" if the hub cannot be reached, or the dataset is on another host. Then `datasets`
    reports what is wrong, or finds a copy in its cache.
    """
    import huggingface_hub  # slow, and needed for hub names only

    api = huggingface_hub.HfApi()
    try:
        info = api.dataset_info(name, revision=revision, timeout=10)
    except Exception:
        return ""
    return info.sha or ""
