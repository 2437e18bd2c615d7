"""Shards and streams -> batches in order, read ahead.

A batch is a pure function of (seed, step), of streams also of where they stood before it: `Batches` asks order.py which
sequences a rank trains on, and threads that read ahead change only the speed. All ranks get micro-batches of equal
shape and number; what a rank lacks is filled with rows that have no targets.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_lm.config import NO_TARGET, BatchLayout, DataConfig
from dist_lm.data.mix import MixtureReader
from dist_lm.data.order import Ints, rank_places, row_keys, sequence_ids
from dist_lm.data.shards import TokenShards

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ORDER_STEPS = 64  # steps whose order is computed at once: one numpy call costs as much as thousands of positions
_AHEAD = 4  # batches read ahead per worker


@dataclass(frozen=True)
class Micro:
    """The rows of one forward and backward."""

    tokens_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor | None  # document numbers, when documents must not see each other
    dropout_keys_B: Tensor | None  # one hash a row, from which its dropout masks follow

    def each(self, change: Callable[[Tensor], Tensor]) -> Micro:
        """The same done to each tensor there is."""
        changed = (t if t is None else change(t) for t in self.__dict__.values())
        return Micro(*changed)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Batch:
    """This rank's part of one step's global batch."""

    micros: list[Micro]
    targets: int  # how many on this rank
    row_hashes: int  # sum of a hash of each row and its place: adds up over ranks to one value for the global batch
    end: bool = False  # no rank has a row: the data is used up
    after: dict[str, Any] = field(
        default_factory=dict
    )  # where the streams stand after it, as far as this rank reads
    shares: dict[str, float] = field(
        default_factory=dict
    )  # of a mixture: asked and actual share, and passes


class Batches:
    """Batches one after another from `first_step`; an index of steps starts at 0."""

    def __init__(
        self,
        source: TokenShards | MixtureReader,
        data: DataConfig,
        layout: BatchLayout,
        rank: int,
        device: torch.device,
        *,
        seed: int,
        eot: int,
        first_step: int = 0,
        end_position: int | None = None,
        dropout: bool = False,
        hash_rows: bool = False,
    ):
        self.source, self.data, self.layout, self.device = source, data, layout, device
        self.seed, self.eot, self.dropout, self.hash_rows = seed, eot, dropout, hash_rows
        self.places = rank_places(rank, layout.world_size, data.global_batch)
        self.end_position = end_position  # positions from here on have no targets
        self.next_step = first_step
        self._order = lru_cache(maxsize=2)(self._compute_order)
        # The steps of a mixture are read in order, by one thread that others help.
        threads = min(data.workers, 1) if isinstance(source, MixtureReader) else data.workers
        self._pool = ThreadPoolExecutor(threads, "batches") if threads else None
        self._ahead: deque[Future[Batch]] = deque()

    def take(self) -> Batch:
        """The next batch, on the device."""
        if self._pool is None:
            batch = self.read(self.next_step)
        else:
            while len(self._ahead) <= _AHEAD * self.data.workers:
                self._ahead.append(self._pool.submit(self.read, self.next_step + len(self._ahead)))
            batch = self._ahead.popleft().result()
        self.next_step += 1
        moved = [
            micro.each(lambda tensor: tensor.to(self.device, non_blocking=True))
            for micro in batch.micros
        ]
        return replace(batch, micros=moved)

    def read(self, step: int) -> Batch:
        """Read a step's rows and cut them into micro-batches; a function of (seed, step, rank, plan), of a mixture of
        where its streams stand too."""
        length, positions = self.data.seq_len, step * self.data.global_batch + self.places
        rows = self.layout.micro_batch * self.layout.accumulation
        table, row_targets, found = (
            np.zeros((rows, length + 1), np.int64),
            np.zeros(rows, np.int64),
            {},
        )
        if isinstance(self.source, MixtureReader):
            found = self.source.read(step, table, row_targets)
        else:
            real = (
                len(positions)
                if self.end_position is None
                else int((positions < self.end_position).sum())
            )
            chunk, inside = divmod(step, _ORDER_STEPS)
            if real:
                table[:real] = self.source.read(
                    self._order(chunk)[inside][:real], length, self.data.stride
                )
            row_targets[:real] = length
        tokens_NT, targets_NT = table[:, :-1], table[:, 1:].copy()
        for row in np.flatnonzero(row_targets < length):
            targets_NT[row, row_targets[row] :] = NO_TARGET
        segments_NT = None
        if self.data.document_mask:  # what follows an end of text belongs to the next document
            ends = tokens_NT == self.eot
            targets_NT[ends] = NO_TARGET
            segments_NT = self._tensor(np.cumsum(ends, axis=1) - ends)
        keys_N = None
        if self.dropout:
            keys = np.zeros(rows, dtype=np.int64)
            keys[: len(positions)] = row_keys(self.seed, positions)
            keys_N = self._tensor(keys)
        whole = Micro(self._tensor(tokens_NT), self._tensor(targets_NT), segments_NT, keys_N)
        size = self.layout.micro_batch
        micros = [whole.each(itemgetter(slice(at, at + size))) for at in range(0, rows, size)]
        filled = np.flatnonzero(row_targets)
        hashes = _hash_rows(table[filled], self.places[filled]) if self.hash_rows else 0
        return Batch(micros, int((targets_NT != NO_TARGET).sum()), hashes, **found)

    def close(self) -> None:
        """Stop reading ahead. The ranks read a mixture together, each as far ahead: what they began they finish."""
        if self._pool:
            self._pool.shutdown(
                wait=True, cancel_futures=not isinstance(self.source, MixtureReader)
            )
        if isinstance(self.source, MixtureReader):
            self.source.close()

    def _compute_order(self, chunk: int) -> Ints:
        assert isinstance(self.source, TokenShards)
        steps = np.arange(chunk * _ORDER_STEPS, (chunk + 1) * _ORDER_STEPS, dtype=np.int64)
        positions = (steps[:, None] * self.data.global_batch + self.places).reshape(-1)
        return sequence_ids(positions, self.source.count(self.data), self.seed).reshape(
            len(steps), -1
        )

    def _tensor(self, array: Ints) -> Tensor:
        import torch  # slow, and preparing needs none of it

        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def _hash_rows(rows_NT: Ints, places: Ints) -> int:
    total = 0
    for place, row in zip(places, rows_NT.astype("<u4"), strict=True):
        total += int.from_bytes(
            hashlib.blake2b(row.tobytes() + int(place).to_bytes(8), digest_size=8).digest()
        )
    return (
        total + 2**63
    ) % 2**64 - 2**63  # a signed 64-bit integer, whose sums over ranks wrap alike everywhere


# --- several sources, or streams


# --- a run's data
