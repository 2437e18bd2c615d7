"""A training step as one writes it by hand, for the other side of claims."""

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor, nn

_RATE = 1e-3


class PlainStep:
    """Forward, backward, clipping, AdamW, and the loss as a number; `tokens` are used in turn."""

    def __init__(self, model: nn.Module, loss_of: Callable[[Tensor], Tensor], tokens: list[Tensor]):
        self._parameters = list(model.parameters())
        self._loss_of = loss_of
        self._tokens = cycle(tokens)
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def __call__(self) -> float:
        loss = self._loss_of(next(self._tokens))
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=False)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MB, as train does (`runtime/start.py`).

    Both sides are in this process, so both have it.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
