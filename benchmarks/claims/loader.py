"""Batches of prepared shards, against two other loaders."""

import re

import numpy as np
import torch
from torch import Tensor

from benchmarks.claim import FASTER, Claim, Context, Measured, Target, must_equal, take_turns
from benchmarks.gpu.data import write_random
from benchmarks.isolation import run_processes
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
        rows = [tokens[i : i + LENGTH + 1].astype(np.int64) for i in starts]
        x = torch.stack([torch.from_numpy(row[:-1]) for row in rows])
        y = torch.stack([torch.from_numpy(row[1:]) for row in rows])
        return x, y

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


def against_mosaic(ctx: Context) -> Measured:
    """Whole shuffled epochs of the same sequences, without workers on both sides."""
    rows = ctx.pick(8192, 3 * BATCH)
    epochs = ctx.pick(3, 1)
    shards = ctx.scratch / "shards"
    write_random(shards, ctx.pick(_VOCABULARY, 600), rows * LENGTH + 1)
    config = config_of(
        shards, shards / "tokenizer.json", ctx.scratch, data__stream=False, run__epochs=epochs
    )
    data = opened(config)
    assert data.alone and data.alone.sequences == rows
    np.save(ctx.scratch / "sequences.npy", data.alone.read(np.arange(rows)))
    number = iter(range(100))
    sums: dict[str, int] = {}

    def ours() -> None:
        batches = batches_of(config, data)
        for _ in range(epochs * rows // BATCH):
            batches.take()
        batches.close()

    def theirs() -> float:
        words = [str(ctx.scratch / "sequences.npy"), str(ctx.scratch / f"mosaic-{next(number)}")]
        words += [str(BATCH), str(epochs)]
        (output,) = run_processes(1, ["benchmarks/mosaic_epochs.py", *words])
        found = re.search(r"seconds (\S+) sum (\d+)", output)
        assert found, output
        sums["theirs"] = int(found[2])
        return float(found[1])

    ours()
    theirs()
    batches = batches_of(config, data)
    epoch = [batches.take() for _ in range(rows // BATCH)]
    batches.close()
    sums["ours"] = sum(int(batch.micros[0].tokens_BT.sum()) for batch in epoch)
    equal = must_equal(sums["ours"], sums["theirs"], "sums of an epoch's tokens")
    return take_turns(ctx, ours, theirs, equal, clock="cpu")


CLAIMS = (
    Claim(
        name="loader-windows",
        sentence="batches of prepared shards, against random windows one by one (T 1024)",
        figure=FASTER,
        target=Target(least=0.8),
        measure=against_windows,
        probe="copy",
    ),
    Claim(
        name="loader-mosaic",
        sentence="shuffled epochs of prepared shards, against mosaicml-streaming (T 1024)",
        figure=FASTER,
        target=Target(least=2.0),
        measure=against_mosaic,
        rounds=3,
        probe="copy",
        peers=("mosaicml-streaming",),
    ),
)
