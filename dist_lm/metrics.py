"""A run's figures: metrics.jsonl, the console, trackers, and curves drawn from them.

Invariants: metrics.jsonl has one line for every step and every evaluation, unrounded and valid JSON (what is not finite
is written as the string "nan", "inf" or "-inf"); a step trained again after a resume has a second line, and readers use
the last. Nothing here stops a run: a full disk, a closed terminal or a failing tracker costs one warning.
"""

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dist_lm.console import _is_terminal, _warn, duration, say, shorten
from dist_lm.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FILE = "metrics.jsonl"
# Between lines, redraws of a terminal's line, and calls of trackers (TensorBoard takes 0.2 ms each time).
PLAIN_SECONDS, TERMINAL_SECONDS, TRACK_SECONDS = 10.0, 0.1, 1.0
_MEAN_STEPS = 20  # steps that the rates on the console are averaged over
# Dense bf16 TFLOP/s from NVIDIA's data sheets (half of the figure "with sparsity"), by a pattern of the device's name.
_PEAK_TFLOPS = {
    r"\bB200\b": 2250,
    r"\bH[12]00 NVL\b": 835,
    r"\bH100 PCIe\b": 756,
    r"\bG?H[12]00\b": 989,
    r"\bA100\b": 312,
    r"\bL40S\b": 362,
    r"\bL4\b": 121,
    r"\bA10G\b": 70,
    r"RTX 4090$": 165,
    r"RTX 3090$": 71,
}


def peak_flops(device_name: str) -> float:
    """Dense bf16 FLOP/s of a device, which MFU is relative to in every precision; infinite where it is not known."""
    return next(
        (1e12 * peak for pattern, peak in _PEAK_TFLOPS.items() if re.search(pattern, device_name)),
        math.inf,
    )


class Metrics:
    """Takes the figures of each step and evaluation. Every rank may call it; only the main one records and prints."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        steps: int | None,
        flops_per_token: float,
        device: "torch.device",
        world_size: int,
        is_main: bool,
        track: Callable[[dict[str, float], int], None] | None = None,
    ):
        self.path, self.steps, self.is_main, self._track = (
            Path(run_dir, FILE),
            steps,
            is_main,
            track,
        )
        self._mfu_per_rate = 0.0  # MFU of one token/s, where the device's peak is known
        self._memory: Callable[[], int] | None = None
        if device.type == "cuda":
            from torch import cuda  # here, because report draws curves without waiting for torch

            self._mfu_per_rate = flops_per_token / (
                peak_flops(cuda.get_device_name(device)) * world_size
            )
            self._memory = lambda: cuda.max_memory_allocated(device)
        self._born = time.monotonic()
        self._file: BinaryIO | None = (
            None  # opened at the first line: a run that does nothing leaves no history
        )
        self._line_is_torn = self._warned_of_file = False
        self._terminal = _is_terminal()
        self._clear = "\r\x1b[K" if self._terminal else ""  # the progress line makes way
        self._printed_at = self._tracked_at = -math.inf
        self._seconds_between_lines = TERMINAL_SECONDS if self._terminal else PLAIN_SECONDS
        self._done = 0  # steps in this process
        self._printed_step = 0
        self._first_done_at = self._paused_seconds = 0.0
        self._seconds_per_token = self._data_wait = 0.0  # averages
        self._last: dict[str, Any] = {}

    def step(
        self,
        *,
        step: int,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens: int,
        tokens_per_second: float,
        data_wait: float,
        **extra: Any,
    ) -> None:
        """Record update `step` (from 1); `data_wait` is the share of its time spent waiting for data."""
        if not self.is_main:
            return
        now = time.monotonic()
        figures = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "tokens_per_second": tokens_per_second,
            "data_wait": data_wait,
            **extra,
        }
        if self._mfu_per_rate:
            figures["mfu"] = tokens_per_second * self._mfu_per_rate
        if self._memory:
            figures["memory_gb"] = self._memory() / 1e9
        self._write(figures)

        self._done += 1
        if self._done == 1:
            self._first_done_at = now
        weight = 1 / min(self._done, _MEAN_STEPS)
        self._seconds_per_token += weight * (
            1 / max(tokens_per_second, 1e-9) - self._seconds_per_token
        )
        self._data_wait += weight * (data_wait - self._data_wait)
        self._last = figures

        if (
            self._done == 1
            or step == self.steps
            or now - self._printed_at >= self._seconds_between_lines
        ):
            self._print_progress(now)
        if self._done == 1 or step == self.steps or now - self._tracked_at >= TRACK_SECONDS:
            self._tracked_at = now
            self._tell_trackers(figures)

    def evaluation(self, step: int, val_set: str, figures: Mapping[str, float]) -> None:
        """Record an evaluation after `step` updates, on a line of its own."""
        if not self.is_main:
            return
        self._write({"step": step, "val_set": val_set, **figures})
        say(
            f"{self._clear}step {step}  {val_set}: loss {figures['val_loss']:.4f}  perplexity"
            f" {figures['val_perplexity']:.2f}  bits per byte {figures['val_bits_per_byte']:.4f}"
        )
        self._tell_trackers(
            {"step": step, **{f"{val_set}/{key}": value for key, value in figures.items()}}
        )

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Surrounds what is not training (evaluating, saving): counted as lost time in goodput."""
        started = time.monotonic()
        yield
        self._paused_seconds += time.monotonic() - started

    def close(self) -> None:
        """Print the last step if it was not, and where the time since the start went (goodput: into steps)."""
        if not self.is_main or not self._done:
            return
        now = time.monotonic()
        if self._terminal or self._printed_step != self._last["step"]:
            self._print_progress(now, end="\n")
        total = now - self._born
        lost = (self._first_done_at - self._born) / total, self._paused_seconds / total
        say(
            f"{self._done} steps in {duration(total)}: goodput {1 - sum(lost):.0%}, up to the first step {lost[0]:.0%},"
            f" evaluating and saving {lost[1]:.0%}"
        )
        if self._file:
            self._file.close()

    # --- the file

    def _write(self, figures: Mapping[str, Any]) -> None:
        """One line by one unbuffered write (microseconds, no fsync); a line cut short by a full disk is left alone."""
        line = json.dumps({k: _json_number(v) for k, v in figures.items()}).encode() + b"\n"
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
                self._line_is_torn = self._file.tell() > 0 and _last_byte(self.path) != b"\n"
            data = b"\n" + line if self._line_is_torn else line
            self._line_is_torn = self._file.write(data) != len(data)
        except OSError as error:
            if not self._warned_of_file:
                _warn(f"{self.path} misses lines, the run goes on: {error.strerror}")
            self._line_is_torn = self._warned_of_file = True

    # --- trackers

    def _tell_trackers(self, figures: Mapping[str, Any]) -> None:
        if self._track is None:
            return
        values = {
            k: v
            for k, v in figures.items()
            if k != "step" and isinstance(v, (int, float)) and math.isfinite(v)
        }
        try:
            self._track(values, figures["step"])
        except Exception as error:  # whatever a tracker does must never stop a run
            self._track = None
            _warn(f"tracking is off, the run goes on: {type(error).__name__}: {error}")

    # --- the console

    def _print_progress(self, now: float, end: str | None = None) -> None:
        last = self._last
        self._printed_at, self._printed_step = now, last["step"]
        rate = 1 / self._seconds_per_token
        parts = [f"step {last['step']}" + (f"/{self.steps}" if self.steps else "")]
        if self.steps and self._done > 1:  # the first step's time says little about the others
            seconds_a_step = (now - self._first_done_at) / (
                self._done - 1
            )  # evaluations and saves included
            parts.append(f"eta {duration((self.steps - last['step']) * seconds_a_step)}")
        parts += [
            f"loss {last['loss']:.4f}",
            f"lr {last['lr']:.1e}",
            f"norm {last['grad_norm']:.3g}",
        ]
        parts.append(f"{shorten(rate)} tok/s")
        if self._mfu_per_rate:
            parts.append(f"mfu {rate * self._mfu_per_rate:.1%}")
        parts.append(f"wait {self._data_wait:.0%}")  # for data
        for name in [
            key.removeprefix("share_") for key in last if key.startswith("share_")
        ]:  # of a mixture
            passes = last[f"passes_{name}"]
            parts.append(
                f"{name} {last[f'share_{name}']:.1%} of {last[f'asked_{name}']:.1%}, pass {int(passes) + 1}"
            )
        text = "  ".join(parts)
        if self._terminal and len(text) >= (columns := shutil.get_terminal_size().columns):
            text = " ".join(parts)[: columns - 1]
        say(self._clear + text, end or ("" if self._terminal else "\n"))


