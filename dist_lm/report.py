"""Draw a run's curves, or compare several.

Prints tables and draws training and validation loss against the step, from the runs' metrics.jsonl
alone; a run may still be going on.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field

from dist_lm.cli import Command, read_flags
from dist_lm.config import Section
from dist_lm.console import duration, printable, shorten, warn
from dist_lm.curves import draw_curves, run_names, trailing_means
from dist_lm.errors import CheckpointError, UserError, run_entry
from dist_lm.goodput import PARTS, goodput
from dist_lm.metrics import read_lines, read_metrics

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


REPORT = Command(
    "python -m dist_lm.report RUN [RUN ...] [--output PNG] [--json]", ReportFlags, positional="run"
)


def main(argv: list[str]) -> None:
    flags = read_flags(argv, REPORT)
    runs = []
    for name, run in zip(run_names(flags.run), flags.run, strict=True):
        runs.append(summary(name, run))
    png = where_to_draw(flags)
    try:
        draw_curves(flags.run, png)
    except OSError as error:
        raise UserError(
            f"--output {png}: {error.strerror}; rule: a file that can be written"
        ) from error
    if flags.as_json:
        print(json.dumps({"runs": runs, "picture": str(png)}, indent=1))
        return
    print_table([tuple(COLUMNS), *(spell(run) for run in runs)])
    print_goodput(runs)
    print(f"drawn: {png}")


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


def summary(name: str, run_dir: str) -> dict[str, Any]:
    """A run's figures.

    `seconds` is what its steps took. `loss` is the mean of its last losses. `best` is the best
    evaluation of the set that decides: the first one of each evaluation.
    """
    steps, evaluations = read_metrics(run_dir, warn)
    if not steps:
        raise CheckpointError(f"{run_dir}: metrics.jsonl has no whole line of a step yet")
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
        "goodput": goodput(read_lines(run_dir)),
    }


def seconds_of(steps: Sequence[Mapping[str, Any]]) -> float:
    """The seconds that the steps took: each one's tokens at its own rate."""
    tokens = [0.0, *(step["tokens"] for step in steps)]
    seconds = 0.0
    for (before, after), step in zip(pairwise(tokens), steps, strict=True):
        seconds += (after - before) / max(step["tokens_per_second"], _SLOWEST)
    return seconds


def print_goodput(runs: Sequence[Mapping[str, Any]]) -> None:
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
        for cause, times in run["goodput"]["stops"].items():
            print(f"{run['run']} stopped {times} x {printable(cause)}")
        for spike in run["goodput"]["spikes"]:
            print(f"{run['run']} {printable(spike)}")


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
