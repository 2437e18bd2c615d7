"""Raw text: the documents of a source, in a fixed order.

A .txt file is one document, or several that `separator` ends. In the other formats a row is one.
Invariant: the same input gives the same documents in the same order, in bounded memory, and a
`Part` of it can be read from any of its documents on. What is not text is refused, or left out and
counted. The error names file and row (rows count from 1), or the file alone where its columns are
at fault.

`datasets` streams hub datasets. Files are read here, because the readers of `datasets` were seen to
drop newlines (.txt), to refuse rows whose keys differ and turn texts into dates (.json), to turn
texts into null or numbers (.csv), and to hold a whole row group (.parquet).
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, pairwise
from operator import itemgetter
from typing import Any, BinaryIO

from dist_lm.arithmetic import ceil_div
from dist_lm.config import SourceConfig
from dist_lm.data.text import lines
from dist_lm.data.text.columns import Columns, LeftOutError, Rows, ToText
from dist_lm.data.text.csv_rows import csv_rows
from dist_lm.data.text.files import (
    DAMAGE,
    LostRestError,
    Part,
    TextFile,
    format_of,
    is_damage,
    open_text_file,
    reason_of,
)
from dist_lm.data.text.json_rows import json_rows
from dist_lm.data.text.tables import (
    arrow_rows,
    count_row_groups,
    hub_rows,
    open_hub_dataset,
    parquet_rows,
)
from dist_lm.errors import DataError

SMALLEST_RANGE = 2**16  # bytes of a .jsonl file that are read apart from the rest
RANGES_PER_LANE = 4  # of .jsonl, so that the lanes end at about the same time

# Each takes an open file, the part to read, the row to begin with, and the columns.
_ROW_READERS = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}

# Number of a row and a stretch of its text; None stands for a null.
Stretches = Iterator[tuple[int, str | None]]


class Reader:
    """The documents of one source, whole or part by part.

    `files` are those of the source. `bad_rows` ("error" or "skip") decides about rows that are not
    text.
    """

    def __init__(
        self,
        spec: SourceConfig,
        files: list[TextFile],
        bad_rows: str = "error",
        label: str = "data.input",
    ):
        self.spec = spec
        self.files = files
        self.bad_rows = bad_rows
        self.columns = Columns(spec, label.removesuffix("input"))

    def documents(
        self, skipped: Counter[str], parts: Iterable[Part] | None = None, start: int = 0
    ) -> Iterator[tuple[int, int, Iterator[str]]]:
        """Each document as (number of its part, its row, the stretches of its text).

        The text of a document must be used up, or given up, before the next is asked for. The first
        part is read from the row `start` on. The row of a byte range is the byte where it begins.
        `skipped` counts, by reason, what has no text or was left out.
        """
        if parts is None:
            parts = map(Part, range(len(self.files)))
        for number, part in enumerate(parts):
            stretches = self._read_part(part, start, skipped)
            for row, of_row in groupby(stretches, key=itemgetter(0)):
                # Any, because only the first can be None.
                texts: Iterator[Any] = (text for _, text in of_row if text != "")
                first = next(texts, "")
                if first is None:
                    skipped["null rows"] += 1
                    continue
                head = _add_while_blank(first, texts)
                if not head or head.isspace():
                    skipped["empty documents"] += 1
                else:
                    yield number, row, chain([head], texts)
            start = 0

    def parts(self, lanes: int) -> list[Part]:
        """The source in parts: a property of the source and of `lanes`, not of the machine.

        These are row groups of Parquet, byte ranges of .jsonl, shards of a hub dataset, or else
        whole files.
        """
        jsonl_bytes = sum(file.size for file in self.files if file.name.endswith(".jsonl"))
        range_bytes = max(SMALLEST_RANGE, jsonl_bytes // (RANGES_PER_LANE * lanes))
        parts = []
        for number, file in enumerate(self.files):
            bounds = [0, 0]  # the whole file
            with self._naming(file, Counter()):
                bounds = self._bounds(file, range_bytes)
            for begin, end in pairwise(bounds):
                parts.append(Part(number, begin, end))
        return parts

    def refuse_missing_hub(self) -> None:
        """Raise if the name of a hub dataset leads to none, before anything is read."""
        for file in self.files:
            if not file.path:
                with self._naming(file, Counter()):
                    open_hub_dataset(file, self.spec)

    def where(self, file: int, row: int) -> str:
        """The place of a document, for messages."""
        return f"{self.files[file].path or self.files[file].name}: row {row}"

    def row_number(self, file: int, row: int) -> int:
        """The row as a reader of the file counts it.

        The row of a byte range is a byte; its number counts the lines that are not blank.
        """
        text_file = self.files[file]
        if not text_file.name.endswith(".jsonl"):
            return row
        number = 1
        with open_text_file(text_file) as opened:
            for position, line in lines.read_lines(opened):
                if position < row and line.strip():
                    number += 1
        return number

    def _bounds(self, file: TextFile, range_bytes: int) -> list[int]:
        """Bounds of the parts of a file, with the end of the last; [0, 0] for the whole file."""
        if not file.path:
            shards: int = open_hub_dataset(file, self.spec).num_shards
            return list(range(shards + 1))
        if file.name.endswith(".jsonl"):
            ranges = ceil_div(file.size, range_bytes) or 1
            return [file.size * n // ranges for n in range(ranges + 1)]
        if file.name.endswith(".parquet"):
            with open_text_file(file) as opened:
                return list(range(count_row_groups(opened) + 1))
        return [0, 0]

    def _read_part(self, part: Part, start: int, skipped: Counter[str]) -> Stretches:
        """The rows of one part as text, from the row `start` on."""
        file = self.files[part.file]
        with self._naming(file, skipped):
            if not file.path:
                # The stream has no name here, so that it dies with the rows that are read from it.
                rows, to_text = hub_rows(open_hub_dataset(file, self.spec), part, self.columns)
                yield from self._convert(rows, to_text, start, skipped)
                return
            with open_text_file(file) as opened:
                yield from self._read_open_file(opened, part, start, skipped)

    def _read_open_file(
        self, file: BinaryIO, part: Part, start: int, skipped: Counter[str]
    ) -> Stretches:
        kind = format_of(self.files[part.file].name)
        if kind not in _ROW_READERS:
            for row, text in lines.split_rows(lines.read_text(file), self.spec.separator):
                if row >= start:
                    yield row, text
            return
        rows, to_text = _ROW_READERS[kind](file, part, start, self.columns)
        is_byte_range = kind == ".jsonl" and part.end
        label = "at byte" if is_byte_range else "row"
        yield from self._convert(rows, to_text, start, skipped, label)

    def _convert(
        self, rows: Rows, to_text: ToText, start: int, skipped: Counter[str], label: str = "row"
    ) -> Stretches:
        """Rows as stretches of text; a bad one is refused, or left out and counted."""
        row = 0
        while True:
            row += 1  # the number of this row if it cannot be read
            try:
                row, content = next(rows)
                if row < start:
                    continue
                text = to_text(content)
            except StopIteration:
                return
            except LeftOutError as error:
                skipped[error.kind] += 1
                continue
            except DAMAGE as error:
                is_end = isinstance(error, (OSError, LostRestError))
                if is_end or self.bad_rows == "error":
                    raise DataError(f"{label} {row}: {reason_of(error)}") from error
                if row >= start:
                    skipped["bad rows"] += 1
                continue
            if not text:
                yield row, text
                continue
            for stretch in lines.stretches(text):
                yield row, stretch

    @contextlib.contextmanager
    def _naming(self, file: TextFile, skipped: Counter[str]) -> Iterator[None]:
        """Name the file in errors; or leave out the rest of a damaged file, and count that."""
        try:
            yield
        except DAMAGE as error:
            if self.bad_rows == "error" or not is_damage(error):
                raise DataError(f"{file.path or file.name}: {reason_of(error)}") from error
            skipped["rests of damaged files"] += 1


def _add_while_blank(head: str, more: Iterator[str]) -> str:
    """The beginning of a text with as many of its next stretches as it takes to hold a word."""
    while not head or head.isspace():
        text = next(more, "")
        if not text:
            break
        head += text
    return head
