"""The engine of run.exact: the same bits on one process and on any number of them.

What depends on the number of processes elsewhere is the order in which floats are added, and the
shapes in which kernels compute. Here a unit of data.micro_batch sequences is always computed
together, by whichever rank has it, and the gradients of the units are added as integers
(fixed_point.py). All that follows the sum is the same computation on every rank: norm, clipping and
update. docs/exactness.md says what is promised where.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from dist_lm.channel import Channel
from dist_lm.checkpoint.layout import OwnedSlice
from dist_lm.config import Config, units_of
from dist_lm.runtime.device import describe_kernels
from dist_lm.runtime.engine import ReplicatedEngine, Shapes
from dist_lm.runtime.fixed_point import SCALE, Bucket, FixedPointSums, Hash, spell
from dist_lm.runtime.strategy import Strategy

# A loss is rounded to a multiple of this one's inverse. float64 adds such numbers exactly in any
# order up to 2^33, the loss of about 10^9 targets.
_PARTS_OF_A_LOSS = 2.0**20


class ExactEngine(ReplicatedEngine):
    """One process alone, or several that each have all weights. There is no DDP in it.

    As soon as a backward has the gradients of a bucket, they are rounded, added to the sums and
    dropped. On GPUs a bucket goes to the other ranks while the last backward is still at work.
    """

    def __init__(self, accelerator: Accelerator, config: Config, strategy: Strategy):
        super().__init__(accelerator, config, strategy)
        self._bucket_of: dict[nn.Parameter, Bucket] = {}
        self._is_adding = True  # not while hash_of_gradient() looks at gradients
        self._unit = 0  # of the global batch, that this rank computes now
        self._is_first = True  # of this rank's units in this step
        self._is_last = False
        self._at_work: list[Any] = []  # exchanges that have begun
        self._hashes: Tensor | None = None  # of the last step's gradient

    def _wrap(self, shapes: Shapes, channel: Channel) -> None:
        self.model = self.bare
        for parameter in self.bare.parameters():
            if parameter.requires_grad:
                self._trainable.append(parameter)
                parameter.register_post_accumulate_grad_hook(self._take)
        self.sums = FixedPointSums(
            self._trainable, units_of(self.config), self.config.run.log_unit_hashes
        )
        for bucket in self.sums.buckets:
            for parameter in bucket.parameters:
                self._bucket_of[parameter] = bucket
        self._begin_step()

    def _begin_step(self) -> None:
        self._unit = self.rank
        self._is_first = True
        self.sums.clear_tail()
        for bucket in self.sums.buckets:
            bucket.missing = set(bucket.parameters)
            bucket.is_complete = False

    # --- one step

    def warm_up(self, loss_of_nothing: Callable[[], Tensor]) -> None:
        """Nothing to do: no order of sums can change."""

    def addend(self, loss: Tensor) -> Tensor:
        """The loss of a unit, rounded so that sums of it are exact."""
        return (loss.double() * _PARTS_OF_A_LOSS).round() / _PARTS_OF_A_LOSS

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self._is_last = last
        with self.autocast():
            yield
        self._unit += self.world_size
        self._is_first = False

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradient. Ranks are added up and not averaged."""
        with torch.autocast(self.device.type, enabled=False):
            self._backward(loss)

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def _take(self, parameter: Tensor) -> None:
        """A gradient is complete in this backward: add those of its bucket if it was the last."""
        if not self._is_adding:
            return
        assert isinstance(parameter, nn.Parameter)
        bucket = self._bucket_of[parameter]
        bucket.missing.discard(parameter)
        if bucket.missing:
            return
        self.sums.add(bucket, self._unit, self._is_first, SCALE / self._loss_scale())
        bucket.missing = set(bucket.parameters)
        if self._is_last:
            bucket.is_complete = True
            self._send()

    def _send(self) -> None:
        """Give the buckets that are complete to the other ranks, in one order on all of them."""
        if self.world_size == 1 or not self.on_gpu:
            return
        for bucket in self.sums.buckets[len(self._at_work) :]:
            if not bucket.is_complete:
                break
            self._begin_exchange(bucket.rows)

    def _begin_exchange(self, rows: slice) -> None:
        work = dist.all_reduce(self.sums.sums_RC[rows], async_op=True)
        self._at_work.append(work)

    def _finish_exchange(self) -> None:
        """All ranks. On a CPU all is exchanged here: gloo overlaps nothing."""
        if self.world_size > 1:
            self._begin_exchange(self.sums.tail if self.on_gpu else slice(None))
        for work in self._at_work:
            work.wait()
        self._at_work.clear()

    def _loss_scale(self) -> float | Tensor:
        """By what the loss is multiplied in fp16: a power of two, so dividing by it is exact."""
        if not self.scaler.is_enabled():
            return 1.0
        return self.scaler.scale(torch.ones((), device=self.device))

    def _step(self) -> Tensor:
        self._finish_exchange()
        self._hashes = self.sums.hashes()
        self.sums.give(self._loss_scale() / SCALE)
        norm = super()._step()
        self._begin_step()
        return norm

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def hash_of_gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        self._is_adding = False
        value = super().hash_of_gradient(loss)
        self._is_adding = True
        self._begin_step()
        return value

    # --- which bits it has computed

    def gradient_hashes(self) -> Tensor | None:
        """The hash of the sum, and with run.log_unit_hashes that of each unit."""
        return self._hashes

    def facts_of_bits(self, shapes: Shapes) -> dict[str, str]:
        """The hash of weights and state (a host sync), and which kernels made them."""
        tensors = list(saved_tensors(self.owned(), shapes).values())
        value = Hash(self.device).of_bits(tensors)
        return {"weights_hash": spell(int(value)), "kernels": describe_kernels(self.device)}


def saved_tensors(owned: Iterable[OwnedSlice], shapes: Shapes) -> dict[str, Tensor]:
    """The weights and the optimizer's tensors, flat, without rows that pad the vocabulary."""
    found = {}
    for part in owned:
        size = math.prod(shapes[part.name])
        found[part.name] = part.weight[:size]
        for key in sorted(part.state):
            found[f"{part.name}.{key}"] = part.state[key][:size]
        for key in sorted(part.extra):
            found[f"{part.name}.{key}"] = part.extra[key].reshape(-1)
    return found
