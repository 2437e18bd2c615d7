"""Sums that do not know an order: gradients as 64-bit integers, in units of 2^-50.

Adding floats rounds after each addition, so another order gives other bits. Adding integers rounds
nowhere. So each gradient is rounded once, and then micro-batches, accumulation and the ring of an
all-reduce may add in any order. A sum becomes fp32 again at its end.

Shapes: R rows of C integers. Each parameter begins a row, and what is left of its last row is zero.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dist_lm.arithmetic import ceil_div
from dist_lm.data.order import hash_words

SCALE = 2.0**50  # integers in 1; fp32 has fewer digits at any gradient above 2^-27
LARGEST_SUM = 2.0**62  # of integers; a gradient of 2^12. Half of what int64 holds
COLUMNS = 1024
# Elements that are rounded and added at once: few kernels on a GPU, what fits the cache on a CPU.
BUCKET = {"cuda": 2**23, "cpu": 2**17}
_FOR_ROWS = 1  # what a multiplier of a hash is for
_FOR_COLUMNS = 2


@dataclass
class Bucket:
    """Parameters whose gradients are rounded and added together."""

    parameters: list[nn.Parameter]
    rows: slice  # of the sums
    missing: set[nn.Parameter] = field(default_factory=set)  # in this backward
    is_complete: bool = False  # all of this rank's units are added in this step


class FixedPointSums:
    """The sum of the gradients of many micro-batches, exact in any order.

    Parameters lie from the last to the first, about as a backward hands out their gradients. The
    last row counts the micro-batches whose gradients do not fit, and has a hash of each.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], addends: int, hashes_addends: bool):
        """`addends`: micro-batches that are added up at most, over all ranks."""
        device = parameters[0].device
        self.buckets = _buckets(parameters, BUCKET[device.type])
        self.hashes_addends = hashes_addends
        self._largest = LARGEST_SUM / addends  # as many of these cannot wrap
        rows = self.buckets[-1].rows.stop
        rows_of_tail = ceil_div(1 + addends, COLUMNS)
        self.sums_RC = torch.zeros(rows + rows_of_tail, COLUMNS, dtype=torch.int64, device=device)
        self.tail = slice(rows, rows + rows_of_tail)
        self._tail = self.sums_RC[self.tail].view(-1)[: 1 + addends]
        self._hash = Hash(device)
        self._scratch: Tensor | None = None  # integers of a bucket before they are added

    def clear_tail(self) -> None:
        """Begin the step's first micro-batch on this rank."""
        self._tail.zero_()

    def add(self, bucket: Bucket, number: int, is_first: bool, scale: float | Tensor) -> None:
        """Round the gradients of micro-batch `number` times `scale`, and add them.

        `number` counts over all ranks. `is_first`: nothing was added before on this rank. The
        gradients are gone afterwards.
        """
        gradients: list[Tensor] = []
        for parameter in bucket.parameters:
            assert parameter.grad is not None, "each parameter has a gradient in each backward"
            gradients.append(parameter.grad)
            parameter.grad = None
        torch._foreach_mul_(gradients, scale)
        largest = torch.stack(torch._foreach_norm(gradients, float("inf"))).amax()
        self._tail[0] += ~(largest < self._largest)  # NaN is not below anything
        torch._foreach_round_(gradients)
        sums_RC = self.sums_RC[bucket.rows]
        rounded_RC = sums_RC
        if not is_first:
            rounded_RC = self._scratch_of(bucket)
        for integers, gradient in zip(_views(bucket, rounded_RC), gradients, strict=True):
            integers.copy_(gradient)
        if self.hashes_addends:
            self._tail[1 + number] += self._hash.of_parts(rounded_RC, bucket.rows.start)
        if not is_first:
            sums_RC.add_(rounded_RC)

    def _scratch_of(self, bucket: Bucket) -> Tensor:
        """Memory for the integers of a bucket, with zeros between its parameters."""
        if self._scratch is None:
            rows = max(one.rows.stop - one.rows.start for one in self.buckets)
            self._scratch = self.sums_RC.new_zeros(rows, COLUMNS)
        scratch_RC = self._scratch[: bucket.rows.stop - bucket.rows.start]
        flat = scratch_RC.view(-1)
        stop = 0
        for parameter in bucket.parameters:
            start = stop + parameter.numel()
            stop += rows_of(parameter) * COLUMNS
            if start < stop:  # another bucket may have left its integers there
                flat[start:stop].zero_()
        return scratch_RC

    def give(self, scale: float | Tensor) -> None:
        """Make the sums times `scale` the gradients of the parameters, or NaN if one did not fit.

        Rounds once, from 64 bits to those of fp32.
        """
        nan = torch.full_like(self._tail[0], float("nan"), dtype=torch.float32)
        factor = torch.where(self._tail[0] == 0, torch.ones_like(nan) * scale, nan)
        for bucket in self.buckets:
            views = _views(bucket, self.sums_RC[bucket.rows])
            gradients = [view.to(torch.float32) for view in views]
            torch._foreach_mul_(gradients, factor)
            for parameter, gradient in zip(bucket.parameters, gradients, strict=True):
                parameter.grad = gradient

    def hashes(self) -> Tensor:
        """The hash of the sums, and behind it those of the addends if they are hashed.

        The hash of a sum is the sum of the addends' hashes, both modulo 2^64.
        """
        of_sum = self._hash.of_parts(self.sums_RC[: self.tail.start])
        return torch.cat([of_sum[None], self._tail[1:] if self.hashes_addends else self._tail[:0]])


