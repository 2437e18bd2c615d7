"""Lines to people: printing that never stops a run, numbers and durations in short, safe text."""

import contextlib
import os
import re
import sys


def say(text: str, end: str = "\n", channel: str = "stdout") -> None:
    """Print, but never stop a run.

    A channel that is gone (closed pipe, full disk) leads nowhere from then on.
    """
    stream = getattr(sys, channel)
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if channel == "stdout":
            warn(f"standard output is gone, the run goes on: {error}")


def warn(text: str) -> None:
    say(f"warning: {text}", channel="stderr")


def is_terminal() -> bool:
    """Whether standard output is one."""
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):  # there is no standard output, or it is closed
        return False


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
