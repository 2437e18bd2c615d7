"""A run's figures: metrics.jsonl, written and read, and where else each figure goes.

Invariants: metrics.jsonl has one line for every step and every evaluation, unrounded and valid JSON
(what is not finite is written as the string "nan", "inf" or "-inf"); a step trained again after a
resume has a second line, and readers use the last. Lines with the key "event" say what else
happened to the run, and when. Nothing here stops a run: a full disk, a closed terminal or a failing
tracker costs one warning.
"""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from dist_lm.console import dispensable, say, warn
from dist_lm.disk import open_own
from dist_lm.errors import CheckpointError
from dist_lm.outside import CheckedModel, Count, Text, check, open_regular, parse_json
from dist_lm.progress_line import ProgressLine, RunClock

if TYPE_CHECKING:
    import torch

FILE = "metrics.jsonl"
LARGEST_FIGURE = 1e100
_LONGEST_LINE = 2**16  # bytes that are read at once
TRACK_SECONDS = 1.0  # between calls of trackers: TensorBoard takes 0.2 ms each time
# Dense bf16 TFLOP/s from NVIDIA's data sheets (half of the figure "with sparsity"), by a pattern of
# the device's name.
PEAK_TFLOPS = {
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
    """Dense bf16 FLOP/s of a device, which MFU is relative to in every precision.

    Infinite where it is not known.
    """
    for pattern, tflops in PEAK_TFLOPS.items():
        if re.search(pattern, device_name):
            return 1e12 * tflops
    return math.inf


class Metrics:
    """Takes the figures of each step and evaluation.

    Every rank may call it; only the main one records and prints.
    """

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
        self.steps = steps  # length of the run; None: the data says when it ends
        self.is_main = is_main
        self.device = DeviceFigures(device, flops_per_token, world_size)
        self.file = MetricsFile(Path(run_dir, FILE))
        self.clock = RunClock(steps, world_size)
        self.progress = ProgressLine(steps, self.device.mfu_per_rate)
        self.trackers = Trackers(track)

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
        """Record update `step` (from 1); `data_wait` is the share of its time spent waiting."""
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
            **self.device.read(tokens_per_second),
        }
        self.file.write(figures)
        self.clock.count_step(now, step, tokens)
        self.progress.take(figures)
        is_first_or_last = self.clock.steps == 1 or step == self.steps
        if is_first_or_last or self.progress.is_due(now):
            self.progress.show(now, self.clock)
        if is_first_or_last or self.trackers.are_due(now):
            self.trackers.tell_step(figures, now)

    def evaluation(self, step: int, val_set: str, figures: Mapping[str, float]) -> None:
        """Record an evaluation after `step` updates, on a line of its own."""
        if not self.is_main:
            return
        self.file.write({"step": step, "val_set": val_set, **figures})
        self.progress.say_between(
            f"step {step}  {val_set}: loss {figures['val_loss']:.4f}"
            f"  perplexity {figures['val_perplexity']:.2f}"
            f"  bits per byte {figures['val_bits_per_byte']:.4f}"
        )
        of_set = {f"{val_set}/{key}": value for key, value in figures.items()}
        self.trackers.tell({"step": step, **of_set})

    def event(self, name: str, step: int, **facts: Any) -> None:
        """Record that something happened to the run after `step` updates."""
        if self.is_main:
            self.file.write({"event": name, "step": step, **facts})

    @contextlib.contextmanager
    def pause(self, name: str, step: int) -> Iterator[None]:
        """Surrounds what is not training, and records how long it took.

        It is an "evaluation" or a "save" after `step` updates. Its line also says what this start
        has taken so far, and what it takes until the end of the run.
        """
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self.clock.paused_seconds += seconds
        self.event(name, step, seconds=seconds, **self.clock.taken(time.monotonic()))

    def close(self) -> None:
        """Print the last step if it was not printed, where the time since the start went, and what
        the start has taken.
        """
        if not self.is_main or not self.clock.steps:
            return
        now = time.monotonic()
        self.progress.end(now, self.clock)
        say(self.clock.summary(now))
        say(self.clock.spell_taken(now))
        self.file.close()


# --- the parts: the device, the file, the trackers


class DeviceFigures:
    """Figures of a GPU that a step has besides its own; of a CPU there are none."""

    def __init__(self, device: "torch.device", flops_per_token: float, world_size: int):
        self.mfu_per_rate = 0.0  # the MFU of one token/s; 0 where the device's peak is not known
        self._memory_bytes: Callable[[], int] | None = None  # most that was allocated
        if device.type == "cuda":
            from torch import cuda  # slow, and report draws curves without it

            peak = peak_flops(cuda.get_device_name(device))
            self.mfu_per_rate = flops_per_token / (peak * world_size)
            self._memory_bytes = lambda: cuda.max_memory_allocated(device)

    def read(self, tokens_per_second: float) -> dict[str, float]:
        figures = {}
        if self.mfu_per_rate:
            figures["mfu"] = tokens_per_second * self.mfu_per_rate
        if self._memory_bytes:
            figures["memory_gb"] = self._memory_bytes() / 1e9
        return figures


