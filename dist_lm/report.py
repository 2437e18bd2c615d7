"""Draw a run's curves, or compare several.

Prints tables and draws training and validation loss against the step, from the runs' metrics.jsonl
alone; or makes one HTML page of all that the run folders tell. A run may still be going on.
"""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field

from dist_lm.cli import Command, read_flags
from dist_lm.config import Section
from dist_lm.console import duration, notice, printable, shorten, warn
from dist_lm.curves import draw_curves, run_names, trailing_means
from dist_lm.errors import CheckpointError, UserError, run_entry
from dist_lm.evals import FILE as EVALS
from dist_lm.evals import primary, read_evals
from dist_lm.goodput import PARTS, goodput
from dist_lm.metrics import FILE, read_lines, steps_and_evaluations
from dist_lm.reporting.document import render, write_page
from dist_lm.reporting.facts import facts_of
from dist_lm.reporting.samples import FILE as SAMPLES

RELOAD_SECONDS = 20  # between two times that a page which follows a run loads itself again
FOLLOWED = (FILE, SAMPLES, EVALS)
_LONG_TO_READ = 2e7  # bytes; reading and working them out takes about 2 s
_SLOWEST = 1e-6  # tokens/s that a step is taken for; one without targets has none


class ReportFlags(Section):
    """Draw a run's curves, or compare several.

    Prints tables and draws training and validation loss against the step, from the runs'
    metrics.jsonl alone; a run may still be going on. The picture goes to RUN/loss.png, of several
    runs to comparison.png here.
    """

    run: tuple[str, ...] = Field(description="The folder of a run; several are compared.")
    output: str | None = Field(None, description="The picture to draw, a PNG.")
    as_json: bool = Field(
        False, alias="json", description="Print one JSON object instead of the table."
    )
    html: str | None = Field(None, description="The page to make, one HTML file.")
    price: float | None = Field(
        None, ge=0, le=1e6, description="Price of a device (GPU) for an hour, for the cost."
    )
    follow: bool = Field(
        False, description="Make the page again while the runs go on, until all are done or Ctrl-C."
    )


REPORT = Command(
    "python -m dist_lm.report RUN [RUN ...] [--output PNG] [--json] [--price PRICE]"
    " [--html FILE [--follow]]",
    ReportFlags,
    positional="run",
)


def main(argv: list[str]) -> None:
    flags = read_flags(argv, REPORT)
    if flags.follow and not flags.html:
        raise UserError("--follow: needs a page to make; rule: --html FILE --follow")
    runs = []
    facts = []
    for name, run in zip(run_names(flags.run), flags.run, strict=True):
        lines = lines_of(run)
        runs.append(summary(name, lines, flags.price) | {"evals": read_evals(run)})
        if flags.html:
            facts.append(facts_of(name, run, lines))
    made = {}
    if flags.html:
        made["page"] = flags.html
        seconds = RELOAD_SECONDS if flags.follow and not are_done(facts) else 0
        page = render(facts, price=flags.price, reload_seconds=seconds)
        write_page(Path(flags.html), page)
    if flags.output or not flags.html:
        made["picture"] = str(draw(flags))
    if flags.as_json:
        print(json.dumps({"runs": runs, **made}, indent=1))
    else:
        print_table([tuple(COLUMNS), *(spell(run) for run in runs)])
        print_goodput(runs, flags.price)
        print_evals(runs)
        for path in made.values():
            print(f"drawn: {path}")
    if flags.follow:
        follow(flags, facts)


def lines_of(run_dir: str) -> list[dict[str, Any]]:
    """All lines of a run, of which one at least is a step's."""
    with contextlib.suppress(OSError):  # which reading tells
        size = Path(run_dir, FILE).stat().st_size
        if size > _LONG_TO_READ:
            notice(f"{run_dir}: reading {size / 1e6:,.0f} MB of steps")
    lines = list(read_lines(run_dir, warn))
    if not any("loss" in line and "event" not in line for line in lines):
        raise CheckpointError(f"{run_dir}: metrics.jsonl has no whole line of a step yet")
    return lines


def draw(flags: ReportFlags) -> Path:
    png = where_to_draw(flags)
    try:
        draw_curves(flags.run, png)
    except OSError as error:
        raise UserError(
            f"--output {png}: {error.strerror}; rule: a file that can be written"
        ) from error
    return png


# --- the page of runs that go on


def follow(flags: ReportFlags, facts: list[dict[str, Any]]) -> None:
    """Make the page again when a run has written more, until all runs are done.

    The last page no longer loads itself again. Ctrl-C leaves the newest one.
    """
    assert flags.html
    names = run_names(flags.run)
    seen = [marks_of(run) for run in flags.run]
    notice(f"{flags.html}: follows the runs until they are done; Ctrl-C ends that")
    while not are_done(facts):
        time.sleep(RELOAD_SECONDS / 2)
        now = [marks_of(run) for run in flags.run]
        if now == seen:
            continue
        for number, (name, run) in enumerate(zip(names, flags.run, strict=True)):
            if now[number] != seen[number]:
                facts[number] = facts_of(name, run, lines_of(run))
        seen = now
        seconds = 0 if are_done(facts) else RELOAD_SECONDS
        write_page(Path(flags.html), render(facts, price=flags.price, reload_seconds=seconds))


