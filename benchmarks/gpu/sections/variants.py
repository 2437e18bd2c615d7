"""C8: what is optional in a run: dropout, Muon, fp16, the average of the weights."""

import math

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.runs import Spec, losses_of, run_chains, small_settings
from dist_lm.model.dropout import dropout, keys_of_places

RATE = 0.3
PLACE = 5


def dropout_and_optimizers(ctx: Context) -> None:
    variants = {
        "muon": {"optim__name": "muon", "optim__lr": 1e-2},
        "fp16": {"run__precision": "fp16"},
        "ema": {"run__ema": 0.9},
        "dropout": {"model__dropout": 0.1},
    }
    chains = []
    for name, changes in variants.items():
        steps = 4 if ctx.is_dry else 20
        chains.append([Spec(name, small_settings(ctx, run__steps=steps, **changes))])
    run_chains(ctx, chains, at_once=4)
    for name in variants:
        losses = losses_of(ctx, name)
        # fp16 skips updates while it looks for a scale.
        are_finite = all(math.isfinite(loss) for loss in losses)
        ctx.require(f"{name}: finite", are_finite)
        ctx.require(f"{name}: learns", losses[-1] < losses[0], f"{losses[0]:.3f} {losses[-1]:.3f}")
    check_masks(ctx)


def check_masks(ctx: Context) -> None:
    """A mask is a hash, so the card must compute the bits of the CPU, compiled or not."""
    rows = 3
    size = (rows, 1000, 63)  # an odd width, so that the last word is cut
    ones_BTD = torch.ones(size)
    keys_B = torch.tensor([1, 2**40 + 3, -7])
    wanted = dropped(ones_BTD, keys_B)
    on_card = dropped(ones_BTD.to(ctx.device), keys_B.to(ctx.device))
    ctx.require("dropout masks are those of the CPU", torch.equal(on_card.cpu(), wanted))
    compiled = torch.compile(dropped, backend=ctx.compile_backend)
    on_card = compiled(ones_BTD.to(ctx.device), keys_B.to(ctx.device))
    ctx.require("the same compiled", torch.equal(on_card.cpu(), wanted))
    share = float((wanted == 0).double().mean())
    ctx.check("share that is dropped, difference from the rate", abs(share - RATE), 0.01)


def dropped(x_BTD: Tensor, row_keys_B: Tensor) -> Tensor:
    """Dropout at one place of the network."""
    return dropout(x_BTD, keys_of_places(row_keys_B, PLACE + 1)[PLACE], RATE)
