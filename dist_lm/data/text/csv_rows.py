"""Rows of .csv: a header, then a row of cells each."""

import csv
from collections.abc import Iterator
from itertools import count
from typing import BinaryIO

from dist_lm.data.text import lines
from dist_lm.data.text.columns import Columns, Rows, ShortRowError, ToText
from dist_lm.data.text.files import Part


def csv_rows(file: BinaryIO, part: Part, start: int, columns: Columns) -> tuple[Rows, ToText]:
    """The rows below the header; a row without cells is left out."""

    def to_text(row: dict[str, str]) -> str | None:
        text = columns.text_of_cells(row)
        if text is None:
            raise ShortRowError
        return text

    return zip(count(1), CsvRows(file, columns)), to_text


class CsvRows:
    """The rows of a .csv file by column name. After an error over a row, the next call goes on.

    (A generator would end with its first error, and so does everything that is built on one.)
    """

    def __init__(self, file: BinaryIO, columns: Columns):
        csv.field_size_limit(lines.LONGEST_ROW)
        self.cells = csv.reader(_Lines(file), strict=True)
        self.header = _checked(next(self.cells, []))
        if self.header:
            columns.check(self.header)

    def __iter__(self) -> "CsvRows":
        return self

    def __next__(self) -> dict[str, str]:
        cells = next(self.cells)
        while not cells:
            cells = next(self.cells)
        if any(cells[len(self.header) :]):
            raise ValueError(
                f"{len(cells)} cells under {len(self.header)} columns; a text with a comma must be"
                " quoted"
            )
        return dict(zip(self.header, _checked(cells), strict=False))


class _Lines:
    """The lines of a file as text; a line that is too long raises, and the next call goes on.

    Bad bytes pass as surrogates: if they raised inside a quoted cell of several lines, csv.reader
    would take the cell's next line for a new row.
    """

    def __init__(self, file: BinaryIO):
        self.numbered = lines.read_lines(file)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        _, line = next(self.numbered)
        return lines.decode_line(line, errors="surrogateescape")


def _checked(cells: list[str]) -> list[str]:
    """Cells from `_Lines`; raises if one holds bytes that are not UTF-8."""
    for cell in cells:
        lines.check_escaped(cell)
    return cells