def marks_of(run_dir: str) -> list[tuple[int, int]]:
    """Size and time of the files that a page shows and that grow."""
    marks = []
    for name in FOLLOWED:
        try:
            status = Path(run_dir, name).stat()
        except OSError:
            continue
        marks.append((status.st_size, status.st_mtime_ns))
    return marks


def are_done(facts: Sequence[Mapping[str, Any]]) -> bool:
    return all(run["state"] == "done" for run in facts)


def where_to_draw(flags: ReportFlags) -> Path:
    if flags.output:
        return Path(flags.output)
    if len(flags.run) == 1:
        return Path(flags.run[0], "loss.png")
    return Path("comparison.png")


# The columns of the table, and how each is made of a run's figures.
COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "run": lambda run: str(run["run"]),
    "steps": lambda run: str(run["steps"]),
    "tokens": lambda run: shorten(run["tokens"]),
    "tokens/s": lambda run: shorten(run["tokens_per_second"]),
    "time": lambda run: duration(run["seconds"]),
    "data wait": lambda run: f"{run['data_wait']:.1%}",
    "loss": lambda run: f"{run['loss']:.4f}",
    "best val loss": lambda run: spell_best(run["best"], "{val_loss:.4f} at {step}"),
    "bits per byte": lambda run: spell_best(run["best"], "{val_bits_per_byte:.4f}"),
}


def spell(run: Mapping[str, Any]) -> tuple[str, ...]:
    """A run's row of the table."""
    return tuple(column(run) for column in COLUMNS.values())


def spell_best(best: Mapping[str, Any] | None, text: str) -> str:
    return text.format(**best) if best else "-"


def summary(
    name: str, lines: Sequence[dict[str, Any]], price: float | None = None
) -> dict[str, Any]:
    """A run's figures, from its lines.

    `seconds` is what its steps took. `loss` is the mean of its last losses. `best` is the best
    evaluation of the set that decides: the first one of each evaluation. `cost` is the price of its
    device hours, which are known of runs that note their starts.
    """
    steps, evaluations = steps_and_evaluations(lines)
    where_time_went = goodput(lines)
    cost = None
    if where_time_went and price is not None:
        cost = price * where_time_went["device_hours"]
    deciding = [
        figures for figures in evaluations if figures["val_set"] == evaluations[0]["val_set"]
    ]
    return {
        "run": name,
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps),
        "seconds": seconds_of(steps),
        "data_wait": statistics.fmean(step.get("data_wait", 0.0) for step in steps),
        "loss": trailing_means([step["loss"] for step in steps])[-1],
        "best": min(deciding, key=lambda figures: float(figures["val_loss"]), default=None),
        "goodput": where_time_went,
        "cost": cost,
    }


def seconds_of(steps: Sequence[Mapping[str, Any]]) -> float:
    """The seconds that the steps took: each one's tokens at its own rate."""
    tokens = [0.0, *(step["tokens"] for step in steps)]
    seconds = 0.0
    for (before, after), step in zip(pairwise(tokens), steps, strict=True):
        seconds += (after - before) / max(step["tokens_per_second"], _SLOWEST)
    return seconds


def print_goodput(runs: Sequence[Mapping[str, Any]], price: float | None = None) -> None:
    """Print where the time of the runs and their restarts went, why they stopped, their spikes."""
    told = [run for run in runs if run["goodput"]]
    if not told:
        return
    rows = [("run", "starts", "time", *PARTS)]
    for run in told:
        seconds = run["goodput"]["seconds"]
        total = sum(seconds.values())
        parts = [f"{seconds[part] / max(total, 1e-9):.1%}" for part in PARTS]
        rows.append((run["run"], str(run["goodput"]["starts"]), duration(total), *parts))
    print()
    print_table(rows)
    for run in told:
        if price is not None:
            hours = run["goodput"]["device_hours"]
            print(f"{run['run']} took {hours:,.2f} device hours at {price:g}: {run['cost']:,.2f}")
    for run in told:
        for cause, times in run["goodput"]["stops"].items():
            print(f"{run['run']} stopped {times} x {printable(cause)}")
        for spike in run["goodput"]["spikes"]:
            print(f"{run['run']} {printable(spike)}")


def print_evals(runs: Sequence[Mapping[str, Any]]) -> None:
    """What lm-eval measured of each run: the first metric of each task, a row for each step."""
    for run in runs:
        tasks = list(dict.fromkeys(line["task"] for line in run["evals"]))
        if not tasks:
            continue
        by_step: dict[int, dict[str, str]] = {}
        for line in run["evals"]:
            metric = primary(line)
            if metric:
                name, value = metric
                by_step.setdefault(line["step"], {})[line["task"]] = f"{name} {value:.4f}"
        print()
        rows = [(f"{run['run']} step", *tasks)]
        for step, cells in by_step.items():
            rows.append((str(step), *(cells.get(task, "-") for task in tasks)))
        print_table(rows)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest cell; the first one is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        print(printable("  ".join(cells)))


if __name__ == "__main__":
    run_entry(main)
