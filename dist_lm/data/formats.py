"""Raw text: the documents of a file, glob, folder, URL, hub dataset or the Python standard library, in a fixed order.

A .txt file is one document, or several that `separator` ends; a row of .jsonl, .json, .csv, .parquet and .arrow is one.
Invariant: the same input gives the same documents in the same order, in bounded memory, and a `Part` of it can be read
from any of its documents on. What is not text is refused by file and row (rows count from 1; by file alone, where its
columns are at fault), or left out and counted.

Hub datasets are streamed by `datasets`. Files are read here, because its readers were seen to drop newlines (.txt),
refuse rows whose keys differ and turn texts into dates (.json), into null or numbers (.csv), and to hold a whole row
group (.parquet: 1.8 GB for 0.9 GB of text, against 0.1 GB here).
"""

import codecs
import contextlib
import csv
import gc
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, count, groupby, pairwise
from operator import itemgetter
from typing import Any, BinaryIO

from dist_lm.config import SourceConfig
from dist_lm.data.files import CHUNK, Part, TextFile, _format, _is_damage, _near, _one_line, _open
from dist_lm.errors import DataError

LONGEST_ROW = (
    2**25
)  # bytes of a row, which is parsed whole; a document in a .txt file may be of any size
SMALLEST_RANGE = 2**16  # bytes of a .jsonl file that are read apart from the rest
_TOO_LONG = (
    f"longer than {LONGEST_ROW // 2**20} MB; nearest: a .txt file, which is read piece by piece"
)
_BATCH = 64  # rows taken from Parquet or the hub at once

Texts = Iterator[tuple[int, str | None]]  # (row, stretch of its text); None is a null
Rows = Iterator[tuple[int, Any]]  # (row, its content as the format has it)
Convert = Callable[[Any], str | None]  # that content as text


class FilteredError(Exception):
    """A row that the source's filter leaves out."""


class LostRestError(ValueError):
    """What follows in a file cannot be read."""


_DAMAGE = (
    ValueError,
    OSError,
    RecursionError,
    csv.Error,
)  # what readers raise over a file's content


