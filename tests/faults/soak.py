"""A long run of small steps: memory, open files, threads and the time of a step must stay flat.

    python -m tests.faults.soak --steps 20000

A run of a tiny model on characters saves every 50 steps and evaluates every 100. It is watched from
outside, as an administrator would. Printed is a table: of each figure its mean, and its slope over
10,000 steps with the 95 % confidence interval. The first tenth of the run is left out: caches fill.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from dist_lm.errors import PreemptedError
from dist_lm.metrics import read_metrics
from tests.conftest import TINY, text_of
from tests.procs import ROOT, clean_env

FLAGS = (
    "--model.layers 1 --model.width 16 --data.seq_len 16 --data.global_batch 4 --run.save_every 50"
    " --run.eval_every 100 --run.eval_batches 1 --data.tokenizer char --data.val_fraction 0.1"
)
PAUSE = 0.2  # seconds between two looks
BLOCKS = 20  # of equal length: neighbouring figures depend on each other, means of blocks hardly
T_QUANTILE = 2.101  # of 97.5 %, for a line through 20 points
PER = 10_000  # steps
TOKENS = 4 * 16  # of a step


@dataclass(frozen=True)
class Sample:
    """What a look at the process saw."""

    step: int
    rss_mb: float  # memory, files that it has mapped included
    private_mb: float  # memory that is in no file
    files: int
    threads: int
    cpu: float  # seconds so far


@dataclass(frozen=True)
class Slope:
    mean: float
    slope: float  # per step
    margin: float  # half of the 95 % confidence interval


def slope_of(points: Sequence[tuple[float, float]]) -> Slope:
    """The line through the means of blocks of (step, figure), in the order of steps."""
    size = len(points) / BLOCKS
    blocks = [points[round(n * size) : round((n + 1) * size)] for n in range(BLOCKS)]
    xs = [statistics.mean([x for x, _ in block]) for block in blocks]
    ys = [statistics.mean([y for _, y in block]) for block in blocks]
    line = statistics.linear_regression(xs, ys)
    errors = [y - (line.slope * x + line.intercept) for x, y in zip(xs, ys, strict=True)]
    middle = statistics.mean(xs)
    spread = sum((x - middle) ** 2 for x in xs)
    variance = sum(error**2 for error in errors) / (BLOCKS - 2)
    return Slope(statistics.mean(ys), line.slope, T_QUANTILE * (variance / spread) ** 0.5)


def start(folder: Path, steps: int) -> "subprocess.Popen[bytes]":
    """The run, whose folder is folder/run."""
    (folder / "text.txt").write_text(text_of(3000))
    flags = dict(zip(TINY[::2], TINY[1::2], strict=True))
    words = [*FLAGS.split(), "--run.steps", str(steps), "--run.dir", str(folder / "run")]
    words += ["--data.input", str(folder / "text.txt"), "--data.separator", "\\n\\n"]
    flags |= dict(zip(words[::2], words[1::2], strict=True))
    command = [sys.executable, "dist_lm/train.py"]
    for name, value in flags.items():
        command += [name, value]
    command += ["--run.trackers"]
    env = clean_env(OMP_NUM_THREADS="1")
    with open(folder / "printed", "wb") as printed:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=printed, stderr=printed)


def watch(process: "subprocess.Popen[bytes]", run: Path, seconds: float) -> list[Sample]:
    """Look at the process from its first step until it ends, or is told to after so long."""
    watched = psutil.Process(process.pid)
    samples = []
    end = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > end:
            process.terminate()
            break
        try:
            step = last_step(run)
            if step:
                samples.append(look(watched, step))
        except (psutil.Error, OSError, KeyError):  # it is about to end
            break
        time.sleep(PAUSE)
    process.wait()
    return samples


def last_step(run: Path) -> int:
    """The last step of metrics.jsonl, of which only the end is read."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return 0
    with open(file, "rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4096))
        whole_lines = stream.read().split(b"\n")[1:-1]
    return int(json.loads(whole_lines[-1])["step"]) if whole_lines else 0


def look(watched: psutil.Process, step: int) -> Sample:
    status = Path(f"/proc/{watched.pid}/status").read_text()
    kilobytes = {}
    for line in status.splitlines():
        if line.startswith(("VmRSS", "RssAnon")):
            name, value, _ = line.split()
            kilobytes[name] = int(value)
    times = watched.cpu_times()
    return Sample(
        step=step,
        rss_mb=kilobytes["VmRSS:"] / 1024,
        private_mb=kilobytes["RssAnon:"] / 1024,
        files=watched.num_fds(),
        threads=watched.num_threads(),
        cpu=times.user + times.system,
    )


def figures(run: Path, samples: Sequence[Sample]) -> dict[str, Slope]:
    """The slope of each figure, from where a tenth of the steps is made."""
    steps, _ = read_metrics(run)
    first = len(steps) / 10
    late = [sample for sample in samples if sample.step > first]
    result = {}
    for name in ("rss_mb", "private_mb", "files", "threads"):
        result[name] = slope_of([(one.step, getattr(one, name)) for one in late])
    cpu = []
    before = late[0]
    for one in late[1:]:
        if one.step > before.step:
            cpu.append((one.step, 1000 * (one.cpu - before.cpu) / (one.step - before.step)))
            before = one
    result["CPU ms a step, all included"] = slope_of(cpu)
    times = []
    for figures_of_step in steps[int(first) :]:
        milliseconds = 1000 * TOKENS / figures_of_step["tokens_per_second"]
        times.append((figures_of_step["step"], milliseconds))
    result["ms a step, saves and evaluations apart"] = slope_of(times)
    return result


def table(found: dict[str, Slope]) -> str:
    lines = [f"| figure | mean | slope per {PER:,} steps | 95 % interval |", "|---|---|---|---|"]
    for name, one in found.items():
        slope = one.slope * PER
        margin = one.margin * PER
        interval = f"{slope - margin:+.3f} to {slope + margin:+.3f}"
        lines.append(f"| {name} | {one.mean:.2f} | {slope:+.3f} | {interval} |")
    return "\n".join(lines)


def soak(folder: Path, steps: int, seconds: float) -> tuple[int, dict[str, Slope]]:
    """Run, watch, and fit the lines. Returns the steps that were made, too."""
    process = start(folder, steps)
    try:
        samples = watch(process, folder / "run", seconds)
    finally:
        process.kill()
        process.wait()
    printed = (folder / "printed").read_text()
    assert process.returncode in (0, PreemptedError.code), printed[-2000:]
    return last_step(folder / "run"), figures(folder / "run", samples)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=86_400, help="stop after so long")
    chosen = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dist_lm-soak-") as folder:
        steps, found = soak(Path(folder), chosen.steps, chosen.seconds)
    print(f"{steps:,} steps in {time.monotonic() - began:.0f} s\n")
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
