"""From the command to the first step, against a bare script with Accelerate.

The bare script has no checks, no resuming and no metrics. Ranks are started directly on both sides:
what a launcher takes comes on top of both alike.
"""

import re
import time
from pathlib import Path

import numpy as np

from benchmarks.claim import COST, Claim, Context, Measured, Target, must_be_near, take_turns
from benchmarks.isolation import run_processes
from benchmarks.loops import make_shards
from dist_lm.metrics import read_metrics

_SIZE = (4, 4, 128, 2048, 64, 8)  # layers, heads, width, vocabulary, length, batch
_QUICK = (1, 2, 32, 512, 16, 4)


def measure(ctx: Context, world: int) -> Measured:
    size = ctx.pick(_SIZE, _QUICK)
    layers, heads, width, vocabulary, length, batch = size
    shards = make_shards(ctx.scratch / "shards", vocabulary, 200_000)
    tokens = np.random.default_rng(1).integers(vocabulary, size=200_000).astype(np.uint16)
    np.save(ctx.scratch / "tokens.npy", tokens)
    losses: dict[str, float] = {}
    number = iter(range(100))

    def ours() -> float:
        folder = ctx.scratch / f"run-{next(number)}"
        flags = {
            "model.layers": layers,
            "model.heads": heads,
            "model.width": width,
            "model.positions": "learned",
            "model.norm": "layernorm",
            "model.activation": "gelu_tanh",
            "model.bias": "true",
            "data.input": shards,
            "data.seq_len": length,
            "data.global_batch": batch,
            "run.dir": folder,
            "run.steps": 1,
            "run.eval_every": 0,
        }
        words = ["dist_lm/train.py", "--run.trackers"]
        for name, value in flags.items():
            words += [f"--{name}", str(value)]
        began = time.time()
        run_processes(world, words, is_forked=ctx.is_quick)
        losses["ours"] = read_metrics(folder)[0][0]["loss"]
        return _first_step_at(folder) - began

    def bare() -> float:
        words = ["benchmarks/bare_accelerate.py", str(ctx.scratch / "tokens.npy")]
        words += [str(part) for part in size]
        began = time.time()
        output = run_processes(world, words, is_forked=ctx.is_quick)[0]
        found = re.search(r"first step: loss (\S+) at (\S+)", output)
        assert found, output
        losses["bare"] = float(found[1])
        return float(found[2]) - began

    first = ours(), bare()
    # Other random weights and tokens; both are near the logarithm of the vocabulary.
    equal = must_be_near(losses["ours"], losses["bare"], "first losses", within=0.05)
    if ctx.is_quick:
        return Measured([first[0]], [first[1]], equal)
    measured = take_turns(ctx, ours, bare, equal)
    measured.notes["ours, s"] = round(float(np.median(measured.ours)), 2)
    return measured


def _first_step_at(folder: Path) -> float:
    """When the figures of the first step were written: the last line before the checkpoint."""
    return (folder / "metrics.jsonl").stat().st_mtime


CLAIMS = (
    Claim(
        name="start-1",
        sentence="from the command to the first step, against a bare Accelerate script",
        figure=COST,
        target=Target(most=0.9),
        measure=lambda ctx: measure(ctx, 1),
        threads=2,
        rounds=3,
    ),
    Claim(
        name="start-2",
        sentence="the same to the first step of two processes, against a bare Accelerate script",
        figure=COST,
        target=Target(most=1.0),
        measure=lambda ctx: measure(ctx, 2),
        threads=2,
        rounds=3,
    ),
)
