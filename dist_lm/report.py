"""Draw a run's curves, or compare several: `python -m dist_lm.report RUN [RUN ...] [--output PNG]`.

Prints a table and draws training and validation loss against the step, from the runs' metrics.jsonl alone; a run may
still be going on. The picture goes to RUN/loss.png, of several runs to comparison.png here.
"""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from dist_lm.cli import FlagParser
from dist_lm.console import duration, shorten
from dist_lm.errors import CheckpointError, UserError, run_entry
from dist_lm.metrics import draw_curves, read_metrics, run_names, smooth

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


def main(argv: list[str]) -> None:
    parser = FlagParser("python -m dist_lm.report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="The folder of a run.")
    parser.add_argument("--output", metavar="PNG", help="The picture to draw.")
    given = parser.read(argv)
    runs = given.runs
    print_table(
        [COLUMNS, *(summary(name, run) for name, run in zip(run_names(runs), runs, strict=True))]
    )
    png = Path(given.output or (Path(runs[0], "loss.png") if len(runs) == 1 else "comparison.png"))
    try:
        draw_curves(runs, png)
    except OSError as error:
        raise UserError(
            f"--output {png}: {error.strerror}; rule: a file that can be written"
        ) from error
    print(f"drawn: {png}")


def summary(name: str, run_dir: str) -> tuple[str, ...]:
    """A run's row of the table; `time` is what its steps took, `loss` the end of the smoothed training curve."""
    steps, evaluations = read_metrics(run_dir)
    if not steps:
        raise CheckpointError(f"{run_dir}: metrics.jsonl has no whole line of a step yet")
    tokens = [0.0, *(s["tokens"] for s in steps)]
    seconds = sum(
        (b - a) / s["tokens_per_second"] for (a, b), s in zip(pairwise(tokens), steps, strict=True)
    )
    rate = statistics.median(s["tokens_per_second"] for s in steps)
    data_wait = statistics.fmean(s.get("data_wait", 0.0) for s in steps)
    loss = smooth([s["loss"] for s in steps])[-1]
    row = (
        name,
        str(steps[-1]["step"]),
        shorten(tokens[-1]),
        shorten(rate),
        duration(seconds),
        f"{data_wait:.1%}",
    )
    if not evaluations:
        return (*row, f"{loss:.4f}", "-", "-")
    best = min(evaluations, key=lambda e: e["val_loss"])
    return (
        *row,
        f"{loss:.4f}",
        f"{best['val_loss']:.4f} at {best['step']}",
        f"{best['val_bits_per_byte']:.4f}",
    )


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [
            first.ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True)),
        ]
        print("  ".join(cells))


if __name__ == "__main__":
    run_entry(main)
