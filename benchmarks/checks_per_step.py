"""What the checks of a training step cost, each timed by itself, as a share of the step.

    python -m benchmarks.checks_per_step

One process trains the size of the README's first command. The functions that only look whether
something is wrong are timed where the loop calls them. Figures are processor time, because a busy
machine makes waiting look like work; the timer's own cost is counted as a check's. torch has one
thread, because threads that wait for each other use processor time too.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dist_lm import loop
from dist_lm.cli import resolve
from dist_lm.config import DataConfig
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.prepared.sequences import TokenSequences
from dist_lm.outcome import Attempt
from dist_lm.resume import Run
from dist_lm.runtime.world import Runtime
from dist_lm.spikes import WINDOW

STEPS = 30
WARM_UP = 3
# Where each check stands, and what it looks for.
CHECKS: list[tuple[Any, str, str]] = [
    (loop, "judge_step", "spikes, and figures that are not finite"),
    (loop, "hashes_of_replicas", "weights that differ among replicas"),
    (loop, "refuse_corrupt_replicas", "the same, one step later"),
    (Runtime, "with_flags", "the lock, a refusal, a request to stop: flags of a sum"),
    (Runtime, "refuse_together", "a refusal of any rank"),
    (Runtime, "of_main", "a norm that differs among ranks"),
    (Runtime, "enter", "hangs: what a rank is about to do"),
    (Runtime, "note_own_seconds", "slow ranks"),
    (TokenSequences, "_refuse_unknown_ids", "token ids beyond the vocabulary"),
]


def measure(steps: int = STEPS) -> dict[str, float]:
    """Processor microseconds a step of each check, of all of them, and of the step itself."""
    torch.set_num_threads(1)
    spent: defaultdict[str, float] = defaultdict(float)
    ends: list[float] = []
    record_step = loop.record_step

    def timed_step(run: Run, pending: loop.Pending) -> bool:
        is_stopping = record_step(run, pending)
        ends.append(time.process_time())
        # The window is full, as it is in all but the first steps of a run.
        run.state.recent = [[6.0 + number / 100, 1.0 + number / 100] for number in range(WINDOW)]
        if len(ends) == WARM_UP:
            spent.clear()
        return is_stopping

    with tempfile.TemporaryDirectory() as folder, timed_checks(spent), patched(timed_step):
        train(Path(folder), WARM_UP + steps)
    figures = {}
    for _, name, what in CHECKS:
        figures[f"{name}: {what}"] = 1e6 * spent[name] / steps
    figures["all checks"] = sum(figures.values())
    step_times = [
        after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)
    ]
    figures["a step"] = 1e6 * statistics.median(step_times)
    return figures


@contextmanager
def timed_checks(spent: dict[str, float]) -> Iterator[None]:
    """Inside, each check adds its processor time to `spent`."""
    before = [(place, name, getattr(place, name)) for place, name, _ in CHECKS]
    for place, name, function in before:
        setattr(place, name, timed(function, name, spent))
    try:
        yield
    finally:
        for place, name, function in before:
            setattr(place, name, function)


def timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*given, **named)
        finally:
            spent[name] += time.thread_time() - began

    return call


@contextmanager
def patched(record_step: Callable[..., bool]) -> Iterator[None]:
    before = loop.record_step
    loop.record_step = record_step
    try:
        yield
    finally:
        loop.record_step = before


def train(folder: Path, steps: int) -> None:
    """A run of the README's first command, on shards that are prepared before."""
    shards = folder / "shards"
    prepare_dataset(DataConfig(), shards, 1, say=lambda text: None)
    settings = {
        "data.input": str(shards),
        "run.dir": str(folder / "run"),
        "run.steps": steps + 1,  # the last one is recorded with the end
        "run.eval_every": 0,
        "run.save_every": 0,
    }
    config = resolve(("benchmark", settings))
    loop.run_to_end(config, Attempt(Path(config.run.dir)))


def main() -> None:
    figures = measure()
    step = figures["a step"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | microseconds a step | share |\n|---|---|---|")
    for name, microseconds in figures.items():
        print(f"| {name} | {microseconds:,.1f} | {microseconds / step:.3%} |")


if __name__ == "__main__":
    main()
