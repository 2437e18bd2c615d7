"""S6: the 124M recipe on all cards of this machine against one."""

import statistics

from benchmarks.gpu.context import Context, Skip
from benchmarks.gpu.runs import Spec, run_chains, steps_of
from benchmarks.gpu.sections.training import Sizes

FIRST_LEFT_OUT = 5  # steps; the first ones compile
MEASURED = 10


def cards(ctx: Context) -> None:
    if ctx.cards < 2 and not ctx.is_dry:
        raise Skip("there is one card")
    world = 2 if ctx.is_dry else ctx.cards
    sizes = Sizes(ctx)
    left_out = 1 if ctx.is_dry else FIRST_LEFT_OUT
    steps = left_out + (2 if ctx.is_dry else MEASURED)
    rates = {}
    for ranks in (1, world):
        settings = sizes.settings(ctx, run__steps=steps)
        settings["data.global_batch"] *= ranks
        name = f"x{ranks}"
        # One after another: both would measure the same cards.
        run_chains(ctx, [[Spec(name, settings, world=ranks)]], at_once=1)
        measured = steps_of(ctx, name)[left_out:]
        rates[ranks] = statistics.median(step["tokens_per_second"] for step in measured)
        ctx.measure(f"{ranks} card(s)", rates[ranks], "tokens/s")
    efficiency = rates[world] / (world * rates[1])
    ctx.measure(f"{world} cards, efficiency", efficiency, at_least=0.95)
