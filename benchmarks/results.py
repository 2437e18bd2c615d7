"""The JSON files of results: one for each date, an entry for each claim.

An entry says by itself what measured it. Of several the newest counts.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def write(entry: dict[str, Any], folder: Path = FOLDER) -> None:
    """Put an entry into today's file, in the place of an earlier one of the same claim."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now(UTC):%Y-%m-%d}.json"
    content: dict[str, Any] = {}
    if path.is_file():
        content = json.loads(path.read_text())
    content[entry["name"]] = entry
    path.write_text(json.dumps(dict(sorted(content.items())), indent=1, ensure_ascii=False) + "\n")


def newest(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The newest entry of each claim that was ever measured."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("????-??-??.json")):
        found.update(json.loads(path.read_text()))
    return found
