"""Tells a spike by a step's loss and gradient norm, and keeps the ranges that are stepped over.

The rule. The loss is far off if it lies above the median of the last steps by more than 10 of their
deviations and by more than a tenth of the median. The norm is far off if it is more than 10 times
the median of theirs and its logarithm lies above the median of theirs by more than 10 deviations.
The deviation is 1.4826 times the median distance from the median: the standard deviation, where the
distribution is normal. Both rules look upwards only: a loss that falls fast is no spike.

All of it follows from figures that the ranks have agreed on, so all ranks decide alike.
"""

import math
import statistics
from collections.abc import Sequence

WINDOW = 64  # steps that a step is compared with
_FEWEST = 32  # of them; before that, only figures that are not finite are spikes
_DEVIATIONS = 10.0
_SHARE_OF_LOSS = 0.1  # a smaller jump of the loss is none
_TIMES_THE_NORM = 10.0
_SIGMA = 1.4826  # standard deviation of a normal distribution with a median distance of 1
_SMALLEST_NORM = 1e-30  # has a logarithm

STRETCH = 8  # steps up to the spike whose data is stepped over
# The longest range of batches. Each spike in one place adds a stretch to it.
LONGEST_RANGE = 3 * STRETCH

Figures = list[float]  # loss and gradient norm of a step
Ranges = list[list[int]]  # of global batches, each from its first one to the one after its last


class Spike(Exception):
    """The run must go back. All ranks raise it together."""

    def __init__(self, step: int, loss: float, norm: float, reason: str):
        super().__init__(reason)
        self.step = step
        self.loss = loss
        self.norm = norm
        self.reason = reason


def far_off(recent: Sequence[Figures], loss: float, norm: float) -> str:
    """The reason why finite figures are far off those of the recent steps, or an empty string."""
    if len(recent) < _FEWEST:
        return ""
    losses = [figures[0] for figures in recent]
    usual, deviation = _median_and_deviation(losses)
    jump = loss - usual
    if jump > _DEVIATIONS * deviation and jump > _SHARE_OF_LOSS * abs(usual):
        return f"loss={loss:.4f} is far above {usual:.4f}, the median of {len(recent)} steps"
    logs = [_log(figures[1]) for figures in recent]
    usual, deviation = _median_and_deviation(logs)
    jump = _log(norm) - usual
    if jump > _DEVIATIONS * deviation and jump > math.log(_TIMES_THE_NORM):
        median = math.exp(usual)
        return f"grad_norm={norm:.4g} is far above {median:.4g}, the median of {len(recent)} steps"
    return ""


def _median_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    median = statistics.median(values)
    distances = [abs(value - median) for value in values]
    return median, _SIGMA * statistics.median(distances)


def _log(norm: float) -> float:
    return math.log(max(norm, _SMALLEST_NORM))


def with_range(ranges: Ranges, first: int, stop: int) -> Ranges:
    """The ranges and this one, in order; what lies inside of it is a part of it now."""
    outside = [part for part in ranges if part[1] <= first or part[0] >= stop]
    return sorted([*outside, [first, stop]])


def spell_ranges(ranges: Ranges) -> str:
    """Ranges for a message."""
    return ", ".join(f"{first} to {stop - 1}" for first, stop in ranges)
