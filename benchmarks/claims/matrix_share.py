"""How much of the machine's fp32 matrix rate a training step reaches.

The other side multiplies square matrices until it has done as many operations as the step: those of
its forward and backward, by the formula that train's log uses too.
"""

import time

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.claim import SHARE, Claim, Context, Measured, Target, must_be_near, take_turns
from benchmarks.claims.training_step import SIZE
from benchmarks.steps import PlainStep, keep_freed_memory
from dist_lm.model.init import flops_per_token

_SIDE = 1024  # of the square matrices


def measure(ctx: Context) -> Measured:
    size = ctx.pick(SIZE, models.TINY)
    keep_freed_memory()
    model = models.ours(size)
    step = PlainStep(
        model,
        lambda tokens_BT: (
            model(tokens_BT[:, :-1], tokens_BT[:, 1:].contiguous()) / (size.batch * size.length)
        ),
        size.tokens(),
    )
    operations = flops_per_token(size.spec()) * size.batch * size.length
    side = ctx.pick(_SIDE, 16)
    products = operations / (2 * side**3)
    left = torch.rand(side, side)
    product: Tensor = torch.empty(side, side)
    equal = must_be_near(2 * side**3 * products, operations, "operations", within=1e-9)

    def ours() -> None:
        step()

    def multiply() -> float:
        times = max(1, min(20, round(products)))  # a part of them is enough
        began = time.process_time()
        for _ in range(times):
            torch.mm(left, left, out=product)
        return (time.process_time() - began) / times * products

    ours()
    multiply()
    return take_turns(ctx, ours, multiply, equal, clock="cpu")


CLAIMS = (
    Claim(
        name="matrix-share",
        sentence="a training step's share of the fp32 matrix rate (6 layers, 384 wide, V 50,304)",
        figure=SHARE,
        target=Target(least=0.72),
        measure=measure,
        tried="see training-transformers; zeroed pages for the gradient of the embedding are 2 %",
        rounds=3,
    ),
)
