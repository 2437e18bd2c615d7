"""Shows people who wait how far the reading of a source has come.

tqdm is not used: into a log it writes carriage returns, and it has no plain line now and then.
"""

import sys
import time
from collections.abc import Callable, Mapping
from itertools import accumulate

from dist_lm.console import count, notice, say
from dist_lm.data.text.formats import Reader

Say = Callable[[str], None]  # prints a line

TERMINAL_PAUSE = 0.2  # seconds between two states of the line on a terminal
LOG_PAUSE = 10.0  # seconds between two lines elsewhere


def count_kinds(skipped: Mapping[str, int]) -> str:
    """The numbers of what was left out, by kind, in words."""
    return ", ".join(
        count(number, kind.removesuffix("s")) for kind, number in sorted(skipped.items())
    )


class Progress:
    """One line that is updated on a terminal, elsewhere a line every ten seconds.

    The caller counts `documents`; `bytes` of text are counted by `add`.
    """

    def __init__(self, verb: str, reader: Reader, say: Say, total: int | None = None):
        self.verb = verb  # what is done with the documents
        self.total = total  # bytes of text in all, if they are known
        self.say = say
        self.documents = 0
        self.bytes = 0
        self.file = 0  # number of the file being read ...
        self.before = 0  # ... and the bytes of text before it
        self.file_ends = list(accumulate(file.size for file in reader.files))
        self.is_terminal = sys.stderr.isatty() and say is notice
        self.pause = TERMINAL_PAUSE if self.is_terminal else LOG_PAUSE
        self.begin = time.monotonic()
        self.due = self.begin + self.pause

    def add(self, size: int, file: int) -> None:
        """Count bytes of text from a file, and show the progress if it is time."""
        self.bytes += size
        if file != self.file:
            self.file = file
            self.before = self.bytes
        if time.monotonic() >= self.due:
            self.show()

    def show(self, end: bool = False) -> None:
        """Show the progress; `end`: for the last time."""
        now = time.monotonic()
        self.due = now + self.pause
        rate = self.bytes / max(now - self.begin, 1e-9)
        megabytes = f"{self.bytes / 1e6:,.1f} MB"
        documents = count(self.documents, "document")
        line = f"{self.verb} {documents}, {megabytes}, {rate / 1e6:.2f} MB/s"
        bytes_left = self._total_bytes() - self.bytes
        if bytes_left > 0 and not end:
            line += f", about {bytes_left / max(rate, 1):,.0f} s left"
        if not self.is_terminal:
            self.say(line)
        elif end:
            say(f"\r{line:<78}", channel="stderr")
        else:
            say(f"\r{line:<78}", end="", channel="stderr")

    def _total_bytes(self) -> float:
        """Bytes of text in all; estimated by what the files so far had for their size on disk."""
        if self.total:
            return self.total
        stored_before = self.file_ends[self.file - 1] if self.file else 0
        ratio = self.before / stored_before if stored_before else 1
        return ratio * self.file_ends[-1]
