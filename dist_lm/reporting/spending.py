"""How many hours, and device hours, a run had taken when it made a step.

Counted is the time of its processes, from the beginning of each to its end: start-up, evaluations,
saves and lost work too, and not the time between two starts, which nobody pays.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dist_lm.goodput import History

_SLOWEST = 1e-6  # tokens/s that a step is taken for; one without targets has none


class Spent(NamedTuple):
    hours: float = 0.0
    device_hours: float = 0.0  # devices times hours


def spent_at_steps(history: History, steps: Sequence[Mapping[str, Any]]) -> list[Spent]:
    """What had been spent after each of the steps that stand."""
    before = _before_each_start(history)
    last_work = {work.step: work for work in history.work if work.part == "steps"}
    places = []
    early = Spent()  # of steps that an older version wrote, which told of no starts
    tokens = 0.0
    for step in steps:
        work = last_work.get(step["step"])
        if work is None:
            rate = max(step["tokens_per_second"], _SLOWEST)
            hours = max(0.0, step["tokens"] - tokens) / rate / 3600
            early = Spent(early.hours + hours, early.device_hours + hours)
            places.append(early)
        else:
            start = history.starts[work.start]
            hours = max(0.0, min(work.ended, start.ended) - start.began) / 3600
            base = before[work.start]
            places.append(
                Spent(
                    early.hours + base.hours + hours,
                    early.device_hours + base.device_hours + start.devices * hours,
                )
            )
        tokens = step["tokens"]
    return places


def _before_each_start(history: History) -> list[Spent]:
    total = Spent()
    before = []
    for start in history.starts:
        before.append(total)
        hours = max(0.0, start.ended - start.began) / 3600
        total = Spent(total.hours + hours, total.device_hours + start.devices * hours)
    return before


def spent_so_far(history: History, places: Sequence[Spent]) -> Spent:
    """What the run has spent, also after its last step."""
    last = places[-1] if places else Spent()
    if not history.starts:
        return last
    base = _before_each_start(history)[-1]
    start = history.starts[-1]
    hours = max(0.0, start.ended - start.began) / 3600
    total = Spent(base.hours + hours, base.device_hours + start.devices * hours)
    return max(last, total)
