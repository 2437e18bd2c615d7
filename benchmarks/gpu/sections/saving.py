"""S5: how long training waits for a checkpoint: the copy to host memory, first and second.

The least that a checkpoint costs is one copy of weights and moments to pinned memory.
"""

import shutil
import time
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.drive import Enough, config_of, drive, gpt2_settings
from benchmarks.gpu.timing import seconds_of
from dist_lm.checkpoint.save import Saver
from dist_lm.resume import Run
from dist_lm.size import checkpoint_bytes

SAVES = 2
SIZES = ("774m", "350m", "124m")


def stall(ctx: Context) -> None:
    size = largest_that_fits(ctx)
    rows = 1  # what a step takes does not matter here
    config = config_of(
        gpt2_settings(
            ctx,
            size,
            data__global_batch=rows,
            data__micro_batch=rows,
            run__save_every=2,
            run__keep_last=1,
            run__compile=False,
        )
    )
    waits: list[float] = []
    state_bytes = [0]
    begin = Saver.begin

    def timed_begin(saver: Saver, *args: Any, **kwargs: Any) -> None:
        saver.finish()  # the checkpoint before; it is no part of this wait
        ctx.sync()
        began = time.perf_counter()
        begin(saver, *args, **kwargs)
        waits.append(time.perf_counter() - began)

    def after_step(run: Run, step: int) -> None:
        state_bytes[0] = checkpoint_bytes(config, run.data.tokenizer.vocab_size)
        if len(waits) == SAVES:
            raise Enough("all was measured")

    with mock.patch.object(Saver, "begin", timed_begin):
        drive(config, after_step)
    ctx.free()
    copy = pinned_copy(ctx, state_bytes[0])
    ctx.measure(f"{size}: weights and moments", state_bytes[0] / 1e9, "GB")
    ctx.measure("one copy to pinned memory", copy, "s")
    for number, wait in enumerate(waits, 1):
        ctx.measure(f"checkpoint {number}, training waits", wait, "s")
        ctx.measure(f"checkpoint {number}, wait over the copy", wait / copy, at_most=1.2)


def largest_that_fits(ctx: Context) -> str:
    """The largest model whose checkpoints fit on the disk, and training on the card."""
    if ctx.is_dry:
        return SIZES[0]
    disk = shutil.disk_usage(ctx.folder).free
    for size in SIZES[:-1]:
        config = config_of(gpt2_settings(ctx, size, data__global_batch=1))
        checkpoint = checkpoint_bytes(config, 50_257)
        # Three lie on the disk at most. Training holds gradients too, and activations.
        if 3.5 * checkpoint < disk and 4 / 3 * checkpoint + 8e9 < ctx.card_bytes:
            return size
    return SIZES[-1]


def pinned_copy(ctx: Context, size: int) -> float:
    """Seconds of one copy of as many bytes from the card to pinned memory, in pieces of 1 GB."""
    piece = min(size, 2**30)
    on_card = torch.zeros(piece, dtype=torch.uint8, device=ctx.device)
    on_host = torch.empty(piece, dtype=torch.uint8, pin_memory=not ctx.is_dry)

    def copy() -> None:
        on_host.copy_(on_card, non_blocking=True)

    copy()
    return seconds_of(ctx, copy, 3) * size / piece
