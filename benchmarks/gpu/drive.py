"""Runs the real training loop in this process, and looks at it after each step.

`drive` calls dist_lm/loop.py: run_to_end, so everything is there that a run has. Two functions are
replaced while it runs: the loop's `train`, to see the run, and the step of its Metrics, which is
called once a step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.gpu.context import Context
from benchmarks.gpu.runs import Settings
from dist_lm import loop
from dist_lm.cli import resolve
from dist_lm.config import Config
from dist_lm.errors import UserError
from dist_lm.metrics import Metrics
from dist_lm.outcome import Attempt
from dist_lm.resume import Run

GPT2: Settings = {
    "model.positions": "learned",
    "model.norm": "layernorm",
    "model.activation": "gelu_tanh",
    "model.bias": True,
}
SHAPES = {  # layers, heads, width
    "124m": (12, 12, 768),
    "350m": (24, 16, 1024),
    "774m": (36, 20, 1280),
    "1558m": (48, 25, 1600),
}
DRY_SHAPE = (1, 2, 32)


class Enough(UserError):
    """Ends a run from within: all was measured. No checkpoint is written."""


def gpt2_settings(ctx: Context, size: str, **changes: Any) -> Settings:
    """A GPT-2 as its recipe has it, on random tokens."""
    layers, heads, width = SHAPES[size]
    if ctx.is_dry:
        layers, heads, width = DRY_SHAPE
    settings: Settings = GPT2 | {
        "model.layers": layers,
        "model.heads": heads,
        "model.width": width,
        "data.input": str(ctx.random_tokens),
        "data.seq_len": 32 if ctx.is_dry else 1024,
        "optim.lr": 1e-4,
        "optim.warmup_steps": 0,
        "run.steps": 100_000,
        "run.eval_every": 0,
        "run.save_every": 0,
        "run.precision": "bf16",
        "run.compile": not ctx.is_dry,  # C3 traces; here it would cost a dry run too long
        "run.trackers": [],
        "run.dir": str(ctx.folder / f"run-{size}"),
    }
    for name, value in changes.items():
        settings[name.replace("__", ".")] = value
    return settings


def config_of(settings: Settings) -> Config:
    """The settings as a command line would give them."""
    return resolve(("benchmarks.gpu", settings))


def drive(config: Config, after_step: Callable[[Run, int], None]) -> None:
    """Train until `after_step` raises Enough. It is called with the run and the step's number."""
    with watched(after_step), suppress(Enough):
        loop.run_to_end(config, Attempt(Path(config.run.dir)))


@contextmanager
def watched(after_step: Callable[[Run, int], None]) -> Iterator[None]:
    """Inside, the training loop calls `after_step` once a step."""
    runs: list[Run] = []
    train = loop.train
    record = Metrics.step

    def see(run: Run) -> str:
        runs.append(run)
        return train(run)

    def record_and_look(metrics: Metrics, **figures: Any) -> None:
        record(metrics, **figures)
        after_step(runs[-1], figures["step"])

    with mock.patch.object(loop, "train", see), mock.patch.object(Metrics, "step", record_and_look):
        yield
