"""Raw text: the documents of a file, glob, folder, hub dataset or the Python standard library, in a fixed order.

A .txt file is one document, or several that `data.separator` ends; a row of .jsonl, .json, .csv and .parquet is one.
Invariant: the same input gives the same documents in the same order, in bounded memory; text that is not Unicode is
refused by file and row (rows count from 1).

Hub datasets are streamed by `datasets`. Local files are read here, because its readers were seen to drop
newlines (.txt), refuse rows whose keys differ and turn texts into dates (.json), into null or numbers (.csv), and to
hold a whole row group (.parquet: 1.8 GB for 0.9 GB of text, against 0.1 GB here).
"""

import codecs
import contextlib
import csv
import gc
import glob
import io
import json
import re
import shutil
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, count, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from dist_lm.config import DataConfig, UserError, nearest

CHUNK = 2**20  # bytes read at once
LONGEST_ROW = 2**25  # bytes of a row, which is parsed whole; a document in a .txt file may be of any size
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
_PACKINGS = (".gz", ".zst")
_NOT_STDLIB = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip"}
_TOO_LONG = f"longer than {LONGEST_ROW // 2**20} MB; nearest: a .txt file, which is read piece by piece"
_BATCH = 64  # rows taken from Parquet or the hub at once

T = TypeVar("T")
Rows = Iterator[tuple[int, str | None]]  # (row, stretch of its text); None is a null


class Source(NamedTuple):
    """A file, or a hub dataset (no path); `size` in bytes as stored."""

    name: str
    path: str
    size: int


def find_sources(data: DataConfig) -> list[Source]:
    """The files of `data.input` in a fixed order, named relative to where they were looked for."""
    path = Path(data.input)
    if data.input == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in root.rglob("*.py") if not _NOT_STDLIB.intersection(file.relative_to(root).parts)]
    elif path.is_file():
        root, files = path.parent, [path]
    elif path.is_dir():
        root = path
        files = [f for f in path.rglob("[!.]*") if _format(f.name) and f.is_file()]
        files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not files:
            raise UserError(f"data.input={data.input!r}: the folder has none of {' '.join(FORMATS)} (or .gz, .zst)", 65)
    elif glob.has_magic(data.input):
        root = Path(re.split(r"[^/]*[*?[]", data.input)[0] or ".")
        files = [Path(name) for name in glob.glob(data.input, recursive=True) if Path(name).is_file()]
        if not files:
            raise UserError(f"data.input={data.input!r}: no file matches", 65)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", data.input) and not (_format(data.input) or path.parent.is_dir()):
        return [Source(data.input, "", 0)]
    else:
        near = _near(data.input, map(str, path.parent.iterdir()) if path.parent.is_dir() else [])
        raise UserError(f"data.input={data.input!r}: no such file{near} (a hub dataset is owner/name)", 65)
    named = sorted((file.relative_to(root).as_posix(), file) for file in files)
    return [Source(name, str(file), file.stat().st_size) for name, file in named]


def read_documents(
    sources: list[Source], data: DataConfig, skipped: Counter[str]
) -> Iterator[tuple[int, int, Iterator[str]]]:
    """(number of the source, row, stretches of its text) of each document, used up in turn; counts what has no text."""
    for number, source in enumerate(sources):
        for row, stretches in groupby(_read(source, data), key=itemgetter(0)):
            texts: Iterator[Any] = (text for _, text in stretches if text != "")
            head = next(texts, "")
            if head is None:
                skipped["null rows"] += 1
                continue
            while (not head or head.isspace()) and (more := next(texts, "")):
                head += more
            if head and not head.isspace():
                yield number, row, chain([head], texts)
            else:
                skipped["empty documents"] += 1


