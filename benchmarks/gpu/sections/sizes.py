"""S2: the larger models alone: tokens a second, MFU, and the peak of memory against the plan."""

import time

from benchmarks.gpu.context import Context, Skip
from benchmarks.gpu.drive import DRY_SHAPE, SHAPES, Enough, config_of, drive, gpt2_settings
from benchmarks.gpu.timing import mfu, target_by_card
from dist_lm.config import Config
from dist_lm.model.init import flops_per_token
from dist_lm.planning.memory import memory
from dist_lm.resume import Run
from dist_lm.runtime.strategy import Strategy

VOCABULARY = 50_257
WARM_UP = 2  # steps
STEPS = 4
# Of the card's memory. The rest is for CUDA itself, for fragments, and for the checks that run
# beside the compiling.
ROOM = 0.85
MICRO_BATCHES = (32, 24, 16, 12, 8, 6, 4)
RECOMPUTING = (16, 8, 4, 2, 1)  # micro-batches, where none of those fits
TOKENS_A_STEP = 128 * 1024  # about; so that the update's share is that of a real run
TARGETS = {"H200": 0.55, "H100": 0.49}  # MFU of the largest model, by a part of the card's name


def m1558(ctx: Context) -> None:
    """The largest model. A card too small for it gets the next smaller one."""
    measure_largest(ctx, ["1558m", "774m", "350m", "124m"])


def m774(ctx: Context) -> None:
    measure_largest(ctx, ["774m"])


def m350(ctx: Context) -> None:
    measure_largest(ctx, ["350m"])


def measure_largest(ctx: Context, sizes: list[str]) -> None:
    """Measure the first of the sizes that fits."""
    for size in sizes:
        config = fitting(ctx, size)
        if config:
            measure_size(ctx, size, config)
            return
        ctx.measure(f"{size} does not fit into", ctx.card_bytes / 1e9, "GB")
    raise Skip(f"{sizes[-1]} does not fit into {ctx.card_bytes / 1e9:.0f} GB")


def fitting(ctx: Context, size: str) -> Config | None:
    """The recipe with the largest micro-batch that fits by the plan, recomputing if it must."""
    for recomputes, micro_batches in ((False, MICRO_BATCHES), (True, RECOMPUTING)):
        for micro in micro_batches:
            config = config_with(ctx, size, micro, recomputes)
            if ctx.is_dry or planned_peak(config) <= ROOM * ctx.card_bytes:
                return config
    return None


def config_with(ctx: Context, size: str, micro: int, recomputes: bool) -> Config:
    accumulation = max(1, TOKENS_A_STEP // (micro * 1024))
    if ctx.is_dry:
        micro = 2
        accumulation = 2
    settings = gpt2_settings(
        ctx,
        size,
        data__global_batch=micro * accumulation,
        data__micro_batch=micro,
        run__activation_checkpointing=recomputes,
    )
    return config_of(settings)


def planned_peak(config: Config) -> float:
    """What the plan says that one process holds at most, in bytes."""
    return memory(config, Strategy(), world=1, vocab_size=VOCABULARY, on_gpu=True).peak


def measure_size(ctx: Context, size: str, config: Config) -> None:
    steps = 2 if ctx.is_dry else STEPS
    times: list[float] = []
    vocabulary = [0]
    peak = [0]

    def after_step(run: Run, step: int) -> None:
        if step == WARM_UP:
            if ctx.is_warming:
                raise Enough("the compile cache is filled")
            ctx.sync()
            times.append(time.perf_counter())
        elif step == WARM_UP + steps:
            ctx.sync()
            times.append(time.perf_counter())
            vocabulary[0] = run.data.tokenizer.vocab_size
            peak[0] = ctx.peak_bytes()
            raise Enough("all was measured")

    drive(config, after_step)
    if ctx.is_warming:
        return
    tokens = steps * config.data.global_batch * config.data.seq_len
    rate = tokens / (times[1] - times[0])
    describe(ctx, size, config)
    ctx.measure(f"{size}", rate, "tokens/s")
    share = mfu(ctx, rate, flops_per_token(config.model_spec(vocabulary[0])))
    if share is not None:
        ctx.measure(f"{size}, MFU", share, at_least=target_of(ctx, size))
    planned = planned_peak(config)
    ctx.measure(f"{size}, peak memory planned", planned / 1e9, "GB")
    if peak[0]:
        ctx.measure(f"{size}, peak memory", peak[0] / 1e9, "GB")
        ctx.measure(f"{size}, peak over plan", peak[0] / planned, at_least=0.9, at_most=1.1)


def describe(ctx: Context, size: str, config: Config) -> None:
    micro = config.data.micro_batch or 0
    how = ", recomputing" if config.run.activation_checkpointing else ""
    accumulation = config.data.global_batch // micro
    layers, _, width = DRY_SHAPE if ctx.is_dry else SHAPES[size]
    ctx.measure(f"{size}", f"{layers} layers, {width} wide, {accumulation} x {micro}{how}")


def target_of(ctx: Context, size: str) -> float | None:
    if size != "1558m":
        return None
    return target_by_card(ctx, TARGETS)
