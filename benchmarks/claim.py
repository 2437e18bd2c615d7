"""What a claim is: a sentence, a target, and a function that measures both sides.

A claim's function runs in a process of its own with a fixed number of threads. It first checks that
both sides compute the same thing, and then lets them take turns.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Side = Callable[[], float | None]  # what it returns counts; if that is None, its seconds do


@dataclass(frozen=True)
class Figure:
    """How a figure is made of the medians of both sides."""

    unit: str
    of: Callable[[float, float], float]  # ours and the other's


FASTER = Figure("x as fast", lambda ours, other: other / ours)
COST = Figure("x the time", lambda ours, other: ours / other)
SHARE = Figure("of it", lambda ours, other: other / ours)
SIZE = Figure("x the bytes", lambda ours, other: ours / other)
MORE_MS = Figure("ms more", lambda ours, other: 1000 * (ours - other))
MS = Figure("ms", lambda ours, other: 1000 * ours)


@dataclass(frozen=True)
class Target:
    """The range in which a figure must be."""

    least: float = float("-inf")
    most: float = float("inf")

    def is_met(self, figure: float) -> bool:
        return self.least <= figure <= self.most

    def words(self) -> str:
        words = []
        if self.least > float("-inf"):
            words.append(f"≥ {self.least:g}")
        if self.most < float("inf"):
            words.append(f"≤ {self.most:g}")
        return ", ".join(words)


@dataclass
class Measured:
    """What a claim's function gives back."""

    ours: list[float]  # a number for each round: seconds, or bytes where the figure is of bytes
    other: list[float]
    equal: str  # what was compared, in words
    notes: dict[str, Any] = field(default_factory=dict)  # other figures of the same run


@dataclass(frozen=True)
class Context:
    """What a claim's function needs to know."""

    scratch: Path  # an empty folder, removed afterwards
    is_quick: bool  # small sizes and one round: only whether it works
    rounds: int
    nanogpt: Path | None = None  # a checkout of nanoGPT

    def pick(self, full: T, quick: T) -> T:
        return quick if self.is_quick else full


@dataclass(frozen=True)
class Claim:
    """One row of the table."""

    name: str
    sentence: str  # what is compared with what
    figure: Figure
    target: Target
    measure: Callable[[Context], Measured]
    threads: int = 1  # and cores
    rounds: int = 5
    probe: str = "matrix"  # or "copy": what limits it
    peers: tuple[str, ...] = ()  # packages of the other side
    needs_nanogpt: bool = False
    preload: tuple[str, ...] = ()  # modules that are imported before the processes are forked
    tried: str = ""  # what was tried where the target is missed


def take_turns(
    ctx: Context, ours: Side, other: Side, equal: str, clock: str = "wall", **notes: Any
) -> Measured:
    """Both sides in turns. The check that they are equal has run both before, so they are warm.

    `clock` is "cpu" for work of one process that never waits: CPU time does not see what else the
    machine does.
    """
    read = time.process_time if clock == "cpu" else time.perf_counter
    sides = {"ours": ours, "other": other}
    taken: dict[str, list[float]] = {"ours": [], "other": []}
    names = list(sides)
    for _ in range(ctx.rounds):
        for name in names:
            began = read()
            value = sides[name]()
            seconds = read() - began
            taken[name].append(seconds if value is None else value)
        names.reverse()  # whoever comes second finds warmer caches
    return Measured(**taken, equal=equal, notes={"clock": clock, **notes})


def summarize(figure: Figure, measured: Measured) -> dict[str, float]:
    """The figure of the medians, and the least and the greatest of the rounds."""
    by_round = []
    for ours, other in zip(measured.ours, measured.other, strict=True):
        by_round.append(figure.of(ours, other))
    middle = figure.of(statistics.median(measured.ours), statistics.median(measured.other))
    return {"figure": middle, "least": min(by_round), "most": max(by_round)}


def must_equal(ours: object, other: object, what: str) -> str:
    """Refuse a comparison of sides that differ. Returns the words for the result."""
    assert ours == other, f"the sides differ in {what}: {_short(ours)} and {_short(other)}"
    return f"equal {what}"


def must_be_near(ours: float, other: float, what: str, within: float) -> str:
    """The same for numbers that are rounded in another order."""
    difference = abs(ours - other) / max(abs(other), 1e-30)
    assert difference <= within, f"the sides differ in {what}: {ours} and {other}"
    return f"equal {what} within {within:g}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


def find(claims: Sequence[Claim], names: Sequence[str]) -> list[Claim]:
    """The claims of these names, in the order of the list."""
    known = [claim.name for claim in claims]
    for name in names:
        if name not in known:
            from dist_lm.errors import did_you_mean  # only for a wrong name

            raise SystemExit(
                f"error: {name} is no claim; rule: a name that python -m benchmarks"
                f" lists{did_you_mean(name, known)}"
            )
    return [claim for claim in claims if claim.name in names]
