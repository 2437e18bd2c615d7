"""Batches of prepared shards, against the loader of teaching code: random windows one by one."""

import numpy as np
import torch

from benchmarks.claim import FASTER, Claim, Context, Measured, Target, must_equal, take_turns
from benchmarks.gpu.data import write_random
from dist_lm.cli import resolve
from dist_lm.config import batch_layout
from dist_lm.data.batches import Batches
from dist_lm.data.dataset import open_dataset

_LENGTH = 1024
_BATCH = 16
_VOCABULARY = 50_257


def measure(ctx: Context) -> Measured:
    steps = ctx.pick(300, 3)
    shards = ctx.scratch / "shards"
    write_random(shards, ctx.pick(_VOCABULARY, 600), ctx.pick(20_000_000, 100_000))
    settings = {
        "data.input": str(shards),
        "data.seq_len": _LENGTH,
        "data.global_batch": _BATCH,
        "data.workers": 0,
        "run.dir": str(ctx.scratch),
    }
    config = resolve(("benchmark", settings))
    data = open_dataset(config, lambda work: work())
    assert data.alone
    tokens = data.alone.shards.read(np.arange(8), _LENGTH, _LENGTH)[:, :-1].reshape(-1)
    all_tokens = np.tile(tokens, 4)
    rng = np.random.default_rng(0)
    layout = batch_layout(config, 1)

    def batches() -> Batches:
        reader = data.open_reader(config.data)
        return Batches(reader, config.data, layout, torch.device("cpu"), eot=data.tokenizer.eot)

    def ours() -> None:
        reading = batches()
        for _ in range(steps):
            reading.take()
        reading.close()

    def windows() -> tuple[torch.Tensor, torch.Tensor]:
        starts = rng.integers(0, len(all_tokens) - _LENGTH - 1, _BATCH)
        rows = [all_tokens[i : i + _LENGTH + 1].astype(np.int64) for i in starts]
        x = torch.stack([torch.from_numpy(row[:-1]) for row in rows])
        y = torch.stack([torch.from_numpy(row[1:]) for row in rows])
        return x, y

    def theirs() -> None:
        for _ in range(steps):
            windows()

    reading = batches()
    micro = reading.take().micros[0]
    reading.close()
    x, y = windows()
    found = [(part.shape, part.dtype) for part in (micro.tokens_BT, micro.targets_BT)]
    equal = must_equal(found, [(x.shape, x.dtype), (y.shape, y.dtype)], "shapes of batches")
    measured = take_turns(ctx, ours, theirs, equal, clock="cpu")
    rate = steps * _BATCH * _LENGTH / np.median(measured.ours) / 1e6
    measured.notes["ours, M tokens/s"] = round(float(rate))
    return measured


CLAIMS = (
    Claim(
        name="loader",
        sentence="batches of prepared shards, against random windows one by one (T 1024)",
        figure=FASTER,
        target=Target(least=0.8),
        measure=measure,
        probe="copy",
    ),
)
