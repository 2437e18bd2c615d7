"""The long form of the tests of faults. It can be stopped at any time, and goes on where it was.

    python -m tests.faults.campaign --seconds 3600 --place campaign.json
    python -m tests.faults.campaign --report --place campaign.json

Pieces take turns of two minutes. How far each has come, and what it found, stands in the file
`--place`. A piece is done when it has tried all it has to try.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_lm.disk import write_json
from tests.faults import kills, mutations
from tests.faults.fuzz import fuzz
from tests.faults.operations import compile_shim, enumerate_faults
from tests.faults.scenarios import SCENARIOS
from tests.faults.targets import TARGETS

TURN_SECONDS = 120
INPUTS = 1_000_000  # of each fuzz target
SCHEDULES = 500  # of kills


@dataclass
class Place:
    """How far a piece has come."""

    next: int = 0  # number of the first thing that was not tried yet
    total: int = 0
    seconds: float = 0.0  # of work
    # What was found: how often, and the number of the first.
    findings: dict[str, list[int]] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)  # of each thing that was tried

    @property
    def is_done(self) -> bool:
        return 0 < self.total <= self.next

    def find(self, what: str, number: int, times: int = 1) -> None:
        count, first = self.findings.get(what, [0, number])
        self.findings[what] = [count + times, min(first, number)]


# Goes on with a piece for about TURN_SECONDS.
Turn = Callable[[Place, float], None]


def fuzz_turn(target: str) -> Turn:
    def turn(place: Place, until: float) -> None:
        place.total = INPUTS
        while time.monotonic() < until and not place.is_done:
            left = max(1.0, until - time.monotonic())
            # One process for the whole turn: importing torch takes as long as thousands of inputs.
            report = fuzz(target, place.next, INPUTS - place.next, seconds=left)
            for what, (count, first) in report.findings.items():
                place.find(what, first, count)
            place.next += report.inputs

    return turn


def operations_turn(scenario: str, library: Path) -> Turn:
    def turn(place: Place, until: float) -> None:
        left = max(1.0, until - time.monotonic())
        words = ["--first", str(place.next), "--seconds", str(left)]
        result = enumerate_faults(library, scenario, *words)
        place.total = result.counts["faults"]
        for one in result.found:
            kind, _, said = one["wrong"].partition(":")
            last_line = said.strip().splitlines()[-1] if said.strip() else ""
            place.find(f"{kind}: {last_line[:100]}", one["number"])
        place.next += result.counts["tried"]

    return turn


def kills_turn(folder: Path) -> Turn:
    def turn(place: Place, until: float) -> None:
        place.total = SCHEDULES
        while time.monotonic() < until and not place.is_done:
            figures = kills.run_schedule(kills.schedule(place.next), folder)
            place.figures.append(asdict(figures))
            if figures.wrong:
                place.find(figures.wrong.splitlines()[0][:200], place.next)
            place.next += 1

    return turn


def mutations_turn(folder: Path) -> Turn:
    cases = mutations.all_cases()

    def turn(place: Place, until: float) -> None:
        place.total = len(cases)
        with mutations.open_bench(folder) as bench:
            while time.monotonic() < until and not place.is_done:
                wrong = bench.attempt(cases[place.next])
                if wrong:
                    place.find(f"{cases[place.next]}: {wrong[:150]}", place.next)
                place.next += 1

    return turn


def pieces(scratch: Path) -> dict[str, Turn]:
    """All pieces by name."""
    library = compile_shim(scratch)
    turns = {f"operations {name}": operations_turn(name, library) for name in SCENARIOS}
    turns |= {f"fuzz {name}": fuzz_turn(name) for name in TARGETS}
    turns["kills"] = kills_turn(scratch / "kills")
    turns["mutations"] = mutations_turn(scratch / "mutations")
    return turns


def read_places(path: Path) -> dict[str, Place]:
    if not path.exists():
        return {}
    return {name: Place(**content) for name, content in json.loads(path.read_text()).items()}


def go_on(path: Path, seconds: float, only: Sequence[str]) -> None:
    """Give each piece a turn, again and again, until the time is up or all are done."""
    deadline = time.monotonic() + seconds
    places = read_places(path)
    with tempfile.TemporaryDirectory(prefix="dist_lm-campaign-") as scratch:
        turns = pieces(Path(scratch))
        chosen = [name for name in turns if not only or name.startswith(tuple(only))]
        while time.monotonic() < deadline:
            left = [name for name in chosen if not places.setdefault(name, Place()).is_done]
            if not left:
                return
            for name in left:
                began = time.monotonic()
                until = min(deadline, began + TURN_SECONDS)
                if until > began:
                    turns[name](places[name], until)
                    places[name].seconds += time.monotonic() - began
                    write_json(path, {key: asdict(place) for key, place in places.items()})


def report(places: dict[str, Place]) -> str:
    """What was tried and found, as a table of Markdown."""
    lines = ["| piece | tried | of | seconds | findings |", "|---|---|---|---|---|"]
    for name, place in sorted(places.items()):
        found = sum(count for count, _ in place.findings.values())
        said = f"{found:,} of {len(place.findings)} kinds" if found else "none"
        cells = [name, f"{place.next:,}", f"{place.total:,}", f"{place.seconds:.0f}", said]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name, place in sorted(places.items()):
        for what, (count, first) in sorted(place.findings.items()):
            lines.append(f"- {name}: {what}: {count:,} times, first number {first}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--place", type=Path, required=True, help="the file that keeps the place")
    parser.add_argument("--report", action="store_true", help="only print what was found so far")
    parser.add_argument("only", nargs="*", help="pieces whose name begins so")
    chosen = parser.parse_args(argv)
    if not chosen.report:
        go_on(chosen.place, chosen.seconds, chosen.only)
    print(report(read_places(chosen.place)))


if __name__ == "__main__":
    main(sys.argv[1:])
