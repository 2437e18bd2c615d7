"""Lines to people: streams that outlive their reader, numbers and durations in short, safe text."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any


class LastingFile(io.FileIO):
    """Standard output or error, which may be gone at any time: a closed pipe, a full disk.

    At the first write that fails it leads to the null device from then on, and `lost` is called.
    """

    def __init__(self, descriptor: int, lost: Callable[[OSError], None]):
        super().__init__(descriptor, "w", closefd=False)
        self.lost = lost

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            self.lost(error)
            return len(data)


def make_streams_last(lost: Callable[[OSError], None]) -> None:
    """Let a command outlive its standard streams. Called once, at the process edge.

    `lost` is called if standard output is gone, and may raise. If standard error is gone, there is
    nobody to tell. A stream that was closed before the start leads to the null device: otherwise
    the next file that is opened would take its number, and lines would be printed into that file.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            # As long as the process.
            mode = "w" if descriptor else "r"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8"))  # noqa: SIM115
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, LastingFile):  # a command that another one calls
        raw.lost = lost
    elif sys.stdout is sys.__stdout__:  # nobody has put another in its place
        sys.stdout = _lasting_stream(1, sys.stdout, lost)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting_stream(2, sys.stderr, _ignore)


def _lasting_stream(descriptor: int, old: Any, lost: Callable[[OSError], None]) -> io.TextIOWrapper:
    """A stream that writes as the old one, but for what cannot be encoded: that is escaped."""
    return io.TextIOWrapper(
        io.BufferedWriter(LastingFile(descriptor, lost)),
        encoding=old.encoding,
        errors="backslashreplace" if old.errors == "strict" else old.errors,
        line_buffering=old.line_buffering or old.write_through,
    )


def _ignore(error: OSError) -> None:
    pass


def say(text: str, end: str = "\n", channel: str = "stdout") -> None:
    """Print at once. Commands give their streams to make_streams_last(), so this cannot fail."""
    print(text, end=end, file=getattr(sys, channel), flush=True)


def notice(text: str, end: str = "\n") -> None:
    """Print what is not the result of a command, on standard error.

    It may hold names from outside.
    """
    say(printable(text), end, channel="stderr")


def warn(text: str) -> None:
    notice(f"warning: {text}")


@cache
def warn_once(text: str) -> None:
    """Warn, but not again in the same words."""
    warn(text)


@contextlib.contextmanager
def dispensable(path: str | Path) -> Iterator[None]:
    """Surrounds the writing of a file without which a run goes on.

    What a full disk or a planted link makes fail costs one warning.
    """
    try:
        yield
    except OSError as error:
        warn_once(f"{path} could not be written, the run goes on: {error.strerror or error}")


def shorten(number: float) -> str:
    """1234567 -> 1.23M"""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def gigabytes(number: float) -> str:
    """Bytes in units of 10^9, without the unit: 83, or 1,234."""
    return f"{number / 1e9:.3g}" if number < 1e11 else f"{number / 1e9:,.0f}"


def count(number: int, thing: str, things: str = "") -> str:
    """1 file, or 1,234 files; `things` is the plural where an s is not enough."""
    if number == 1:
        return f"1 {thing}"
    return f"{number:,} {things or thing + 's'}"


def duration(seconds: float) -> str:
    """3725.3 -> 1:02:05"""
    all_minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(all_minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds_left:02}"
    return f"{minutes}:{seconds_left:02}"


# What can drive a terminal or disguise text on it: control characters but newline and tab, and
# changes of direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that cannot drive a terminal: \\x1b stands for an escape character."""
    return _CONTROL.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