def _buckets(parameters: Sequence[nn.Parameter], size: int) -> list[Bucket]:
    """Parameters from the last to the first, in buckets of about `size` elements."""
    buckets: list[Bucket] = []
    collected: list[nn.Parameter] = []
    start = 0
    stop = 0
    for parameter in reversed(parameters):
        collected.append(parameter)
        stop += rows_of(parameter)
        if (stop - start) * COLUMNS >= size or parameter is parameters[0]:
            buckets.append(Bucket(collected, slice(start, stop)))
            collected = []
            start = stop
    return buckets


def rows_of(tensor: Tensor) -> int:
    return ceil_div(tensor.numel(), COLUMNS)


def _views(bucket: Bucket, integers_RC: Tensor) -> Iterator[Tensor]:
    """The integers of each parameter of a bucket, in its shape."""
    flat = integers_RC.view(-1)
    start = 0
    for parameter in bucket.parameters:
        yield flat[start : start + parameter.numel()].view_as(parameter)
        start += rows_of(parameter) * COLUMNS


# --- hashes


class Hash:
    """A hash of integers: the sum of each times an odd number that follows from its place.

    It is computed modulo 2^64, so any one flipped bit changes it, and two that change places do.
    The hash of a sum is the sum of the hashes. There is no host sync.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._columns = _odd_numbers(_FOR_COLUMNS, COLUMNS).to(device)
        self._rows = self._columns[:0]

    def of(self, integers_RC: Tensor, first_row: int) -> Tensor:
        """The hash of rows that begin at `first_row`."""
        rows = self._multipliers(first_row + len(integers_RC))[first_row:]
        return ((integers_RC * self._columns).sum(1) * rows).sum()

    def of_parts(self, integers_RC: Tensor, first_row: int = 0) -> Tensor:
        """The same in little memory: a part after the other."""
        size = BUCKET[self._device.type] // COLUMNS
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        for start in range(0, len(integers_RC), size):
            total += self.of(integers_RC[start : start + size], first_row + start)
        return total

    def of_bits(self, tensors: Sequence[Tensor]) -> Tensor:
        """The hash of the bits of fp32 tensors, one behind the other."""
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        row = 0
        for tensor in tensors:
            bits = tensor.detach().reshape(-1).view(torch.int32).to(torch.int64)
            padded = torch.nn.functional.pad(bits, (0, rows_of(tensor) * COLUMNS - len(bits)))
            total += self.of_parts(padded.view(-1, COLUMNS), row)
            row += rows_of(tensor)
        return total

    def _multipliers(self, rows: int) -> Tensor:
        """Those of the first rows."""
        if len(self._rows) < rows:
            self._rows = _odd_numbers(_FOR_ROWS, rows).to(self._device)
        return self._rows[:rows]


def _odd_numbers(what_for: int, count: int) -> Tensor:
    words = hash_words(what_for, np.arange(count, dtype=np.uint64)) | np.uint64(1)
    return torch.from_numpy(words.view(np.int64))


def spell(value: int) -> str:
    """A hash as 16 hexadecimal digits."""
    return f"{value % 2**64:016x}"