def read_metrics(run_dir: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The steps and the evaluations of a run in order, the last line of each standing; torn lines are passed over."""
    path = Path(run_dir, FILE)
    steps, evaluations = {}, {}
    try:
        with open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(
                    ValueError, AttributeError
                ):  # torn by a kill or a full disk
                    figures = _numbers(json.loads(line))
                    if "val_loss" in figures:
                        evaluations[figures["step"], figures["val_set"]] = figures
                    elif "loss" in figures:
                        steps[figures["step"]] = figures
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}; rule: the folder of a run that made a step"
        ) from None
    return [steps[key] for key in sorted(steps)], [evaluations[key] for key in sorted(evaluations)]


def draw_curves(run_dirs: Sequence[str | Path], png: str | Path) -> None:
    """Training loss (raw and smoothed) and validation loss against the step, of one run or several by name."""
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # slow, and needed at the end of a run only
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
    for color, (name, run_dir) in enumerate(zip(run_names(run_dirs), run_dirs, strict=True)):
        steps, evaluations = read_metrics(run_dir)
        x, loss = [s["step"] for s in steps], [s["loss"] for s in steps]
        axes.plot(x, loss, color=f"C{color}", alpha=0.25, linewidth=0.6)
        axes.plot(
            x, smooth(loss), color=f"C{color}", linewidth=1.5, label=f"{name}: training, smoothed"
        )
        for val_set in sorted({e["val_set"] for e in evaluations}):
            points = [(e["step"], e["val_loss"]) for e in evaluations if e["val_set"] == val_set]
            axes.plot(
                *zip(*points, strict=True),
                "o--",
                color=f"C{color}",
                markersize=5,
                label=f"{name}: {val_set}",
            )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png, format="png", dpi=120)


def run_names(run_dirs: Sequence[str | Path]) -> list[str]:
    """Folder names, or whole paths where two runs have the same name."""
    names = [Path(run_dir).resolve().name for run_dir in run_dirs]
    return names if len(set(names)) == len(names) else [str(run_dir) for run_dir in run_dirs]


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential mean over about a fiftieth of the curve that starts unbiased and leaves out what is not finite."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    total = weight = 0.0
    smoothed = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


def _numbers(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in figures.items()}


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
