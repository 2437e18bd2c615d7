"""Pictures of runs: loss against the step, raw, smoothed and validated."""

import math
from collections.abc import Iterator, Sequence
from itertools import count, cycle
from pathlib import Path
from typing import IO, Any

from dist_lm.console import printable
from dist_lm.metrics import read_metrics

# Of the validation sets of a run, so that they can be told apart without colours.
MARKERS = "os^DvP*X"
# A smoothed curve averages over about this part of it to each side.
_WINDOWS = 50
_LONGEST_LABEL = 200  # characters


def draw_curves(run_dirs: Sequence[str | Path], png: str | Path | IO[bytes]) -> None:
    """Training loss (raw and smoothed) and validation loss against the step, of runs by name."""
    # Slow to import, and needed at the end of a run only.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
    colors = (f"C{number}" for number in count())  # matplotlib begins again after C9
    for name, run_dir in zip(run_names(run_dirs), run_dirs, strict=True):
        draw_run(axes, name, run_dir, colors)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png, format="png", dpi=120)


def draw_run(axes: Any, name: str, run_dir: str | Path, colors: Iterator[str]) -> None:
    """Each curve has a colour of its own, and each validation set a marker as well."""
    color = next(colors)
    steps, evaluations = read_metrics(run_dir)
    x = [figures["step"] for figures in steps]
    loss = [figures["loss"] for figures in steps]
    axes.plot(x, loss, color=color, alpha=0.25, linewidth=0.6)
    label = _plain(f"{name}: training, smoothed")
    axes.plot(x, smooth(loss), color=color, linewidth=1.5, label=label)
    val_sets = dict.fromkeys(figures["val_set"] for figures in evaluations)
    for val_set, marker in zip(val_sets, cycle(MARKERS), strict=False):
        of_set = [figures for figures in evaluations if figures["val_set"] == val_set]
        x = [figures["step"] for figures in of_set]
        loss = [figures["val_loss"] for figures in of_set]
        axes.plot(
            x,
            loss,
            linestyle="--",
            marker=marker,
            color=next(colors),
            markersize=5,
            label=_plain(f"{name}: {val_set}"),
        )


def _plain(label: str) -> str:
    """A label that is drawn as it is: no dollar begins a formula, and all characters are shown."""
    return printable(label[:_LONGEST_LABEL]).replace("$", r"\$")


def run_names(run_dirs: Sequence[str | Path]) -> list[str]:
    """Folder names, or whole paths where two runs have the same name."""
    names = [Path(run_dir).resolve().name for run_dir in run_dirs]
    if len(set(names)) < len(names):
        return [str(run_dir) for run_dir in run_dirs]
    return names


def smooth(values: Sequence[float]) -> list[float]:
    """The curve without its noise and without a lag: it neither leads nor trails its data.

    Each value is a mean over as many values on its left as on its right. Where the curve bends,
    such a mean lies on the inner side of the bend; so what it left over is smoothed too and added
    (Tukey's twicing). A value that is not finite is left out and repeats the one before it.
    """
    finite = [value for value in values if math.isfinite(value)]
    half = len(values) // _WINDOWS
    means = _centred_means(finite, half)
    left_over = [value - mean for value, mean in zip(finite, means, strict=True)]
    corrections = _centred_means(left_over, half)
    line = [mean + correction for mean, correction in zip(means, corrections, strict=True)]
    return _repeat_where_not_finite(line, values)


def _centred_means(values: Sequence[float], half: int) -> list[float]:
    """Means over `half` values on either side, over fewer near the ends, where there are fewer."""
    sums = [0.0]  # of the first 0, 1, 2 ... values
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        total = sums[i + reach + 1] - sums[i - reach]
        means.append(total / (2 * reach + 1))
    return means


def _repeat_where_not_finite(line: Sequence[float], values: Sequence[float]) -> list[float]:
    """The line over the finite values, drawn out over all of them."""
    remaining = iter(line)
    drawn_out = []
    last = math.nan
    for value in values:
        if math.isfinite(value):
            last = next(remaining)
        drawn_out.append(last)
    return drawn_out


def trailing_means(values: Sequence[float]) -> list[float]:
    """Exponential means over about the fiftieth of the curve that lies behind each value.

    They start unbiased and leave out what is not finite. The last one tells where a run stands;
    for a picture they lag behind.
    """
    keep = 1 - 1 / max(1.0, len(values) / _WINDOWS)
    total = 0.0
    weight = 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            total = keep * total + value
            weight = keep * weight + 1
        means.append(total / weight if weight else math.nan)
    return means