class Reader:
    """The documents of one source, whole or part by part; `skipped` counts what has no text or was left out."""

    def __init__(
        self,
        spec: SourceConfig,
        sources: list[TextFile],
        bad_rows: str = "error",
        label: str = "data.input",
    ):
        self.spec, self.sources, self.bad_rows = spec, sources, bad_rows
        self.fields = _Fields(spec, label.removesuffix("input"))

    def documents(
        self, skipped: Counter[str], parts: Iterable[Part] | None = None, start: int = 0
    ) -> Iterator[tuple[int, int, Iterator[str]]]:
        """(number of the part, row, stretches of its text) of each document, used up in turn.

        The first part is read from the row `start` on. The row of a byte range is the byte where it begins.
        """
        for number, part in enumerate(
            parts if parts is not None else map(Part, range(len(self.sources)))
        ):
            for row, stretches in groupby(self._read(part, start, skipped), key=itemgetter(0)):
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
            start = 0

    def parts(self, lanes: int) -> list[Part]:
        """Row groups of Parquet, byte ranges of plain .jsonl (four a lane, if it is large), shards of a hub dataset,
        or else files: a property of the source and of `lanes`, not of the machine."""
        found = []
        plain = sum(source.size for source in self.sources if source.name.endswith(".jsonl"))
        step = max(
            SMALLEST_RANGE, plain // (4 * lanes)
        )  # several a lane, so that lanes end about together
        for number, source in enumerate(self.sources):
            ends: Sequence[int] = (0, 0)  # the whole file
            with self._guarded(source, Counter()):
                if not source.path:
                    ends = range(_hub_stream(source, self.spec).num_shards + 1)
                elif source.name.endswith(".jsonl"):
                    cuts = -(-source.size // step) or 1
                    ends = [source.size * n // cuts for n in range(cuts + 1)]
                elif source.name.endswith(".parquet"):
                    import pyarrow.parquet  # slow, and needed for these files only

                    with _open(source) as file:
                        ends = range(pyarrow.parquet.ParquetFile(file).num_row_groups + 1)
            found += [Part(number, begin, end) for begin, end in pairwise(ends)]
        return found

    def where(self, file: int, row: int) -> str:
        return f"{self.sources[file].path or self.sources[file].name}: row {row}"

    def row_number(self, file: int, row: int) -> int:
        """The row as a reader of the file counts: of a byte range, its lines with something in them."""
        source = self.sources[file]
        if not source.name.endswith(".jsonl"):
            return row
        with _open(source) as lines:
            return 1 + sum(bool(line.strip()) for at, line in _lines(lines) if at < row)

    def _read(self, part: Part, start: int, skipped: Counter[str]) -> Texts:
        """The rows of one part, from the row `start` on, as text."""
        source = self.sources[part.file]
        with self._guarded(source, skipped):
            if not source.path:
                tables = _hub_tables(_hub_stream(source, self.spec), part, self.fields)
                numbered = zip(count(1), self.fields.scalars(tables))
                yield from self._texts(numbered, self.fields.of_scalars, start, skipped)
                return
            kind = _format(source.name)
            with _open(source) as file:
                if kind in _ROWS:
                    rows, convert = _ROWS[kind](file, part, start, self.fields)
                    label = "at byte" if kind == ".jsonl" and part.end else "row"
                    yield from self._texts(rows, convert, start, skipped, label)
                else:
                    yield from (
                        text
                        for text in _split(_decode(file), self.spec.separator)
                        if text[0] >= start
                    )

    @contextlib.contextmanager
    def _guarded(self, source: TextFile, skipped: Counter[str]) -> Iterator[None]:
        """What is wrong with a file is said with its name, or the rest of it left out and counted."""
        try:
            yield
        except _DAMAGE as error:
            if self.bad_rows == "error" or not _is_damage(error):
                raise DataError(f"{source.path or source.name}: {_one_line(error)}") from error
            skipped["rests of damaged files"] += 1

    def _texts(
        self, rows: Rows, convert: Convert, start: int, skipped: Counter[str], label: str = "row"
    ) -> Texts:
        """Rows as text in stretches; an unreadable one is refused, or left out and counted."""
        row = 0
        while True:
            row += 1  # should reading it fail
            try:
                row, raw = next(rows)
                if row < start:
                    continue
                text = convert(raw)
            except StopIteration:
                return
            except FilteredError:
                skipped["filtered rows"] += 1
                continue
            except _DAMAGE as error:
                if self.bad_rows == "error" or isinstance(error, (OSError, LostRestError)):
                    raise DataError(f"{label} {row}: {_one_line(error)}") from error
                if row >= start:
                    skipped["bad rows"] += 1
                continue
            if not text:
                yield row, text
            else:
                yield from ((row, text[at : at + CHUNK]) for at in range(0, len(text), CHUNK))


class _Fields:
    """What of a row becomes text: one column, or a template of several, where the filter lets the row through."""

    def __init__(self, spec: SourceConfig, section: str):
        self.spec, self.section = spec, section
        shown = spec.template_columns() if spec.template else [spec.text_column]
        self.names = list(dict.fromkeys([*shown, *spec.filter]))
        self.is_composed = bool(spec.template or spec.filter)

    def said(self, name: str) -> str:
        """A column with the setting that asks for it."""
        if name == self.spec.text_column and not self.spec.template:
            return f"{self.section}text_column={name!r}"
        field = "template" if name in self.spec.template_columns() else "filter"
        return f"column {name!r} of {self.section}{field}"

    def check(self, columns: Collection[str]) -> None:
        for name in self.names:
            if name not in columns:
                raise ValueError(
                    f"no {self.said(name)} among {', '.join(columns)}{_near(name, columns)}"
                )

    def check_schema(self, schema: Any) -> None:
        """The columns of an Arrow table, and that what shall be text is."""
        import pyarrow as pa  # loaded by the callers

        self.check(schema.names)
        kind = schema.field(self.names[0]).type
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not self.is_composed and text not in (
            pa.string(),
            pa.large_string(),
            pa.string_view(),
            pa.null(),
        ):
            raise ValueError(f"{self.said(self.names[0])} holds {kind}, not text")

    def of_line(self, line: bytes) -> str | None:
        """The text of a line of JSON."""
        return self.of_row(json.loads(_line_text(line)))

    def of_row(self, row: Any) -> str | None:
        """The text of a JSON row."""
        if not isinstance(row, Mapping):
            raise ValueError(
                f"must be an object with {self.said(self.names[0])}, not {type(row).__name__}"
            )
        self.check(row)
        return self.of_cells(row)

    def of_cells(self, row: Mapping[str, Any]) -> str | None:
        for name, wanted in self.spec.filter.items():
            if row.get(name) != wanted:
                raise FilteredError(f"{name}={row.get(name)!r} is not {wanted!r}")
        text = row.get(self.spec.text_column)
        if self.spec.template:
            for name in self.names:
                if name not in row:  # a row of .csv with too few cells
                    raise ValueError(f"no {self.said(name)} in it")
            text = self.spec.template.format_map(
                {name: "" if row[name] is None else row[name] for name in self.names}
            )
        elif text is not None and not isinstance(text, str):
            raise ValueError(
                f"{self.said(self.spec.text_column)} holds {type(text).__name__}, not text"
            )
        (text or "").encode()  # refuses lone surrogates
        return text

    def scalars(self, tables: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
        """Rows of Arrow tables, as scalars in the order of `names`."""
        import pyarrow as pa  # loaded by the callers

        for table in tables:
            columns = [table.column(name) for name in self.names]
            # not decoded as a whole: neither cast() nor dictionary_decode() knows every kind of value
            plain = [
                (cell.value for cell in c) if pa.types.is_dictionary(c.type) else c for c in columns
            ]
            yield from zip(*plain, strict=True)

    def of_scalars(self, scalars: tuple[Any, ...]) -> str | None:
        if self.is_composed:
            return self.of_cells(
                {n: scalar.as_py() for n, scalar in zip(self.names, scalars, strict=True)}
            )
        (scalar,) = scalars
        if not scalar.is_valid:
            return None
        raw = scalar.as_buffer()
        if len(raw) > LONGEST_ROW:
            raise ValueError(_TOO_LONG)
        return str(raw, "utf-8")  # decoded here: Parquet's text is not checked


# --- formats: the rows of an open file, and how they become text


def _json_rows(file: BinaryIO, part: Part, start: int, fields: _Fields) -> tuple[Rows, Convert]:
    """Lines, those of a range of bytes by where they begin; or the values of an array."""
    if part.end:
        return _range(file, max(part.begin, start), part.end), fields.of_line
    if file.peek().removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":  # type: ignore[attr-defined]
        # bad bytes pass the decoder: raised there, they would end the array and not only the value that they are in
        return zip(count(1), _JsonArray(_decode(file, "surrogateescape"))), fields.of_row
    return zip(count(1), (line for _, line in _lines(file) if line.strip())), fields.of_line


def _csv_rows(file: BinaryIO, part: Part, start: int, fields: _Fields) -> tuple[Rows, Convert]:
    # map() and filter() go on behind a line that cannot be read; a generator would end there
    csv.field_size_limit(LONGEST_ROW)
    # bad bytes pass csv.reader: raised inside a quoted cell of several lines, it would take the next line for a new row
    lines = map(partial(_line_text, errors="surrogateescape"), map(itemgetter(1), _lines(file)))
    cells = csv.reader(lines, strict=True)
    header = _strict(next(cells, []))
    if header:
        fields.check(header)
    rows = map(lambda row: dict(zip(header, _strict(row), strict=False)), filter(None, cells))
    return zip(count(1), rows), fields.of_cells


def _parquet_rows(file: BinaryIO, part: Part, start: int, fields: _Fields) -> tuple[Rows, Convert]:
    import pyarrow.parquet  # slow, and needed for these files only

    table = pyarrow.parquet.ParquetFile(
        file, pre_buffer=False, buffer_size=CHUNK
    )  # pages as needed
    fields.check_schema(table.schema_arrow)
    average = sum(_average_row(table, name) for name in fields.names)
    groups = list(range(part.begin, part.end or table.num_row_groups))
    before = sum(table.metadata.row_group(n).num_rows for n in range(part.begin))
    first = max(start, before + 1)
    size = max(1, min(_BATCH, 2**24 // average))
    batches = table.iter_batches(size, groups, columns=fields.names, use_threads=False)
    return zip(
        count(first), fields.scalars(_behind(first - before - 1, batches))
    ), fields.of_scalars


def _arrow_rows(file: BinaryIO, part: Part, start: int, fields: _Fields) -> tuple[Rows, Convert]:
    import pyarrow as pa  # slow, and needed for these files only

    if file.peek()[:6] == b"ARROW1":  # type: ignore[attr-defined]
        table = pa.ipc.open_file(file)
        batches = map(table.get_batch, range(table.num_record_batches))
    else:
        table = batches = pa.ipc.open_stream(file)
    fields.check_schema(table.schema)
    return zip(count(1), fields.scalars(batches)), fields.of_scalars


_ROWS = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


def _hub_stream(source: TextFile, spec: SourceConfig) -> Any:
    """A hub dataset as `datasets` streams it, in as many shards as it can be cut into."""
    import datasets  # slow, and needed for hub names only

    try:
        stream = datasets.load_dataset(
            source.name,
            name=spec.subset,
            split=spec.split,
            revision=source.mark or spec.revision,
            streaming=True,
        )
    except (ValueError, OSError) as error:
        raise DataError(
            f"no such file here, and no hub dataset to be had: {_one_line(error)}"
        ) from error
    with contextlib.suppress(NotImplementedError):  # only Parquet can be cut finer than files
        stream = stream.reshard()
    return stream.with_format("arrow")


def _hub_tables(stream: Any, part: Part, fields: _Fields) -> Iterator[Any]:
    if part.end:
        stream = stream.shard(stream.num_shards, part.begin)
    tables = stream.iter(_BATCH)
    try:
        for table in tables:
            fields.check_schema(table.schema)
            yield table
    finally:
        del stream, tables  # an abandoned streamed iterator can abort the process at its exit
        gc.collect()


def _behind(rows: int, batches: Iterable[Any]) -> Iterator[Any]:
    """Record batches without so many rows at their beginning."""
    for batch in batches:
        passed = min(rows, len(batch))
        rows -= passed
        yield batch.slice(passed)


def _average_row(table: Any, column: str) -> int:
    """Bytes of text in a row on average, in the row group where that is most; what is far too long is not even read."""
    paths = [table.schema.column(n).path for n in range(len(table.schema.names))]
    groups = [
        table.metadata.row_group(n) for n in range(table.num_row_groups if column in paths else 0)
    ]
    sizes = [
        g.column(paths.index(column)).total_uncompressed_size // max(g.num_rows, 1) for g in groups
    ]
    if max(sizes, default=0) > LONGEST_ROW:
        raise ValueError(f"row group {sizes.index(max(sizes)) + 1}: its rows are {_TOO_LONG}")
    return max(sizes, default=0) + 1


def _split(chunks: Iterator[str], separator: str | None) -> Texts:
    """Text as one row, or as several that `separator` ends."""
    row, waiting = 1, ""
    keep = len(separator or " ") - 1  # at the end of a chunk may stand the beginning of a separator
    try:
        for text in chunks:
            waiting += text
            if separator:
                *ended, waiting = waiting.split(separator)
                for part in ended:
                    yield row, part
                    row += 1
            cut = max(len(waiting) - keep, 0)
            yield row, waiting[:cut]
            waiting = waiting[cut:]
    except _DAMAGE as error:
        raise DataError(f"row {row}: {_one_line(error)}") from error
    if waiting or row == 1:
        yield row, waiting


def _decode(file: BinaryIO, errors: str = "strict") -> Iterator[str]:
    decoder, end = codecs.getincrementaldecoder("utf-8")(errors), 0
    for chunk in chain(iter(lambda: file.read(CHUNK), b""), [b""]):
        end += len(chunk)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            yield error.object[: error.start].decode()
            place = end - len(error.object) + error.start
            raise ValueError(
                f"byte {place:,} of the text, {error.object[error.start]:#04x}, is not UTF-8"
            ) from error
        if text:
            yield text


def _lines(file: BinaryIO, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Lines with the byte where each begins; one longer than LONGEST_ROW is cut short there, so as to be refused."""
    while line := file.readline(LONGEST_ROW + 1):
        begin, at = at, at + len(line)
        while (
            len(line) > LONGEST_ROW
            and not line.endswith(b"\n")
            and (more := file.readline(LONGEST_ROW))
        ):
            at += len(more)
            if more.endswith(b"\n"):
                break
        yield begin, line.removeprefix(codecs.BOM_UTF8) if begin == 0 else line


def _line_text(line: bytes, errors: str = "strict") -> str:
    if len(line) > LONGEST_ROW:
        raise ValueError(_TOO_LONG)
    return line.decode(errors=errors)


def _strict(cells: list[str]) -> list[str]:
    """Cells that were decoded with surrogateescape; raises where that hid bytes that are not UTF-8."""
    return [
        cell if cell.isascii() else cell.encode(errors="surrogateescape").decode() for cell in cells
    ]


def _range(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin at the bytes begin..end-1, and where each does."""
    if begin:
        file.seek(begin - 1)
        begin += len(file.readline()) - 1
    for at, line in _lines(file, begin):
        if at >= end:
            return
        if line.strip():
            yield at, line


class _JsonArray:
    """The values of one JSON array, one after another. After an error over a value, the next call goes on behind it.

    A string, list or object ends with its own quote or bracket; any other value before the next comma or bracket. If
    the file ends first, the rest of it is lost. Of a value at most LONGEST_ROW characters and a chunk are held.
    """

    _GAP = re.compile(r"[\s,]*")
    _OPENING = ("{", "[", '"')
    _MARK = re.compile(r'["{}\[\],]')
    _REST_OF_STRING = re.compile(r'(?:[^"\\]++|\\.)*+"', re.DOTALL)

    def __init__(self, chunks: Iterator[str]):
        self.chunks = chunks
        self.window = ""  # the newest chunk
        self.at = 0  # where in it reading goes on
        self.pieces: Iterator[str] = iter(
            ()
        )  # of the value being read; some are left after one that is too long
        self.decoder = json.JSONDecoder()
        while "[" not in self.window:
            self._take_chunk()
        self.at = self.window.index("[") + 1

    def __iter__(self) -> "_JsonArray":
        return self

    def __next__(self) -> Any:
        deque(self.pieces, maxlen=0)
        self._pass_gap()
        if self.window[self.at] == "]":
            raise StopIteration
        begin = self.at
        if self.window.startswith(self._OPENING, begin):
            try:
                value, self.at = self.decoder.raw_decode(self.window, begin)
            except (ValueError, RecursionError):
                pass  # it is bad, or goes on in the next chunk
            else:
                self._check(self.window[begin : self.at])
                return value
        text = self._read_text()
        self._check(text)
        return json.loads(text)

    @staticmethod
    def _check(text: str) -> None:
        """Refuse a value that is too long, or has bytes that are not UTF-8."""
        if len(text) > LONGEST_ROW:
            raise ValueError(_TOO_LONG)
        if not text.isascii():
            text.encode(errors="surrogateescape").decode()

    def _pass_gap(self) -> None:
        """Go to where the next value begins, or the array ends."""
        while True:
            gap = self._GAP.match(self.window, self.at)
            assert gap, "an empty gap is one too"
            self.at = gap.end()
            if self.at < len(self.window):
                return
            self._take_chunk()

    def _read_text(self) -> str:
        """The text of a value, wherever it ends; cut short, so as to be refused, if it is too long."""
        parts, size = list[str](), 0
        self.pieces = self._find_pieces()
        for piece in self.pieces:
            parts.append(piece)
            size += len(piece)
            if size > LONGEST_ROW:
                break
        return "".join(parts).rstrip()

    def _find_pieces(self) -> Iterator[str]:
        """The text of a value chunk by chunk; the window is left where the value ends."""
        closes_itself = self.window.startswith(self._OPENING, self.at)
        depth, is_quoted, looked = 0, False, self.at
        while True:
            if is_quoted:
                found = self._REST_OF_STRING.match(self.window, looked)
            else:
                found = self._MARK.search(self.window, looked)
            if found is None:
                unread = self.window[looked:]
                backslashes = len(unread) - len(unread.rstrip("\\"))
                yield self.window[self.at :]
                self._take_chunk()
                looked = (
                    backslashes % 2 if is_quoted else 0
                )  # the last one goes with this chunk's first character
                continue
            looked = found.end()
            mark = self.window[looked - 1]
            if mark == '"':
                is_quoted = not is_quoted
            elif mark in "{[":
                depth += 1
            elif mark in "}]" and depth:
                depth -= 1
            elif mark in ",]" and not depth:
                looked -= 1
                break
            if closes_itself and not depth and not is_quoted:
                break
        begin, self.at = self.at, looked
        yield self.window[begin:looked]

    def _take_chunk(self) -> None:
        self.window = next(self.chunks, "")
        self.at = 0
        if not self.window:
            raise LostRestError("the file ends inside the array")
