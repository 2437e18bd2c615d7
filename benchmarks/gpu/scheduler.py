"""Runs sections as processes within a given time.

Imports neither torch nor dist_lm: what a section does is not known here. A section is a process
with an estimate and a time limit. Sections that only check run side by side. Sections that measure
time run alone. What no longer fits into the time is skipped, and the result says so.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

SPARE_SECONDS = 4.0  # kept for ending processes and printing the table
LOOK_SECONDS = 0.05

Result = dict[str, Any]  # a line of the result file


@dataclass(frozen=True)
class Task:
    """A section as the scheduler sees it."""

    name: str
    kind: Literal["correctness", "speed", "warm"]
    seconds: float  # about as long it takes
    timeout: float  # it is killed after as long
    must: bool = False  # the whole is incomplete without it
    alone: bool = False  # it measures time, so nothing may run beside it
    gigabytes: float = 4.0  # of the card's memory, at most


class Process(Protocol):
    """A running section."""

    def poll(self) -> int | None: ...

    def kill(self) -> None:
        """End it and all that it started."""


@dataclass
class Running:
    task: Task
    process: Process
    started: float
    limit: float  # when it is killed


class Scheduler:
    """Starts tasks in the order given, as far as time, places and memory allow."""

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        start: Callable[[Task], Process],
        read: Callable[[Task, int], Result],
        record: Callable[[Result], None],
        deadline: float,
        places: int,
        gigabytes: float,
    ):
        self._waiting = list(tasks)
        self._start = start
        self._read = read  # what a section has written, with its exit code
        self._record = record
        self._end = deadline - SPARE_SECONDS  # by time.monotonic()
        self._places = places  # how many run side by side
        self._gigabytes = gigabytes  # of the card
        self._running: list[Running] = []

    def run(self) -> None:
        """Return when every task has a result."""
        try:
            while self._waiting or self._running:
                for running in list(self._running):
                    self._look(running)
                self._start_what_fits()
                if self._running:
                    time.sleep(LOOK_SECONDS)
        finally:
            for running in self._running:
                running.process.kill()

    # --- ending

    def _look(self, running: Running) -> None:
        """Record a task that has ended, and kill one that takes too long."""
        code = running.process.poll()
        now = time.monotonic()
        if code is None and now < running.limit:
            return
        self._running.remove(running)
        seconds = round(now - running.started, 1)
        if code is not None:
            result = self._read(running.task, code)
        else:
            running.process.kill()
            result = self._read(running.task, -9)
            result["result"] = "failed"
            result["why"] = f"timed out after {seconds:g} s"
            if running.limit == self._end:
                result["why"] += ", when the time of the whole was up"
        self._note(running.task, result | {"seconds": seconds})

    def _note(self, task: Task, result: Result) -> None:
        self._record({"section": task.name, "kind": task.kind, **result})

    # --- starting

    def _start_what_fits(self) -> None:
        for task in list(self._waiting):
            if self._runs_alone():
                return
            if task.alone and (self._running or self._some_together()):
                continue
            if not task.alone and not self._has_place(task):
                continue
            self._waiting.remove(task)
            self._start_or_skip(task)

    def _runs_alone(self) -> bool:
        return any(running.task.alone for running in self._running)

    def _some_together(self) -> bool:
        """Whether tasks that run side by side still wait."""
        return any(not task.alone for task in self._waiting)

    def _has_place(self, task: Task) -> bool:
        if not self._running:
            return True
        taken = sum(running.task.gigabytes for running in self._running)
        has_memory = taken + task.gigabytes <= self._gigabytes
        return has_memory and len(self._running) < self._places

    def _start_or_skip(self, task: Task) -> None:
        now = time.monotonic()
        left = self._end - now
        free = left
        if not task.must:
            free -= sum(other.seconds for other in self._waiting if other.must and other.alone)
        if task.seconds > free:
            why = f"needs about {task.seconds:g} s, and {max(left, 0):.0f} s are left"
            if free < left:
                why += f", {left - free:.0f} s of them for what may not be skipped"
            self._note(task, {"result": "skipped", "why": why, "rows": [], "seconds": 0.0})
            return
        limit = min(now + task.timeout, self._end)
        try:
            process = self._start(task)
        except Exception as error:  # one section that cannot start must not end the others
            why = f"did not start: {type(error).__name__}: {error}"
            self._note(task, {"result": "failed", "why": why, "rows": [], "seconds": 0.0})
            return
        self._running.append(Running(task, process, started=now, limit=limit))


def exit_code(tasks: Sequence[Task], results: Sequence[Result], is_dry: bool) -> int:
    """1: a check failed. 3: what may not be left out has no result. 0: neither.

    A section that measures fails by a crash, or by a check that its own comparison rests on. In a
    dry run every failure counts.
    """
    by_name = {result["section"]: result for result in results}
    is_incomplete = False
    for task in tasks:
        outcome = by_name.get(task.name, {"result": "skipped"})
        has_failed = outcome["result"] == "failed"
        has_failed_check = any(row.get("ok") is False for row in outcome.get("rows", []))
        counts = task.kind == "correctness" or is_dry or has_failed_check
        if has_failed and counts:
            return 1
        if task.must and outcome["result"] in ("failed", "skipped"):
            is_incomplete = True
    return 3 if is_incomplete else 0
