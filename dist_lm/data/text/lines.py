"""The text of an open file as lines, as characters, or as documents between separators.

Invariant: memory is bounded, whatever the file holds. A row longer than LONGEST_ROW is refused
without being held.
"""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from dist_lm.data.text.files import DAMAGE, reason_of
from dist_lm.errors import DataError

CHUNK = 2**20  # bytes read at once
# Bytes of a row, which is parsed as a whole. A document in a .txt file may be of any size.
LONGEST_ROW = 2**25
TOO_LONG = (
    f"longer than {LONGEST_ROW // 2**20} MB; nearest: a .txt file, which is read piece by piece"
)


def is_too_long(size: int) -> bool:
    """Whether a row of this size is refused."""
    return size > LONGEST_ROW


def check_length(size: int) -> None:
    """Refuse a row that is too long."""
    if is_too_long(size):
        raise ValueError(TOO_LONG)


def read_lines(file: BinaryIO, position: int = 0) -> Iterator[tuple[int, bytes]]:
    """Lines, each with the byte where it begins.

    A line that is too long comes cut short but still longer than LONGEST_ROW, so that whoever
    parses it refuses it.
    """
    while line := file.readline(LONGEST_ROW + 1):
        begin = position
        position += len(line)
        if is_too_long(len(line)) and not line.endswith(b"\n"):
            position += _pass_rest_of_line(file)
        if begin == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield begin, line


def _pass_rest_of_line(file: BinaryIO) -> int:
    """Read to the end of a line; returns how many bytes that were."""
    passed = 0
    while more := file.readline(LONGEST_ROW):
        passed += len(more)
        if more.endswith(b"\n"):
            break
    return passed


def read_range(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin at one of the bytes begin..end-1, each with that byte.

    Blank lines are left out.
    """
    if begin:
        # A line begins at `begin` only if the byte before it ends a line.
        file.seek(begin - 1)
        begin += len(file.readline()) - 1
    for position, line in read_lines(file, begin):
        if position >= end:
            return
        if line.strip():
            yield position, line


def decode_line(line: bytes, errors: str = "strict") -> str:
    """The text of a line; refuses one that is too long."""
    check_length(len(line))
    return line.decode(errors=errors)


def read_text(file: BinaryIO, errors: str = "strict") -> Iterator[str]:
    """The characters of a file, chunk by chunk; the error over bad bytes says where they are."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    position = 0  # bytes read so far
    is_last = False
    while not is_last:
        # One read of the file below: after an error, what was read before it is not lost.
        chunk = file.read1(CHUNK)  # type: ignore[attr-defined]
        is_last = not chunk
        position += len(chunk)
        try:
            text = decoder.decode(chunk, final=is_last)
        except UnicodeDecodeError as error:
            yield error.object[: error.start].decode()
            # The decoder also had the bytes of an unfinished character from the chunk before.
            place = position - len(error.object) + error.start
            bad_byte = error.object[error.start]
            raise ValueError(
                f"byte {place:,} of the text, {bad_byte:#04x}, is not UTF-8"
            ) from error
        if text:
            yield text


def check_escaped(text: str) -> None:
    """Refuse text decoded with `surrogateescape` in which that hid bytes that are not UTF-8."""
    if not text.isascii():
        text.encode(errors="surrogateescape").decode()


def split_rows(chunks: Iterator[str], separator: str | None) -> Iterator[tuple[int, str]]:
    """The text of a .txt file as one row, or as several that `separator` ends.

    A row comes in stretches, each with the number of the row.
    """
    row = 1
    waiting = ""
    # The end of a chunk may be the beginning of a separator, so it waits for the next chunk.
    kept = len(separator) - 1 if separator else 0
    try:
        for chunk in chunks:
            waiting += chunk
            if separator:
                *ended, waiting = waiting.split(separator)
                for text in ended:
                    yield row, text
                    row += 1
            cut = max(len(waiting) - kept, 0)
            yield row, waiting[:cut]
            waiting = waiting[cut:]
    except DAMAGE as error:
        raise DataError(f"row {row}: {reason_of(error)}") from error
    if waiting or row == 1:
        yield row, waiting


def stretches(text: str) -> Iterator[str]:
    """A text in stretches of at most CHUNK characters."""
    for begin in range(0, len(text), CHUNK):
        yield text[begin : begin + CHUNK]
