"""The samples of a run, read back from samples.md.

Each entry has a heading with the step, and a text for each temperature between fences. A text is
what a model wrote, so it may hold fences too: the last fence before the next heading ends it.
"""

import re
from pathlib import Path
from typing import Any

from dist_lm.console import printable
from dist_lm.outside import open_regular

FILE = "samples.md"
MOST = 24  # entries that a page shows, evenly chosen
_LARGEST = 32 * 2**20  # bytes that are read, from the end of the file
_LONGEST_TEXT = 4000  # characters that are shown of a text
_ENTRY = re.compile(r"^## step (\d{1,15})(?:, loss ([^\s,]{1,30}))?.*\n", re.MULTILINE)
_TEXT = re.compile(r"^temperature (\S{1,20})\n```\n", re.MULTILINE)
_FENCE = "\n```"


def read_samples(run_dir: str | Path) -> list[dict[str, Any]]:
    """The entries in the order of their steps; of a step that was made again, the last one."""
    try:
        with open_regular(Path(run_dir, FILE)) as file:
            file.seek(max(0, file.seek(0, 2) - _LARGEST))
            content = file.read(_LARGEST).decode(errors="replace")
    except OSError:  # a run without evaluations has none
        return []
    entries = {}
    headings = list(_ENTRY.finditer(content))
    for number, heading in enumerate(headings):
        end = headings[number + 1].start() if number + 1 < len(headings) else len(content)
        texts = _texts_of(content[heading.end() : end])
        if texts:
            step = int(heading[1])
            entries[step] = {"step": step, "loss": heading[2], "texts": texts}
    return _evenly([entries[step] for step in sorted(entries)])


def _texts_of(part: str) -> list[dict[str, str]]:
    """The texts of an entry, by temperature."""
    texts = []
    begins = list(_TEXT.finditer(part))
    for number, begin in enumerate(begins):
        end = begins[number + 1].start() if number + 1 < len(begins) else len(part)
        text = part[begin.end() : end]
        fence = text.rfind(_FENCE)
        if fence >= 0:
            text = text[:fence]
        if len(text) > _LONGEST_TEXT:
            text = text[:_LONGEST_TEXT] + " …"
        texts.append({"temperature": begin[1], "text": printable(text)})
    return texts


def _evenly(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST of them, the first and the last among them."""
    if len(entries) <= MOST:
        return entries
    chosen = []
    for number in range(MOST):
        chosen.append(entries[number * (len(entries) - 1) // (MOST - 1)])
    return chosen
