"""C10: in a step of the real loop the CPU never waits for the card."""

import contextlib
import traceback
import warnings
from collections import Counter

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.drive import Enough, config_of, drive, gpt2_settings
from dist_lm.resume import Run

WARM_UP = 3  # steps; the first ones allocate, and ask for the kernels' plans
STEPS = 5


def no_host_sync(ctx: Context) -> None:
    """First collect every place that synchronises; then let torch raise at the first one.

    The first run is not compiled, so that a warning names a line.
    """
    places = collect_places(ctx)
    for place, times in places.most_common(10):
        ctx.measure(f"synchronises: {place}", times, f"times in {STEPS} steps")
    ctx.check("host syncs in a step", sum(places.values()) / STEPS, 0.0)
    refusal = first_refusal(ctx)
    ctx.require(f"{STEPS} steps under torch's error mode", not refusal, refusal or "no sync")


def set_mode(ctx: Context, mode: str) -> None:
    if not ctx.is_dry:
        torch.cuda.set_sync_debug_mode(mode)


def collect_places(ctx: Context) -> Counter[str]:
    """How often each line synchronised, in the steps after the warm-up."""
    places: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def after_step(run: Run, step: int) -> None:
            if step == WARM_UP:
                caught.clear()
                set_mode(ctx, "warn")
            if step == WARM_UP + STEPS:
                set_mode(ctx, "default")
                raise Enough("all was seen")

        with contextlib.ExitStack() as stack:
            stack.callback(set_mode, ctx, "default")
            drive(config_of(settings_of(ctx, "warn", is_compiled=False)), after_step)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            places[f"{short(warning.filename)}:{warning.lineno}"] += 1
    return places


def first_refusal(ctx: Context) -> str:
    """Where torch refused to synchronise, or nothing."""

    def after_step(run: Run, step: int) -> None:
        if step == WARM_UP:
            set_mode(ctx, "error")
        if step == WARM_UP + STEPS:
            set_mode(ctx, "default")
            raise Enough("all was seen")

    try:
        drive(config_of(settings_of(ctx, "error", is_compiled=not ctx.is_dry)), after_step)
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        return " < ".join(f"{short(f.filename)}:{f.lineno}" for f in reversed(frames[-4:]))
    finally:
        set_mode(ctx, "default")
    return ""


def settings_of(ctx: Context, name: str, is_compiled: bool) -> dict[str, object]:
    rows = 2 if ctx.is_dry else 8
    return gpt2_settings(
        ctx,
        "124m",
        data__global_batch=2 * rows,
        data__micro_batch=rows,
        run__compile=is_compiled,
        run__dir=str(ctx.folder / name),
    )


def short(path: str) -> str:
    """The last two parts of a path."""
    return "/".join(path.split("/")[-2:])
