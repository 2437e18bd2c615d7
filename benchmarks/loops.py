"""train's loop in a process that a claim started, and a bare loop around the same model."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.data import write_random
from dist_lm import loop, resume
from dist_lm.cli import resolve
from dist_lm.config import Config
from dist_lm.data.batches import Batch
from dist_lm.metrics import read_metrics
from dist_lm.resume import Run
from dist_lm.runtime.start import start

_FIRST = 2  # steps of a round that do not count


def make_shards(folder: Path, vocabulary: int, tokens: int) -> Path:
    """A prepared folder of random tokens."""
    write_random(folder, vocabulary, tokens)
    return folder


def build_run(folder: Path, strategy: str, settings: dict[str, Any]) -> Run:
    """A run that neither evaluates nor saves by itself, on this rank. All ranks."""
    config = resolve(
        (
            "benchmark",
            {
                "run.dir": str(folder),
                "run.trackers": [],
                "run.eval_every": 0,
                "run.save_every": 0,
                "run.steps": 1000,
                **settings,
            },
        )
    )
    runtime = start(config, strategy if strategy.startswith("zero") else None)
    runtime.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    point = resume.find_resume_point(runtime, config, [])
    assert point, f"{folder} is finished"
    return resume.build(runtime, config, point)


def train_to(run: Run, step: int) -> None:
    """train's loop up to a step, and the end of the checkpoint that it writes there."""
    settings = run.config.run.model_copy(update={"stop_after": step})
    run.config = Config(**{**run.config.__dict__, "run": settings})
    loop.train(run)
    run.saver.finish()


@dataclass
class BareLoop:
    """Forward, backward, clipping, update and the loss as a number, with the batches of the run."""

    run: Run
    targets: float  # of the global batch

    def step(self, batch: Batch) -> float:
        engine = self.run.runtime.engine
        (micro,) = batch.micros
        loss = engine.model(micro.tokens_BT, micro.targets_BT)
        scaled = loss / self.targets * self.run.runtime.world_size
        if engine.strategy.stage:
            engine.model.backward(scaled)
            engine.model.step()
        else:
            scaled.backward()
            clip = self.run.config.optim.clip
            torch.nn.utils.clip_grad_norm_(self.run.model.parameters(), clip, foreach=False)
            self.run.optimizer.step()
            self.run.optimizer.zero_grad()
        return loss.item()

    def steps(self, number: int, clock: Callable[[], float]) -> list[float]:
        """The clock after each step."""
        batches = loop.training_batches(self.run)
        times = []
        for _ in range(number):
            self.step(batches.take())
            times.append(clock())
        batches.close()
        return times


def loop_times(run: Run, number: int, clock: Callable[[], float]) -> list[float]:
    """The clock whenever train's loop has read the figures of a step."""
    times: list[float] = []
    record_step = loop.record_step

    def timed(run: Run, pending: loop.Pending) -> bool:
        is_stopping = record_step(run, pending)
        times.append(clock())
        return is_stopping

    loop.record_step = timed
    try:
        train_to(run, run.state.step + number)
    finally:
        loop.record_step = record_step
    return times


def compare_loops(run: Run, *, rounds: int, steps: int, clock: Callable[[], float]) -> Any:
    """The median step of both loops in each round, and the first loss of both. All ranks."""
    batches = loop.training_batches(run)
    batch = batches.take()
    batches.close()
    targets = float(run.runtime.sum(torch.tensor(float(batch.targets))))
    micro = batch.micros[0]
    with torch.no_grad():
        loss = run.runtime.engine.model(micro.tokens_BT, micro.targets_BT)
    first = float(run.runtime.sum(loss.detach().double())) / targets
    bare = BareLoop(run, targets)
    found: dict[str, Any] = {"ours": [], "other": []}
    for _ in range(rounds):
        found["ours"].append(_median_step(loop_times(run, steps, clock)))
        found["other"].append(_median_step(bare.steps(steps, clock)))
    if run.runtime.is_main:
        found["losses"] = [read_metrics(run.dir)[0][0]["loss"], first]
    return found


def _median_step(times: list[float]) -> float:
    seconds = []
    for before, after in zip(times[_FIRST - 1 :], times[_FIRST:], strict=False):
        seconds.append(after - before)
    return statistics.median(seconds)


CPU_CLOCK = time.process_time
WALL_CLOCK = time.perf_counter
