"""Turns the sequences of a step into a rank's micro-batches of tensors, and reads ahead.

A batch is a pure function of (seed, its number), of streams also of where they stood before it. Its
number is that of the step, or more where a run steps over batches. Threads that read ahead change
only the speed. All ranks get micro-batches of equal shape and number; what a rank lacks is filled
with rows that have no targets.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dist_lm.config import NO_TARGET, BatchLayout, DataConfig
from dist_lm.data.mix import StepReader
from dist_lm.data.order import Ints, batch_after, batch_of_step, row_keys
from dist_lm.data.rows import StepRows
from dist_lm.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_AHEAD = 4  # batches read ahead per worker
_FEWEST_BOUNDS = 256  # of documents in a micro-batch


@dataclass(frozen=True)
class Micro:
    """The rows of one forward and backward."""

    tokens_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor | None  # document numbers, when documents must not see each other
    dropout_keys_B: Tensor | None  # one hash a row, from which its dropout masks follow
    bounds_N: Tensor | None = None  # where documents begin in the rows laid end to end; for GPUs

    def each(self, change: Callable[[Tensor], Tensor]) -> Micro:
        """The same done to each tensor there is."""

        def if_there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return Micro(
            change(self.tokens_BT),
            change(self.targets_BT),
            if_there(self.segments_BT),
            if_there(self.dropout_keys_B),
            if_there(self.bounds_N),
        )


@dataclass(frozen=True)
class Batch:
    """This rank's part of one step's global batch."""

    micros: list[Micro]
    targets: int  # how many on this rank
    # The sum of a hash of each row and its place; over all ranks, one value for the global batch.
    row_hashes: int
    end: bool = False  # no rank has a row: the data is used up
    # Where the streams stand after it, as far as this rank reads them.
    after: dict[str, Any] = field(default_factory=dict)
    # Of a mixture: asked and actual share, and passes, of each source.
    shares: dict[str, float] = field(default_factory=dict)
    # Why this rank could not read some rows. All ranks must refuse the batch, so they agree first.
    failure: UserError | None = None


class Batches:
    """Batches one after another from `first_step`; the number of a step counts from 0.

    `stepped_over` has the ranges of batches that are left out, as order.py means them.
    """

    def __init__(
        self,
        reader: StepReader,
        data: DataConfig,
        layout: BatchLayout,
        device: torch.device,
        *,
        eot: int,
        first_step: int = 0,
        stepped_over: Sequence[Sequence[int]] = (),
        dropout_seed: int | None = None,
        hash_rows: bool = False,
    ):
        self._reader = reader
        self._data = data
        self._layout = layout
        self._device = device
        self._eot = eot
        self._next_step = first_step
        self._stepped_over = stepped_over
        self._read_up_to = batch_after(first_step, stepped_over)  # of a reader in order
        self._dropout_seed = dropout_seed  # None: no dropout, so no keys
        self._hash_rows = hash_rows
        threads = data.workers
        if not reader.any_order:
            threads = min(threads, 1)
        self._pool: ThreadPoolExecutor | None = None
        if threads:
            self._pool = ThreadPoolExecutor(threads, "batches", initializer=self._use_device)
        self._ahead: deque[Future[Batch]] = deque()

    def take(self) -> Batch:
        """The next batch, on the device."""
        if self._pool is None:
            batch = self._read_step(self._next_step)
        else:
            while len(self._ahead) <= _AHEAD * self._data.workers:
                step = self._next_step + len(self._ahead)
                self._ahead.append(self._pool.submit(self._read_step, step))
            batch = self._ahead.popleft().result()
        self._next_step += 1
        return replace(batch, micros=[micro.each(self._to_device) for micro in batch.micros])

    def _read_step(self, step: int) -> Batch:
        """The batch of a step. A reader in order must read what is stepped over, too."""
        number = batch_of_step(step, self._stepped_over)
        if not self._reader.any_order:
            for passed in range(self._read_up_to, number):
                self._reader.read(passed, self._rows_of_batch)
            self._read_up_to = number + 1
        return self.read(number)

    @property
    def _rows_of_batch(self) -> int:
        """This rank's rows of a batch, with those that only fill up."""
        return self._layout.rows(len(self._reader.places))

    def read(self, number: int) -> Batch:
        """Read a batch's rows and cut them into micro-batches, in main memory."""
        size = self._layout.micro_batch
        count = self._rows_of_batch
        rows = self._reader.read(number, count)
        tokens_NT = rows.tokens[:, :-1]
        targets_NT = _targets(rows)
        segments_NT = None
        if self._data.document_mask:  # what follows an end of text belongs to the next document
            is_end = tokens_NT == self._eot
            targets_NT[is_end] = NO_TARGET
            segments_NT = self._tensor(np.cumsum(is_end, axis=1) - is_end)
        whole = Micro(
            self._tensor(tokens_NT),
            self._tensor(targets_NT),
            segments_NT,
            self._dropout_keys(number, count),
        )
        hashes = 0
        if self._hash_rows:
            hashes = self._hash(rows)
        micros = [whole.each(itemgetter(slice(n, n + size))) for n in range(0, count, size)]
        if segments_NT is not None and self._device.type == "cuda":
            micros = [self._with_bounds(micro) for micro in micros]
        return Batch(
            micros=micros,
            targets=int((targets_NT != NO_TARGET).sum()),
            row_hashes=hashes,
            end=rows.end,
            after=rows.after,
            shares=rows.shares,
            failure=rows.failure,
        )

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool:
            # Ranks read streams together, each as far ahead as the others: what they have begun
            # they must all finish.
            self._pool.shutdown(wait=True, cancel_futures=self._reader.any_order)
        self._reader.close()

    def _with_bounds(self, micro: Micro) -> Micro:
        assert micro.segments_BT is not None
        return replace(micro, bounds_N=self._tensor(document_bounds(micro.segments_BT.numpy())))

    def _dropout_keys(self, number: int, count: int) -> Tensor | None:
        if self._dropout_seed is None:
            return None
        places = self._reader.places
        keys = np.zeros(count, dtype=np.int64)
        keys[: len(places)] = row_keys(
            self._dropout_seed, number * self._data.global_batch + places
        )
        return self._tensor(keys)

    def _hash(self, rows: StepRows) -> int:
        """The sum of the hashes of the rows with targets, as a signed 64-bit integer.

        Sums of these over the ranks wrap alike everywhere.
        """
        filled = np.flatnonzero(rows.targets)
        places = self._reader.places[filled].tolist()
        total = 0
        for place, tokens in zip(places, rows.tokens[filled].astype("<u4"), strict=True):
            row = tokens.tobytes() + place.to_bytes(8)
            total += int.from_bytes(hashlib.blake2b(row, digest_size=8).digest())
        return (total + 2**63) % 2**64 - 2**63

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        import torch  # slow, and preparing needs none of it

        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _use_device(self) -> None:
        """Let a thread that reads ahead pin memory for this rank's GPU.

        A thread begins with the first GPU, and would take memory there for a context of its own.
        """
        if self._device.type == "cuda" and self._device.index:
            import torch  # slow, and preparing needs none of it

            torch.cuda.set_device(self._device)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def _targets(rows: StepRows) -> Ints:
    """The token that follows each input, where it is a target."""
    targets_NT = rows.tokens[:, 1:].copy()
    seq_len = targets_NT.shape[1]
    for row in np.flatnonzero(rows.targets < seq_len):
        targets_NT[row, rows.targets[row] :] = NO_TARGET
    return targets_NT


def document_bounds(segments_BT: Ints) -> NDArray[np.int32]:
    """The bounds of documents in the rows laid end to end: their beginnings, and the end.

    The end is repeated up to one of a few lengths, because torch.compile compiles for each length.
    """
    begins_BT = np.ones(segments_BT.shape, dtype=bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins = np.flatnonzero(begins_BT)
    length = _FEWEST_BOUNDS
    while length <= len(begins):
        length *= 4
    bounds = np.full(length, segments_BT.size, dtype=np.int32)
    bounds[: len(begins)] = begins
    return bounds
