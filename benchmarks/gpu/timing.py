"""How steps are timed: variants take turns, and the median of the turns counts.

Whatever slows the machine down for a while then slows all variants alike.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.gpu.context import Context
from dist_lm.metrics import peak_flops

Step = Callable[[], None]
Batch = tuple[Tensor, Tensor]  # tokens and targets, (B, T) each


class PlainStep:
    """A training step as one writes it by hand: micro-batches, clipping, update.

    The batches lie on the card already. `loss_of` gives the mean loss of tokens and targets.
    """

    def __init__(
        self,
        ctx: Context,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        batches: list[Batch],
    ):
        self._ctx = ctx
        self._parameters = list(model.parameters())
        self._optimizer = optimizer
        self._loss_of = loss_of
        self._batches = batches  # of one step
        self.last_loss = torch.zeros(())

    def __call__(self) -> None:
        for tokens_BT, targets_BT in self._batches:
            with torch.autocast(self._ctx.device.type, torch.bfloat16):
                loss = self._loss_of(tokens_BT, targets_BT)
            (loss / len(self._batches)).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.last_loss = loss.detach()


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)


def random_batches(
    ctx: Context, number: int, *, rows: int, length: int, vocabulary: int
) -> list[Batch]:
    """Random tokens on the card, the same for every variant.

    They are contiguous as those of the training loop are: a compiled model asks for that.
    """
    generator = torch.Generator().manual_seed(11)
    batches = []
    for _ in range(number):
        both = torch.randint(vocabulary, (2, rows, length), generator=generator)
        tokens_BT, targets_BT = both.to(ctx.device)
        batches.append((tokens_BT.clone(), targets_BT.clone()))
    return batches


def seconds_of(ctx: Context, step: Step, times: int) -> float:
    """Seconds of one step, over several that follow each other."""
    ctx.sync()
    start = time.perf_counter()
    for _ in range(times):
        step()
    ctx.sync()
    return (time.perf_counter() - start) / times


def take_turns(ctx: Context, steps: dict[str, Step], times: int) -> dict[str, float]:
    """The median seconds of a step of each variant. All must have been warmed up."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ctx.rounds):
        for name, step in steps.items():
            taken[name].append(seconds_of(ctx, step, times))
    return {name: statistics.median(values) for name, values in taken.items()}


def micro_batch_of(ctx: Context) -> int:
    """Rows of a micro-batch of the 124M model that fit beside plain fp32 logits."""
    gigabytes = ctx.card_bytes / 1e9
    for rows, needed in ((32, 70), (16, 38), (8, 22), (4, 14)):
        if gigabytes >= needed:
            return rows
    return 2


def target_by_card(ctx: Context, targets: dict[str, float]) -> float | None:
    """The target for this card, by a part of its name. Other cards have none."""
    for part, target in targets.items():
        if part in ctx.card:
            return target
    return None


def mfu(ctx: Context, tokens_per_second: float, flops_per_token: float) -> float | None:
    """Model FLOP/s as a share of the card's peak; None where the peak is not known."""
    peak = peak_flops(ctx.card)
    if peak == float("inf"):
        return None
    return tokens_per_second * flops_per_token / peak
