"""Curves that are small enough for a page: few points, and no value that they stand for is hidden.

A run of up to POINTS steps is kept step by step. Of a longer one each point stands for equally many
steps: their mean, and their lowest and highest value, so that a spike of one step stays visible.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

POINTS = 2000  # of a curve; a wide screen has about as many columns
_DIGITS = 6  # significant ones of a figure; a picture shows three or four


def steps_a_point(steps: int) -> int:
    """How many steps a point of a curve stands for."""
    return max(1, math.ceil(steps / POINTS))


def number_in(line: Mapping[str, Any], key: str) -> float:
    """A figure of a line; nan if it has none, or something else."""
    value = line.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return math.nan


def short(value: float) -> float | None:
    """A figure for a page: rounded, and None where it is not finite, which JSON cannot hold."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")


def curve(values: Sequence[float], size: int) -> dict[str, Any]:
    """The points of a curve, of `size` values each, and how many values are not finite."""
    points: dict[str, Any] = {"mean": [], "low": [], "high": [], "not_finite": 0}
    for begin in range(0, len(values), size):
        part = values[begin : begin + size]
        finite = [value for value in part if math.isfinite(value)]
        points["not_finite"] += len(part) - len(finite)
        if not finite:
            finite = [math.nan]
        points["mean"].append(short(math.fsum(finite) / len(finite)))
        points["low"].append(short(min(finite)))
        points["high"].append(short(max(finite)))
    if size == 1:
        del points["low"], points["high"]  # each point is one value
    return points


def middles(values: Sequence[Any], size: int) -> list[Any]:
    """The value in the middle of each point's."""
    picked = []
    for begin in range(0, len(values), size):
        part = values[begin : begin + size]
        picked.append(part[len(part) // 2])
    return picked


def shortened(values: Iterable[float]) -> list[float | None]:
    return [short(value) for value in values]