class MetricsFile:
    """metrics.jsonl, to which lines are appended. What cannot be written costs one warning."""

    def __init__(self, path: Path):
        self.path = path
        # Opened at the first line: a run that does nothing leaves no history.
        self.stream: IO[bytes] | None = None
        self._is_torn = False  # the file ends inside a line

    def write(self, figures: Mapping[str, Any]) -> None:
        """One line by one unbuffered write (microseconds, no fsync).

        A line that a full disk cut short is left alone, and the next one begins on a new line.
        """
        written = {key: _to_json(value) for key, value in figures.items()}
        data = json.dumps(written).encode() + b"\n"
        was_torn = self._is_torn
        self._is_torn = True  # unless all is written
        with dispensable(self.path):
            if self.stream is None:
                self.stream = open_own(self.path, "ab", buffering=0)
                was_torn = self.stream.tell() > 0 and _last_byte(self.path) != b"\n"
            if was_torn:
                data = b"\n" + data
            self._is_torn = self.stream.write(data) != len(data)

    def close(self) -> None:
        if self.stream:
            self.stream.close()


class Trackers:
    """TensorBoard and others, behind one function. Whatever it raises costs one warning."""

    def __init__(self, track: Callable[[dict[str, float], int], None] | None):
        self._track = track  # None: there are none, or they failed
        self._told_at = -math.inf

    def are_due(self, now: float) -> bool:
        return now - self._told_at >= TRACK_SECONDS

    def tell_step(self, figures: Mapping[str, Any], now: float) -> None:
        """Hand over a step's figures; those of the next steps can wait."""
        self._told_at = now
        self.tell(figures)

    def tell(self, figures: Mapping[str, Any]) -> None:
        """Hand over the figures that are finite numbers."""
        if self._track is None:
            return
        values = {}
        for key, value in figures.items():
            if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                values[key] = value
        try:
            self._track(values, figures["step"])
        except Exception as error:  # whatever a tracker does must never stop a run
            self._track = None
            warn(f"tracking is off, the run goes on: {type(error).__name__}: {error}")


# --- reading metrics.jsonl


def _finite_or_told(value: float) -> float:
    """A figure, whose sums and squares are numbers too, or one that is known to be none."""
    if math.isfinite(value) and abs(value) > LARGEST_FIGURE:
        raise ValueError(f"must be at most {LARGEST_FIGURE:g}")
    return value


Figure = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_finite_or_told)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]


class StepLine(CheckedModel):
    """The fields of a step's line that readers use."""

    step: Count
    loss: Figure
    tokens: Count
    tokens_per_second: float = Field(ge=0)
    data_wait: float = 0.0


class EventLine(CheckedModel):
    """The fields of an event's line that readers use. Each event has some of these."""

    event: Text
    step: Count = 0  # updates made
    time: Seconds = 0.0  # since 1970, by the clock of who wrote it
    began: Seconds = 0.0  # of a start: when the process began, since 1970
    attempt: Count = 0
    world_size: Count = 1  # of a start: processes that share the work
    strategy: Text = ""  # of a start: how they share it
    tokens: Count = 0  # of a start, and of a spike with `back`: trained on before it
    back: Count | None = None  # of a spike: the step to which the run went back
    done: Text = ""  # about a spike
    seconds: Seconds = 0.0  # how long it took
    kind: Text = Field("", alias="class")  # of a stop, as in outcome.json
    reason: Text = ""


class EvaluationLine(CheckedModel):
    """The fields of an evaluation's line that readers use."""

    step: Count
    val_set: Text
    val_loss: Figure
    val_bits_per_byte: Figure


def read_metrics(
    run_dir: str | Path, say: Callable[[str], None] = lambda text: None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The steps and the evaluations of a run in order.

    The last line of each stands. Of one step the validation sets are in the order of training,
    whose first one decides which checkpoint is the best.
    """
    return steps_and_evaluations(read_lines(run_dir, say))


def steps_and_evaluations(
    lines: Iterable[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same of lines that were read already."""
    steps = {}
    evaluations = {}
    for figures in lines:
        if "event" in figures:
            continue
        if "val_loss" in figures:
            evaluations[figures["step"], figures["val_set"]] = figures
        elif "loss" in figures:
            steps[figures["step"]] = figures
    steps_in_order = [steps[step] for step in sorted(steps)]
    evaluations_in_order = sorted(evaluations.values(), key=lambda figures: figures["step"])
    return steps_in_order, evaluations_in_order


def read_lines(
    run_dir: str | Path, say: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, Any]]:
    """All lines of a run as they were written.

    Lines that are broken, e.g. torn by a kill or a full disk, are passed over, and `say` is told
    their number.
    """
    path = Path(run_dir, FILE)
    broken = 0
    try:
        with open_regular(path) as file:
            while line := file.readline(_LONGEST_LINE):
                try:
                    yield _read_line(line)
                except CheckpointError:
                    broken += 1
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}; rule: the folder of a run that made a step"
        ) from None
    if broken:
        what = "line is broken and was" if broken == 1 else "lines are broken and were"
        say(f"{path}: {broken} {what} passed over")


def _read_line(line: bytes) -> dict[str, Any]:
    """The figures of a line as they were. Raises CheckpointError for a broken one."""
    content = parse_json(line, CheckpointError)
    if not isinstance(content, dict):
        raise CheckpointError("must be a JSON object")
    figures: dict[str, Any] = {}
    for key, value in content.items():
        figures[key] = float(value) if value in ("nan", "inf", "-inf") else value
    if "event" in figures:
        check(content, EventLine, CheckpointError)
    elif "val_loss" in figures:
        check(figures, EvaluationLine, CheckpointError)
    elif "loss" in figures:
        check(figures, StepLine, CheckpointError)
    return figures


def _to_json(value: Any) -> Any:
    """A figure as it is written: JSON has no numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
