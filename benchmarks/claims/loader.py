"""Batches of prepared shards, against the loader of teaching code."""

import numpy as np
import torch
from torch import Tensor

from benchmarks.claim import FASTER, Claim, Context, Measured, Target, must_equal, take_turns
from benchmarks.gpu.data import write_random
from benchmarks.streams import BATCH, LENGTH, batches_of, config_of, opened

_VOCABULARY = 50_257


def against_windows(ctx: Context) -> Measured:
    """The loader of teaching code: random windows of a memory map, one by one."""
    steps = ctx.pick(300, 3)
    shards = ctx.scratch / "shards"
    write_random(shards, ctx.pick(_VOCABULARY, 600), ctx.pick(20_000_000, 100_000))
    config = config_of(shards, shards / "tokenizer.json", ctx.scratch, data__stream=False)
    data = opened(config)
    assert data.alone
    rng = np.random.default_rng(0)

    def ours() -> None:
        batches = batches_of(config, data)
        for _ in range(steps):
            batches.take()
        batches.close()

    def windows(tokens: np.ndarray) -> tuple[Tensor, Tensor]:
        starts = rng.integers(0, len(tokens) - LENGTH - 1, BATCH)
        x = torch.stack([row_of(tokens, start) for start in starts])
        y = torch.stack([row_of(tokens, start + 1) for start in starts])
        return x, y

    def row_of(tokens: np.ndarray, start: int) -> Tensor:
        return torch.from_numpy(tokens[start : start + LENGTH].astype(np.int64))

    with data.alone.shards.open_shard(0) as tokens:

        def theirs() -> None:
            for _ in range(steps):
                windows(tokens)

        batches = batches_of(config, data)
        micro = batches.take().micros[0]
        batches.close()
        found = [(part.shape, part.dtype) for part in (micro.tokens_BT, micro.targets_BT)]
        other = [(part.shape, part.dtype) for part in windows(tokens)]
        equal = must_equal(found, other, "shapes of batches")
        measured = take_turns(ctx, ours, theirs, equal, clock="cpu")
    rate = steps * BATCH * LENGTH / np.median(measured.ours) / 1e6
    measured.notes["ours, M tokens/s"] = round(float(rate))
    return measured


CLAIMS = (
    Claim(
        name="loader-windows",
        sentence="batches of prepared shards, against random windows one by one (T 1024)",
        figure=FASTER,
        target=Target(least=0.8),
        measure=against_windows,
        probe="copy",
        tried="left as it is: a step takes a thousand times as long as its batch",
    ),
)
