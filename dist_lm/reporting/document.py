"""The page of a report: one HTML file with its style, its script and its data, and nothing else.

A policy in the page lets the browser run that one script and load nothing, so no text of a run can
become code or reach another host.
"""

import base64
import hashlib
import html
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_lm import __version__
from dist_lm.config import FIELDS
from dist_lm.disk import write_file
from dist_lm.errors import UserError
from dist_lm.reporting.facts import defaults, embed
from dist_lm.reporting.series import POINTS

_PAGE = Path(__file__).parent / "page"
_PLACE = re.compile("@([A-Z]+)@")  # in report.html
SCRIPTS = ("chart.js", "sections.js", "report.js")  # in this order they are one script


def render(
    runs: Sequence[dict[str, Any]], *, price: float | None = None, reload_seconds: float = 0
) -> str:
    """The page of the facts of some runs.

    `price` is that of a device hour. With `reload_seconds` the page reads itself again so often.
    """
    data = {
        "version": __version__,
        "made": time.time(),
        "price": price,
        "reload_seconds": reload_seconds,
        "points": POINTS,
        "defaults": defaults(),
        "meaning": {name: info.description or "" for name, info in FIELDS.items()},
        "runs": list(runs),
    }
    style = _read("report.css")
    script = "\n".join(_read(name) for name in SCRIPTS)
    title = ", ".join(run["name"] for run in runs)
    parts = {
        "POLICY": policy(style, script),
        "TITLE": html.escape(title),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": embed(data),
    }
    # In one pass: what was put in is not looked at again.
    return _PLACE.sub(lambda place: parts[place[1]], _read("report.html"))


def _read(name: str) -> str:
    return _PAGE.joinpath(name).read_text(encoding="utf-8")


def policy(style: str, script: str) -> str:
    """What the browser may do: apply this style and run this script."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}';"
        " base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def write_page(path: Path, text: str) -> None:
    """Write a page as a whole: who reads it meanwhile sees the one before it."""
    try:
        write_file(path, [text.encode()])
    except OSError as error:
        raise UserError(
            f"--html {path}: {error.strerror}; rule: a file that can be written"
        ) from error
