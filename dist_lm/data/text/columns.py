"""Choose the columns of a row that become its text, and the rows that the filter lets through."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from dist_lm.config import SourceConfig
from dist_lm.data.text import lines
from dist_lm.data.text.files import nearest_hint, reason_of

Rows = Iterator[tuple[int, Any]]  # number of a row, and its content as its format gives it
ToText = Callable[[Any], str | None]  # turns that content into text; None is a null


class LeftOutError(Exception):
    """This row has no text for us; `kind` is what it is counted as."""

    kind = "rows"


class FilteredError(LeftOutError):
    """The source's filter leaves this row out."""

    kind = "filtered rows"


class ShortRowError(LeftOutError):
    """This row of .csv ends before its text."""

    kind = "short rows"


class Columns:
    """The columns of one source: the text column or those of the template, and the filter's.

    `names` holds each of them once, those that become text first. If `is_composed`, a template or a
    filter needs the whole row; else the text is read straight from one column.
    """

    def __init__(self, spec: SourceConfig, section: str):
        self.spec = spec
        self.section = section  # of the settings, like "data.": for messages
        of_text = spec.template_columns() if spec.template else [spec.text_column]
        self.names = list(dict.fromkeys([*of_text, *spec.filter]))
        self.is_composed = bool(spec.template or spec.filter)

    def setting(self, name: str) -> str:
        """A column as messages call it: with the setting that asks for it."""
        if name == self.spec.text_column and not self.spec.template:
            return f"{self.section}text_column={name!r}"
        field = "template" if name in self.spec.template_columns() else "filter"
        return f"column {name!r} of {self.section}{field}"

    def check(self, present: Collection[str]) -> None:
        """Refuse a row or table without one of the columns."""
        for name in self.names:
            if name not in present:
                hint = nearest_hint(name, present)
                columns = ", ".join(present)
                raise ValueError(f"no {self.setting(name)} among its columns {columns}{hint}")

    def check_schema(self, schema: Any) -> None:
        """Refuse an Arrow table without one of the columns, or whose text column holds no text."""
        import pyarrow as pa  # loaded by the callers

        self.check(schema.names)
        if self.is_composed:
            return
        (name,) = self.names
        kind = schema.field(name).type
        value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if value_kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
            raise ValueError(f"{self.setting(name)} holds {kind}, not text")

    def text_of_line(self, line: bytes) -> str | None:
        """The text of a line of JSON."""
        return self.text_of_value(json.loads(lines.decode_line(line)))

    def text_of_value(self, value: Any) -> str | None:
        """The text of a JSON value, which must be an object."""
        if not isinstance(value, Mapping):
            raise ValueError(
                f"must be an object with {self.setting(self.names[0])}, not {type(value).__name__}"
            )
        self.check(value)
        return self.text_of_cells(value)

    def text_of_cells(self, row: Mapping[str, Any]) -> str | None:
        """The text of a row whose columns have been checked."""
        for name, wanted in self.spec.filter.items():
            if row.get(name) != wanted:
                raise FilteredError(f"{name}={row.get(name)!r} is not {wanted!r}")
        text: str | None
        if self.spec.template:
            text = self._fill_template(row)
        else:
            text = self._text_cell(row)
        if text:
            text.encode()  # raises over a lone surrogate
        return text

    def read_tables(self, tables: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
        """The rows of Arrow tables, each as its scalars in the order of `names`."""
        for table in tables:
            cells = [_cells(table.column(name)) for name in self.names]
            yield from zip(*cells, strict=True)

    def text_of_scalars(self, scalars: tuple[Any, ...]) -> str | None:
        """The text of a row of `read_tables`."""
        if self.is_composed:
            row = {}
            for name, scalar in zip(self.names, scalars, strict=True):
                row[name] = scalar.as_py()
            return self.text_of_cells(row)
        (scalar,) = scalars
        if not scalar.is_valid:
            return None
        raw = scalar.as_buffer()
        lines.check_length(len(raw))
        return str(raw, "utf-8")  # decoded here, because no one has checked the text of Parquet

    def _text_cell(self, row: Mapping[str, Any]) -> str | None:
        text = row.get(self.spec.text_column)
        if text is not None and not isinstance(text, str):
            setting = self.setting(self.spec.text_column)
            raise ValueError(f"{setting} holds {type(text).__name__}, not text")
        return text

    def _fill_template(self, row: Mapping[str, Any]) -> str:
        cells = {}
        for name in self.names:
            if name not in row:  # a row of .csv with too few cells
                raise ValueError(f"no {self.setting(name)} in it")
            cells[name] = "" if row[name] is None else row[name]
        assert self.spec.template, "only a source with a template comes here"
        try:
            return self.spec.template.format_map(cells)
        except (LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise ValueError(f"does not fit the template: {reason_of(error)}") from error


def _cells(column: Any) -> Iterable[Any]:
    """The scalars of an Arrow column.

    A dictionary is decoded cell by cell: neither cast() nor dictionary_decode() knows every type.
    """
    import pyarrow as pa  # loaded by the callers

    if pa.types.is_dictionary(column.type):
        return (cell.value for cell in column)
    cells: Iterable[Any] = column
    return cells
