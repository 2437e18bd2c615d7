"""Memory: while ZeRO-3 builds a model, and what `plan` predicts of training."""

import math
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.claim import SIZE, Claim, Context, Measured, Target, must_equal
from benchmarks.isolation import ZERO_MODULES, run_ranks
from benchmarks.loops import build_run, make_shards, train_to
from benchmarks.memory import forget_peak, resident
from dist_lm import loop
from dist_lm.cli import resolve
from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.model.gpt import GPT
from dist_lm.model.init import parameter_shapes
from dist_lm.planning.memory import memory
from dist_lm.resume import Run
from dist_lm.runtime import zero
from dist_lm.runtime.start import start
from dist_lm.runtime.strategy import choose_strategy

_BUILT = ModelConfig(layers=24, heads=16, width=1024)
_BUILT_QUICK = ModelConfig(layers=2, heads=2, width=64)
_RANKS = 4
_IDLE = (1, 32, 32)  # layers, width, tokens
_TRAINED = (10, 512, 256)
_TRAINED_QUICK = (2, 64, 32)
_VOCABULARY = 8192


def building(ctx: Context) -> Measured:
    """The peak of a process while it builds, against its share and the largest parameter."""
    spec = ModelSpec(ctx.pick(_BUILT, _BUILT_QUICK), 32_000, 128)
    shapes = parameter_shapes(spec)
    sizes = [4 * math.prod(shape) for shape in shapes.values()]

    def be_rank(rank: int) -> list[int]:
        settings = {"run.trackers": [], "run.dir": str(ctx.scratch / "run")}
        runtime = start(resolve(("benchmark", settings)), "zero3")
        idle = resident("VmRSS")
        forget_peak()
        with runtime.engine.construction():
            model = GPT(spec)
        built = resident("VmHWM") - idle
        elements = sum(parameter.ds_numel for parameter in model.parameters())
        runtime.close()
        return [built, elements]

    answers = run_ranks(_RANKS, be_rank, ctx.scratch)
    equal = must_equal(4 * answers[0][1], sum(sizes), "numbers of parameters")
    allowed = sum(sizes) / _RANKS + max(sizes)
    measured = Measured([float(max(built for built, _ in answers))], [allowed], equal)
    measured.notes["parameters"] = sum(sizes) // 4
    return measured


def planned(ctx: Context, strategy: str) -> Measured:
    """The prediction of a model above that of a tiny one, against the same of real training.

    The tiny one has the same imports, libraries and threads. glibc is told to give freed memory
    back, so that what is resident is in use.
    """
    sizes = {"tiny": _IDLE, "model": ctx.pick(_TRAINED, _TRAINED_QUICK)}
    predicted = {}
    measured = {}
    parameters = 0
    for name, shape in sizes.items():
        shards = make_shards(ctx.scratch / f"shards-{name}", _VOCABULARY, 50_000)
        settings = _settings(shape, shards)
        config = resolve(("benchmark", {**settings, "run.dir": str(ctx.scratch / name)}))
        plan = memory(config, choose_strategy(strategy), 2, _VOCABULARY, on_gpu=False)
        predicted[name] = plan.peak
        work = partial(_train, ctx, name, strategy, settings)
        answers = run_ranks(2, work, ctx.scratch)
        measured[name] = max(peak for peak, _ in answers)
        parameters = answers[0][1]
        expected = [math.prod(shape) for shape in parameter_shapes(_spec(config)).values()]
        equal = must_equal(parameters, sum(expected), "numbers of parameters")
    ours = float(predicted["model"] - predicted["tiny"])
    other = float(measured["model"] - measured["tiny"])
    return Measured([ours], [other], equal, {"parameters": parameters})


def _spec(config: Any) -> ModelSpec:
    return config.model_spec(_VOCABULARY)


def _settings(shape: tuple[int, int, int], shards: Path) -> dict[str, Any]:
    layers, width, length = shape
    return {
        "model.layers": layers,
        "model.heads": width // 32,
        "model.width": width,
        "data.input": str(shards),
        "data.seq_len": length,
        "data.global_batch": 4,
    }


def _train(
    ctx: Context, name: str, strategy: str, settings: dict[str, Any], rank: int
) -> list[int]:
    """The peak of three steps on this rank, and how many parameters there are."""
    zero.tune_malloc(mmap_threshold=2**20, trim_threshold=2**17)
    run = build_run(ctx.scratch / name, strategy, settings)
    zero.tune_malloc(mmap_threshold=2**20, trim_threshold=2**17)  # building may set others
    forget_peak()
    before_saving: list[int] = []
    save = loop.save

    def save_and_note(run: Run, last: bool) -> None:
        before_saving.append(resident("VmHWM"))
        save(run, last)

    loop.save = save_and_note
    train_to(run, 3)
    spec = run.config.model_spec(run.data.tokenizer.vocab_size)
    parameters = sum(math.prod(shape) for shape in parameter_shapes(spec).values())
    run.runtime.close()
    return [before_saving[0], parameters]


CLAIMS = (
    Claim(
        name="memory-building",
        sentence="memory while ZeRO-3 builds 0.37 B parameters on four processes, against a"
        " process's share and the largest parameter",
        figure=SIZE,
        target=Target(most=1.3),
        measure=building,
        threads=2,
        rounds=1,
        probe="copy",
        preload=ZERO_MODULES,
    ),
    Claim(
        name="memory-plan-ddp",
        sentence="memory that plan predicts, against real training's (DDP x 2, 36 M parameters)",
        figure=SIZE,
        target=Target(least=0.9, most=1.1),
        measure=lambda ctx: planned(ctx, "ddp"),
        threads=2,
        rounds=1,
        probe="copy",
    ),
    Claim(
        name="memory-plan-zero2",
        sentence="the same under ZeRO-2",
        figure=SIZE,
        target=Target(least=0.9, most=1.1),
        measure=lambda ctx: planned(ctx, "zero2"),
        threads=2,
        rounds=1,
        probe="copy",
        preload=ZERO_MODULES,
    ),
)
