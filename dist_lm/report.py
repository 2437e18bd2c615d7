"""Draw a run's curves, or compare several.

Prints a table and draws training and validation loss against the step, from the runs' metrics.jsonl
alone; a run may still be going on.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field

from dist_lm.cli import Command, read_flags
from dist_lm.config import Section
from dist_lm.console import duration, shorten
from dist_lm.curves import draw_curves, run_names, trailing_means
from dist_lm.errors import CheckpointError, UserError, run_entry
from dist_lm.metrics import read_metrics

COLUMNS = (
    "run",
    "steps",
    "tokens",
    "tokens/s",
    "time",
    "data wait",
    "loss",
    "best val loss",
    "bits per byte",
)


class ReportFlags(Section):
    """Draw a run's curves, or compare several.

    Prints a table and draws training and validation loss against the step, from the runs'
    metrics.jsonl alone; a run may still be going on. The picture goes to RUN/loss.png, of several
    runs to comparison.png here.
    """

    run: tuple[str, ...] = Field(description="The folder of a run; several are compared.")
    output: str | None = Field(None, description="The picture to draw, a PNG.")


REPORT = Command(
    "python -m dist_lm.report RUN [RUN ...] [--output PNG]", ReportFlags, positional="run"
)


def main(argv: list[str]) -> None:
    flags = read_flags(argv, REPORT)
    rows: list[Sequence[str]] = [COLUMNS]
    for name, run in zip(run_names(flags.run), flags.run, strict=True):
        rows.append(summary(name, run))
    print_table(rows)
    png = where_to_draw(flags)
    try:
        draw_curves(flags.run, png)
    except OSError as error:
        raise UserError(
            f"--output {png}: {error.strerror}; rule: a file that can be written"
        ) from error
    print(f"drawn: {png}")


def where_to_draw(flags: ReportFlags) -> Path:
    if flags.output:
        return Path(flags.output)
    if len(flags.run) == 1:
        return Path(flags.run[0], "loss.png")
    return Path("comparison.png")


def summary(name: str, run_dir: str) -> tuple[str, ...]:
    """A run's row of the table.

    `time` is what its steps took. `loss` is the mean of its last losses.
    """
    steps, evaluations = read_metrics(run_dir)
    if not steps:
        raise CheckpointError(f"{run_dir}: metrics.jsonl has no whole line of a step yet")
    rate = statistics.median(step["tokens_per_second"] for step in steps)
    data_wait = statistics.fmean(step.get("data_wait", 0.0) for step in steps)
    loss = trailing_means([step["loss"] for step in steps])[-1]
    best_loss = "-"
    bits_per_byte = "-"
    if evaluations:
        best = min(evaluations, key=lambda evaluation: float(evaluation["val_loss"]))
        best_loss = f"{best['val_loss']:.4f} at {best['step']}"
        bits_per_byte = f"{best['val_bits_per_byte']:.4f}"
    return (
        name,
        str(steps[-1]["step"]),
        shorten(steps[-1]["tokens"]),
        shorten(rate),
        duration(seconds_of(steps)),
        f"{data_wait:.1%}",
        f"{loss:.4f}",
        best_loss,
        bits_per_byte,
    )


def seconds_of(steps: Sequence[Mapping[str, Any]]) -> float:
    """What the steps took: each one's tokens at its own rate."""
    tokens = [0.0, *(step["tokens"] for step in steps)]
    seconds = 0.0
    for (before, after), step in zip(pairwise(tokens), steps, strict=True):
        seconds += (after - before) / step["tokens_per_second"]
    return seconds


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest cell; the first one is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        print("  ".join(cells))


if __name__ == "__main__":
    run_entry(main)
