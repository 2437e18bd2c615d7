"""The result file: a header, and a line of JSON for each section. Imports nothing slow."""

import json
from pathlib import Path
from typing import Any

HEADER = "header"  # the section name of the first line
TAIL_LINES = 30  # of the log of a section that failed, which its result keeps


def append(file: Path, content: dict[str, Any]) -> None:
    """Add a line of JSON to a file, at once."""
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(content) + "\n")


def read_results(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the sections of a result file. Raises ValueError for another file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            lines.append(json.loads(line))
    if not lines or lines[0].get("section") != HEADER:
        raise ValueError(f"{path} is no result file of this command")
    return lines[0], lines[1:]


def read_section(file: Path, log: Path, code: int) -> dict[str, Any]:
    """What a section has written to its own file. Without the last line it has crashed."""
    rows = []
    outcome = None
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            content = json.loads(line)
            if "row" in content:
                rows.append(content["row"])
            else:
                outcome = content
    if outcome is None:
        why = f"crashed with exit code {code}: {last_line(log)}"
        outcome = {"result": "failed", "why": why}
    if outcome["result"] == "failed":
        outcome["log"] = tail(log)
    return {**outcome, "rows": rows}


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = tail(log).split("\n")
    return lines[-1].strip()[:300]


def tail(log: Path) -> str:
    """The last lines of a log, without empty ones."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    said = [line[:500] for line in lines if line.strip()]
    return "\n".join(said[-TAIL_LINES:])