def _read(source: Source, data: DataConfig) -> Rows:
    """The rows of one source; what is wrong with it is said with its name."""
    try:
        if not source.path:
            yield from _read_hub(source.name, data.text_column)
            return
        with _open(source.path) as file:
            if _format(source.name) == ".parquet":
                yield from _read_parquet(file, data.text_column)
            elif _format(source.name) == ".csv":
                yield from _read_csv(file, data.text_column)
            elif _format(source.name) in (".json", ".jsonl"):
                is_array = file.peek().removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["  # type: ignore[attr-defined]
                chunks = _decode(iter(lambda: file.read(CHUNK), b""))
                values = (
                    _json_array(chunks) if is_array else (json.loads(line) for line in _lines(file) if line.strip())
                )
                yield from _read_rows(_field(value, data.text_column) for value in values)
            else:
                yield from _split(_decode(iter(lambda: file.read(CHUNK), b"")), data.separator)
    except UserError as error:
        raise UserError(f"{source.path or source.name}: {error}", 65) from error
    except OSError as error:
        raise UserError(f"{source.path or source.name}: {_one_line(error)}", 65) from error


def _split(chunks: Iterator[str], separator: str | None) -> Rows:
    """Text as one row, or as several that `separator` ends."""
    row = 1
    waiting, keep = "", len(separator or " ") - 1  # at the end of a chunk may stand the beginning of a separator
    while True:
        with _at(row):
            text = next(chunks, None)
        if text is None:
            break
        waiting += text
        if separator:
            *ended, waiting = waiting.split(separator)
            for part in ended:
                yield row, part
                row += 1
        cut = max(len(waiting) - keep, 0)
        yield row, waiting[:cut]
        waiting = waiting[cut:]
    if waiting or row == 1:
        yield row, waiting


def _decode(chunks: Iterable[bytes]) -> Iterator[str]:
    decoder, end = codecs.getincrementaldecoder("utf-8")(), 0
    for chunk in chain(chunks, [b""]):
        end += len(chunk)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            yield error.object[: error.start].decode()
            place = end - len(error.object) + error.start
            raise ValueError(f"byte {place:,} of the text, {error.object[error.start]:#04x}, is not UTF-8") from error
        if text:
            yield text


def _lines(file: BinaryIO) -> Iterator[str]:
    for n in count():
        line = file.readline(LONGEST_ROW)
        if len(line) == LONGEST_ROW:
            raise ValueError(_TOO_LONG)
        if not line:
            return
        yield line.decode("utf-8" if n else "utf-8-sig")


def _json_array(chunks: Iterator[str]) -> Iterator[Any]:
    """The values of one JSON array, parsed one after another from a window that is refilled where one is cut off."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    window = next(chunks)
    at = window.index("[") + 1
    while True:
        at = gap.match(window, at).end()  # type: ignore[union-attr]
        if window.startswith("]", at):
            return
        try:
            value, at = decoder.raw_decode(window, at)
        except json.JSONDecodeError:
            if len(window) - at > LONGEST_ROW:
                raise ValueError(_TOO_LONG) from None
            more = "".join(islice(chunks, 1 + (len(window) - at) // CHUNK))  # twice as much: so that tries are few
            if not more:
                raise
            window, at = window[at:] + more, 0
        else:
            yield value


def _read_rows(texts: Iterator[str | None]) -> Rows:
    for row, text in _numbered(texts):
        if not text:
            yield row, text
        else:
            yield from ((row, text[at : at + CHUNK]) for at in range(0, len(text), CHUNK))


def _read_csv(file: BinaryIO, column: str) -> Rows:
    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader(_lines(file), strict=True)
    with _at(0):
        header = next(reader, [])
        place = _find_column(column, header) if header else 0
    return _read_rows(row[place] if place < len(row) else None for row in reader if row)


def _read_parquet(file: BinaryIO, column: str) -> Rows:
    import pyarrow.parquet  # slow, and needed for these files only

    with contextlib.ExitStack() as stack:
        if not file.seekable():  # packed once more around its own packing
            packed, file = file, stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(packed, file)
        with _at(0):
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK)  # pages as they are needed
            _find_column(column, table.schema_arrow.names)
            average = _average_row(table, column)
        batches = table.iter_batches(max(1, min(_BATCH, 2**24 // average)), columns=[column], use_threads=False)
        yield from _read_rows(_arrow_texts((batch.column(0) for batch in batches), column))


def _average_row(table: Any, column: str) -> int:
    """Bytes of text in a row on average, in the row group where that is most; what is far too long is not even read."""
    paths = [table.schema.column(n).path for n in range(len(table.schema.names))]
    groups = [table.metadata.row_group(n) for n in range(table.num_row_groups if column in paths else 0)]
    sizes = [g.column(paths.index(column)).total_uncompressed_size // max(g.num_rows, 1) for g in groups]
    if max(sizes, default=0) > LONGEST_ROW:
        raise ValueError(f"row group {sizes.index(max(sizes)) + 1}: its rows are {_TOO_LONG}")
    return max(sizes, default=0) + 1


def _read_hub(name: str, column: str) -> Rows:
    import datasets  # slow, and needed for hub names only

    try:
        stream = datasets.load_dataset(name, split="train", streaming=True).with_format("arrow")
    except (ValueError, OSError) as error:
        raise UserError(f"no such file here, and no hub dataset to be had: {_one_line(error)}", 65) from error
    batches = stream.iter(_BATCH)
    try:
        tables = (table for table in batches if _find_column(column, table.column_names) >= 0)
        yield from _read_rows(_arrow_texts((table[column].combine_chunks() for table in tables), column))
    finally:
        del stream, batches, tables  # an abandoned streamed iterator can abort the process at its exit
        gc.collect()


def _arrow_texts(arrays: Iterator[Any], column: str) -> Iterator[str | None]:
    import pyarrow as pa  # loaded by the callers

    for array in arrays:
        array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
        if array.type not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
            raise ValueError(f"data.text_column={column!r} holds {array.type}, not text")
        for value in array:
            raw = value.as_buffer() if value.is_valid else b""
            if len(raw) > LONGEST_ROW:
                raise ValueError(_TOO_LONG)
            yield str(raw, "utf-8") if value.is_valid else None  # decoded here: Parquet's text is not checked


def _field(value: Any, column: str) -> str | None:
    """The text of a JSON row."""
    if not isinstance(value, dict):
        raise ValueError(f"must be an object with data.text_column={column!r}, not {type(value).__name__}")
    _find_column(column, value)
    text = value[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"data.text_column={column!r} holds {type(text).__name__}, not text")
    (text or "").encode()  # refuses lone surrogates
    return text


def _find_column(column: str, columns: Iterable[str]) -> int:
    columns = list(columns)
    if column not in columns:
        raise ValueError(f"no data.text_column={column!r} among {', '.join(columns)}{_near(column, columns)}")
    return columns.index(column)


def _numbered(items: Iterator[T]) -> Iterator[tuple[int, T]]:
    for row in count(1):
        with _at(row):
            try:
                item = next(items)
            except StopIteration:
                return
        yield row, item


@contextlib.contextmanager
def _at(row: int) -> Iterator[None]:
    """Whatever fails inside is said with its row."""
    try:
        yield
    except (ValueError, OSError, RecursionError, csv.Error) as error:
        raise UserError(f"row {row}: {_one_line(error)}" if row else _one_line(error), 65) from error


def _open(path: str) -> BinaryIO:
    if not path.endswith(_PACKINGS):
        return open(path, "rb")
    import pyarrow  # slow, and needed for packed files only

    return io.BufferedReader(pyarrow.input_stream(path, compression="detect"))  # raises if cut short


def _format(name: str) -> str:
    for packing in _PACKINGS:
        name = name.removesuffix(packing)
    return next((ending for ending in FORMATS if name.endswith(ending)), "")


def _near(name: str, names: Iterable[str]) -> str:
    found = nearest(name, names)
    return f"; did you mean {found}?" if found else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
