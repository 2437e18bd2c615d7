"""evals.jsonl: what lm-eval measured of a run's checkpoints.

One line for each task and checkpoint, with the step that it belongs to. A line that comes later for
the same task and step stands.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dist_lm.disk import open_own
from dist_lm.errors import CheckpointError
from dist_lm.outside import CheckedModel, Count, Text, check, open_regular, parse_json

FILE = "evals.jsonl"
_LONGEST_LINE = 2**16  # bytes that are read at once
Key = tuple[int, str, int, float]  # step, task, shots, limit


class EvalLine(CheckedModel):
    """What readers use of a line."""

    step: Count
    task: Text
    shots: Count = 0
    limit: float = 0.0  # documents of the task at most, or a share of them; 0: all
    metrics: dict[Text, Annotated[float, Field(allow_inf_nan=False)]]


def add_evals(run_dir: str | Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append lines by one write, so that no reader sees half of a checkpoint's."""
    text = "".join(json.dumps(dict(line)) + "\n" for line in lines)
    with open_own(Path(run_dir, FILE), "ab", buffering=0) as file:
        is_torn = file.tell() > 0 and _last_byte(Path(run_dir, FILE)) != b"\n"
        file.write(("\n" * is_torn + text).encode())
        os.fsync(file.fileno())


def read_evals(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run, by step; none if nothing was measured. Broken lines are left out."""
    found: dict[Key, dict[str, Any]] = {}
    path = Path(run_dir, FILE)
    if not os.path.lexists(path):
        return []
    try:
        with open_regular(path) as file:
            while data := file.readline(_LONGEST_LINE):
                line = _read_line(data)
                if line is not None:
                    found[_key(line)] = line
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return sorted(found.values(), key=lambda line: int(line["step"]))


def primary(line: Mapping[str, Any]) -> tuple[str, float] | None:
    """The metric of a task that is shown where there is room for one: its first."""
    for name, value in line["metrics"].items():
        if not name.endswith("_stderr") and math.isfinite(value):
            return str(name), float(value)
    return None


def _key(line: Mapping[str, Any]) -> Key:
    return line["step"], line["task"], line.get("shots", 0), float(line.get("limit", 0))


def _read_line(data: bytes) -> dict[str, Any] | None:
    try:
        line = parse_json(data, CheckpointError)
        check(line, EvalLine, CheckpointError)
    except CheckpointError:
        return None
    assert isinstance(line, dict)
    return line


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
