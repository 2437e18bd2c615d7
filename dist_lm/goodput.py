"""Works out where the time of a run and its restarts went, why it stopped, and its spikes.

All of it is in metrics.jsonl: each start, stop, evaluation and save has a line there, and each step
has its rate. A start that is killed writes no stop; it lasted as long as what it wrote about.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dist_lm.metrics import EventLine

# The parts of the time, in the order in which they are shown.
PARTS = ("steps", "data", "evaluation", "saves", "lost work", "start-up", "down", "other")
_UNKNOWN_CAUSE = "no rank said why"


@dataclass
class Work:
    """A step, an evaluation or a save."""

    part: str
    step: int  # updates made when it ended
    seconds: float
    seconds_of_data: float = 0.0  # spent waiting for data, as a part of them
    is_lost: bool = False  # it was done again after a restart, or after the run went back
    start: int = 0  # in which start of the run, from 0
    ended: float = 0.0  # since 1970, as far as the lines tell


@dataclass
class Start:
    """One start of the run, from the beginning of its process to its end."""

    began: float  # when the process began; seconds since 1970
    trains_from: float  # when it began to train
    attempt: int
    ended: float = 0.0
    cause: str = ""  # of its end; empty while it runs
    step: int = 0  # updates made before it
    devices: int = 1  # processes that share the work; each has a device
    strategy: str = ""


class History:
    """The time of a run, as the lines of its metrics.jsonl tell it."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]):
        self.starts: list[Start] = []
        self.stops_before_training: dict[int, str] = {}  # by attempt
        self.work: list[Work] = []
        self.spikes: list[str] = []
        self._tokens = 0  # of the run, after the last line
        for line in lines:
            self._take(line)
        for start, following in pairwise(self.starts):
            start.cause = start.cause or _UNKNOWN_CAUSE
            start.ended = min(start.ended, following.began)

    def _take(self, line: Mapping[str, Any]) -> None:
        if "event" in line:
            self._take_event(EventLine.model_validate(line))
        elif "loss" in line:
            self._take_step(line)

    def _take_event(self, event: EventLine) -> None:
        if event.event == "start":
            self._forget_after(event.step)
            self._tokens = event.tokens
            self._take_start(event)
        elif event.event == "stop":
            self._take_stop(event)
        elif event.event == "spike":
            self.spikes.append(f"at step {event.step}: {event.reason}; {event.done}")
            if event.back is not None:
                self._forget_after(event.back)
                self._tokens = event.tokens
        elif event.event == "evaluation":
            self._add(Work("evaluation", event.step, event.seconds))
        elif event.event == "save":
            self._add(Work("saves", event.step, event.seconds))

    def _take_start(self, event: EventLine) -> None:
        start = Start(
            began=event.began,
            trains_from=event.time,
            attempt=event.attempt,
            ended=event.time,
            step=event.step,
            devices=max(1, event.world_size),
            strategy=event.strategy,
        )
        self.starts.append(start)

    def _take_step(self, line: Mapping[str, Any]) -> None:
        seconds = 0.0
        if line["tokens_per_second"] > 0:
            seconds = max(0, line["tokens"] - self._tokens) / line["tokens_per_second"]
        self._tokens = line["tokens"]
        waiting = min(max(line.get("data_wait", 0.0), 0.0), 1.0)
        self._add(Work("steps", line["step"], seconds, seconds_of_data=waiting * seconds))

    def _add(self, work: Work) -> None:
        if self.starts:  # else an older version wrote the line, which had no starts
            self.work.append(work)
            self.starts[-1].ended += work.seconds
            work.start = len(self.starts) - 1
            work.ended = self.starts[-1].ended

    def _take_stop(self, stop: EventLine) -> None:
        """Several ranks of one attempt may tell why it stopped; the last one stands."""
        cause = f"{stop.kind}: {stop.reason}" if stop.reason else stop.kind
        if self.starts and self.starts[-1].attempt == stop.attempt:
            self.starts[-1].cause = cause
            self.starts[-1].ended = max(stop.time, self.starts[-1].ended)
        elif stop.kind != "done":  # the start of a finished run does nothing
            self.stops_before_training[stop.attempt] = cause

    def _forget_after(self, step: int) -> None:
        """Count what came after this step as lost, because the run goes on from there."""
        for work in reversed(self.work):
            if work.step > step:
                work.is_lost = True
            elif not work.is_lost:
                break

    def seconds(self) -> dict[str, float]:
        """The seconds of each of PARTS. Their sum is the time from the first start to the end."""
        parts = dict.fromkeys(PARTS, 0.0)
        for work in self.work:
            if work.is_lost:
                parts["lost work"] += work.seconds
                continue
            parts["data"] += work.seconds_of_data
            parts[work.part] += work.seconds - work.seconds_of_data
        for start in self.starts:
            parts["start-up"] += max(0.0, start.trains_from - start.began)
        for start, following in pairwise(self.starts):
            parts["down"] += max(0.0, following.began - start.ended)
        if self.starts:
            total = self.starts[-1].ended - self.starts[0].began
            parts["other"] = max(0.0, total - sum(parts.values()))
        return parts

    def device_hours(self) -> float:
        """What the run has taken: the devices of each start, times the hours from begin to end."""
        seconds = 0.0
        for start in self.starts:
            seconds += start.devices * max(0.0, start.ended - start.began)
        return seconds / 3600

    def causes(self) -> dict[str, int]:
        """The reasons why the run stopped, each with its number."""
        causes = Counter(start.cause for start in self.starts if start.cause)
        causes.update(self.stops_before_training.values())
        return dict(causes.most_common())


def goodput(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The time of a run, for report. None: no line tells of a start."""
    history = History(lines)
    if not history.starts:
        return None
    return {
        "starts": len(history.starts) + len(history.stops_before_training),
        "device_hours": history.device_hours(),
        "seconds": history.seconds(),
        "stops": history.causes(),
        "spikes": history.spikes,
    }
