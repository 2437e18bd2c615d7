"""C1 to C3: the same run in other arithmetic: CPU, bf16, compiled."""

from benchmarks.gpu.context import Context
from benchmarks.gpu.runs import (
    Spec,
    largest_difference,
    losses_of,
    run_chains,
    small_settings,
)

NO_CARD = {"CUDA_VISIBLE_DEVICES": ""}


def cpu_and_cuda(ctx: Context) -> None:
    """C1: fp32 on the CPU and on the card give one curve."""
    settings = small_settings(ctx, run__steps=4 if ctx.is_dry else 20)
    runs = [Spec("cpu", settings, env=NO_CARD), Spec("card", settings)]
    run_chains(ctx, [[run] for run in runs], at_once=2)
    ctx.check("loss, relative difference", largest_difference(ctx, "card", "cpu"), 1e-4)
    norms = largest_difference(ctx, "card", "cpu", "grad_norm")
    ctx.check("gradient norm, relative difference", norms, 1e-3)


def bf16_and_fp32(ctx: Context) -> None:
    """C2: bf16 learns as fast as fp32."""
    steps = 6 if ctx.is_dry else 200
    runs = []
    for precision in ("fp32", "bf16"):
        settings = small_settings(ctx, run__steps=steps, run__precision=precision)
        runs.append(Spec(precision, settings))
    run_chains(ctx, [[run] for run in runs], at_once=2)
    last = max(1, steps // 10)  # one step's loss is noisy
    ends = {}
    for run in runs:
        losses = losses_of(ctx, run.name)
        ends[run.name] = sum(losses[-last:]) / last
        ctx.require(f"{run.name} learns", ends[run.name] < losses[0], f"{ends[run.name]:.4f}")
    difference = abs(ends["bf16"] - ends["fp32"]) / ends["fp32"]
    ctx.check("last losses, relative difference", difference, 0.01)


def compiled(ctx: Context) -> None:
    """C3: torch.compile does not change the curve beyond bf16's rounding."""
    runs = []
    for name, is_compiled in (("eager", False), ("compiled", True)):
        settings = small_settings(
            ctx,
            run__steps=3 if ctx.is_dry else 20,
            run__precision="bf16",
            run__compile=is_compiled,
        )
        runs.append(Spec(name, settings))
    run_chains(ctx, [[run] for run in runs], at_once=2)
    ctx.check("loss, relative difference", largest_difference(ctx, "compiled", "eager"), 2e-3)
