"""C4: the same run twice, and a run that was stopped and resumed.

By default the kernels of a card may add in any order, so two runs agree within a tolerance. With
`run.deterministic` they must agree to the last bit, compiled and not.
"""

from benchmarks.gpu.context import Context
from benchmarks.gpu.runs import (
    Settings,
    Spec,
    different_tensors,
    largest_difference,
    run_chains,
    small_settings,
)
from dist_lm.config import RunConfig

STEPS = 12
STOP = 5


def resume(ctx: Context) -> None:
    ways = {"default": settings_of(ctx, is_compiled=False)}
    if "deterministic" in RunConfig.model_fields:
        strict = {"run.deterministic": True}
        ways["deterministic"] = settings_of(ctx, is_compiled=False) | strict
        # C3 traces; here it would cost a dry run too long.
        ways["deterministic-compiled"] = settings_of(ctx, is_compiled=not ctx.is_dry) | strict
    else:
        ctx.require("run.deterministic", ctx.is_dry, "the Config has no such setting")
    chains = []
    for way, settings in ways.items():
        stopped = Spec(f"{way}-resumed", settings | {"run.stop_after": STOP})
        resumed = Spec(f"{way}-resumed", settings)
        chains.append([stopped, resumed])
        chains.append([Spec(f"{way}-whole", settings)])
    chains.append([Spec("default-again", ways["default"])])
    run_chains(ctx, chains, at_once=4)

    again = largest_difference(ctx, "default-again", "default-whole")
    ctx.check("default: twice the same run, loss", again, 1e-3)
    same = not different_tensors(ctx, "default-again", "default-whole")
    ctx.measure("default: twice the same run, equal bits", str(same))
    resumed_default = largest_difference(ctx, "default-resumed", "default-whole")
    ctx.check("default: resumed, loss", resumed_default, 1e-3)
    for way in ways:
        if way != "default" or ctx.is_dry:  # a CPU is deterministic without being told
            require_same_bits(ctx, way)


def settings_of(ctx: Context, is_compiled: bool) -> Settings:
    return small_settings(ctx, run__steps=STEPS, run__precision="bf16", run__compile=is_compiled)


def require_same_bits(ctx: Context, way: str) -> None:
    """Losses, weights and moments of the resumed run are those of the whole one."""
    losses = largest_difference(ctx, f"{way}-resumed", f"{way}-whole")
    ctx.check(f"{way}: resumed, loss", losses, 0.0)
    different = different_tensors(ctx, f"{way}-resumed", f"{way}-whole")
    ctx.require(f"{way}: resumed, equal bits", not different, ", ".join(different) or "all equal")
