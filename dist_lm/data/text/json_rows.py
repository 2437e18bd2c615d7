"""Rows of .jsonl and .json: JSON values a line, or the values of one array.

Invariant: after a bad value the next one can be read, and at most LONGEST_ROW characters and a
chunk of text are held.
"""

import codecs
import json
import re
from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Any, BinaryIO

from dist_lm.data.text import lines
from dist_lm.data.text.columns import Columns, Rows, ToText
from dist_lm.data.text.files import LostRestError, Part


def json_rows(file: BinaryIO, part: Part, start: int, columns: Columns) -> tuple[Rows, ToText]:
    """Lines, in a part of a file numbered by the byte where they begin; or values of an array."""
    if part.end:
        ranged = lines.read_range(file, max(part.begin, start), part.end)
        return ranged, columns.text_of_line
    head = file.peek()  # type: ignore[attr-defined]
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        # The decoder lets bad bytes pass: if it raised, it would end the whole array and not only
        # the value that holds them.
        values = JsonArray(lines.read_text(file, errors="surrogateescape"))
        return zip(count(1), values), columns.text_of_value
    filled = (line for _, line in lines.read_lines(file) if line.strip())
    return zip(count(1), filled), columns.text_of_line


class JsonArray:
    """The values of one JSON array, one after another.

    After an error over a value, the next call goes on behind that value. A string, list or object
    ends with its own quote or bracket; any other value ends before the next comma or bracket. If
    the file ends inside a value, the rest of the file is lost.
    """

    _GAP = re.compile(r"[\s,]*")
    _OPENING = ("{", "[", '"')
    _MARK = re.compile(r'["{}\[\],]')
    _REST_OF_STRING = re.compile(r'(?:[^"\\]++|\\.)*+"', re.DOTALL)

    def __init__(self, chunks: Iterator[str]):
        self.chunks = chunks
        self.window = ""  # the newest chunk
        self.position = 0  # where in the window reading goes on
        # The pieces of the value being read; some are left over after a value that is too long.
        self.pieces: Iterator[str] = iter(())
        self.decoder = json.JSONDecoder()
        while "[" not in self.window:
            self._take_chunk()
        self.position = self.window.index("[") + 1

    def __iter__(self) -> "JsonArray":
        return self

    def __next__(self) -> Any:
        deque(self.pieces, maxlen=0)  # passes what is left of a value that was too long
        self._pass_gap()
        if self.window[self.position] == "]":
            raise StopIteration
        begin = self.position
        if self.window.startswith(self._OPENING, begin):
            # The fast way, for a value that is whole in this chunk.
            try:
                value, self.position = self.decoder.raw_decode(self.window, begin)
            except (ValueError, RecursionError):
                pass  # the value is bad, or goes on in the next chunk
            else:
                self._check(self.window[begin : self.position])
                return value
        text = self._read_value()
        self._check(text)
        return json.loads(text)

    @staticmethod
    def _check(text: str) -> None:
        """Refuse a value that is too long, or has bytes that are not UTF-8."""
        lines.check_length(len(text))
        lines.check_escaped(text)

    def _pass_gap(self) -> None:
        """Go to where the next value begins, or the array ends."""
        while True:
            gap = self._GAP.match(self.window, self.position)
            assert gap, "the pattern matches an empty gap too"
            self.position = gap.end()
            if self.position < len(self.window):
                return
            self._take_chunk()

    def _read_value(self) -> str:
        """The text of a value; cut short, so that it is refused, if it is too long."""
        parts: list[str] = []
        size = 0
        self.pieces = self._find_pieces()
        for piece in self.pieces:
            parts.append(piece)
            size += len(piece)
            if lines.is_too_long(size):
                break
        return "".join(parts).rstrip()

    def _find_pieces(self) -> Iterator[str]:
        """The text of a value chunk by chunk; leaves the position where the value ends."""
        closes_itself = self.window.startswith(self._OPENING, self.position)
        depth = 0  # of open brackets
        is_quoted = False
        looked = self.position  # the window has been looked through up to here
        while True:
            if is_quoted:
                mark = self._REST_OF_STRING.match(self.window, looked)
            else:
                mark = self._MARK.search(self.window, looked)
            if mark is None:
                unread = self.window[looked:]
                backslashes = len(unread) - len(unread.rstrip("\\"))
                yield self.window[self.position :]
                self._take_chunk()
                # An odd last backslash belongs to the first character of this chunk.
                looked = backslashes % 2 if is_quoted else 0
                continue
            looked = mark.end()
            sign = self.window[looked - 1]
            if sign == '"':
                is_quoted = not is_quoted
            elif sign in "{[":
                depth += 1
            elif sign in "}]" and depth:
                depth -= 1
            elif sign in ",]" and not depth:
                looked -= 1  # the sign is not the value's
                break
            if closes_itself and not depth and not is_quoted:
                break
        begin = self.position
        self.position = looked
        yield self.window[begin:looked]

    def _take_chunk(self) -> None:
        self.window = next(self.chunks, "")
        self.position = 0
        if not self.window:
            raise LostRestError("the file ends inside the array")
