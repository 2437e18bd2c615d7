"""train's loop against a bare loop around the same model with the same batches."""

from typing import Any

from benchmarks.claim import COST, MORE_MS, Claim, Context, Measured, Target, must_be_near
from benchmarks.isolation import ZERO_MODULES, run_ranks
from benchmarks.loops import CPU_CLOCK, WALL_CLOCK, build_run, compare_loops, make_shards

_TINY = {
    "model.layers": 4,
    "model.heads": 4,
    "model.width": 64,
    "data.seq_len": 32,
    "data.global_batch": 8,
}
_QUICK = {**_TINY, "model.layers": 1, "model.width": 32}
_VOCABULARY = 2048


def one_process(ctx: Context, settings: dict[str, Any], steps: int) -> Measured:
    shards = make_shards(ctx.scratch / "shards", _VOCABULARY, ctx.pick(2_000_000, 20_000))
    size = ctx.pick(settings, _QUICK)
    run = build_run(ctx.scratch / "run", "single", {"data.input": str(shards), **size})
    found = compare_loops(run, rounds=ctx.rounds, steps=ctx.pick(steps, 4), clock=CPU_CLOCK)
    run.runtime.close()
    return _measured(found)


def two_processes(ctx: Context, strategy: str) -> Measured:
    shards = make_shards(ctx.scratch / "shards", _VOCABULARY, ctx.pick(2_000_000, 20_000))
    settings = {"data.input": str(shards), **ctx.pick({}, _QUICK)}

    def be_rank(rank: int) -> Any:
        run = build_run(ctx.scratch / "run", strategy, settings)
        found = compare_loops(run, rounds=ctx.rounds, steps=ctx.pick(10, 4), clock=WALL_CLOCK)
        run.runtime.close()
        return found

    return _measured(run_ranks(2, be_rank, ctx.scratch)[0])


def _measured(found: dict[str, Any]) -> Measured:
    equal = must_be_near(*found["losses"], "first losses", within=1e-5)
    return Measured(found["ours"], found["other"], equal)


CLAIMS = (
    Claim(
        name="loop-overhead",
        sentence="a step of train, against a bare loop on our model and loader (the quickstart's)",
        figure=COST,
        target=Target(most=1.01),
        measure=lambda ctx: one_process(ctx, {}, steps=8),
        rounds=3,
    ),
    Claim(
        name="loop-overhead-tiny",
        sentence="the same at a tiny size (4 layers, 64 wide): milliseconds more a step",
        figure=MORE_MS,
        target=Target(most=0.3),
        measure=lambda ctx: one_process(ctx, _TINY, steps=100),
    ),
    Claim(
        name="step-ddp",
        sentence="a step of train under DDP on two processes, against a bare loop",
        figure=COST,
        target=Target(most=1.05),
        measure=lambda ctx: two_processes(ctx, "ddp"),
        threads=2,
        rounds=3,
    ),
    Claim(
        name="step-zero2",
        sentence="a step of train under ZeRO-2 on two processes, against a bare loop",
        figure=COST,
        target=Target(most=1.05),
        measure=lambda ctx: two_processes(ctx, "zero2"),
        threads=2,
        rounds=3,
        preload=ZERO_MODULES,
    ),
)
