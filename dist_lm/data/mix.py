"""The sequences of each step: from a mixture of sources, or from one prepared source alone.

Both readers give a rank's rows of a step. A mixture is read step by step, because its streams stand
where the last step left them. Prepared shards alone can be read at any step, by several threads at
once: they need no state, so resuming costs nothing. That is why they have a reader of their own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dist_lm.config import DataConfig
from dist_lm.data.order import Ints, MixtureSchedule, rank_places
from dist_lm.data.provenance import Origin
from dist_lm.data.rows import StepRows
from dist_lm.data.sources import PreparedSource, ReadingRanks, Source, SourceReader
from dist_lm.errors import UserError

if TYPE_CHECKING:
    from dist_lm.channel import Channel

# Steps whose order is computed at once: one numpy call costs as much as thousands of positions.
_ORDER_STEPS = 64


class StepReader(Protocol):
    """The rows of each step, for `Batches` (a step's number counts from 0)."""

    any_order: bool  # steps may be read in any order, and several at once
    places: Ints  # of the global batch, that this rank trains on

    def read(self, step: int, count: int) -> StepRows:
        """This rank's rows of a step: `count` of them, as many as its places or more. All ranks."""

    def origins(self, step: int) -> dict[int, Origin]:
        """The sequence at each place that this rank trains on. The step counts as read then."""

    def close(self) -> None:
        """Stop reading ahead."""


class PreparedReader:
    """The steps of prepared shards alone."""

    any_order = True

    def __init__(
        self,
        source: PreparedSource,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        unit: int = 1,
    ):
        self.places = rank_places(rank, world, global_batch, unit)
        self._source = source
        self._global_batch = global_batch
        self._order = lru_cache(maxsize=2)(self._compute_order)

    def read(self, step: int, count: int) -> StepRows:
        rows = StepRows(count, self._source.seq_len)
        ids = self._ids(step)
        if len(ids):
            try:
                rows.tokens[: len(ids)] = self._source.read(ids)
                rows.targets[: len(ids)] = self._source.seq_len
            except UserError as error:
                rows.failure = error
        return rows

    def origins(self, step: int) -> dict[int, Origin]:
        origins: dict[int, Origin] = {}
        first = step * self._global_batch
        for place, number in zip(self.places.tolist(), self._ids(step).tolist(), strict=False):
            epoch = (first + place) // self._source.sequences + 1
            origins[place] = self._source.origin(number, epoch)
        return origins

    def close(self) -> None:
        pass

    def _ids(self, step: int) -> Ints:
        """The sequences of this rank's places; of the first of them, where the data ends."""
        chunk, number = divmod(step, _ORDER_STEPS)
        ids: Ints = self._order(chunk)[number]
        if self._source.end is None:
            return ids
        positions = step * self._global_batch + self.places
        return ids[positions < self._source.end]

    def _compute_order(self, chunk: int) -> Ints:
        """(steps, places): the sequences of _ORDER_STEPS steps."""
        steps = np.arange(chunk * _ORDER_STEPS, (chunk + 1) * _ORDER_STEPS, dtype=np.int64)
        positions = steps[:, None] * self._global_batch + self.places
        return self._source.ids(positions.reshape(-1)).reshape(positions.shape)


class MixtureReader:
    """The steps of several sources by weight, or of a stream, read in order.

    Every rank follows the whole order. The rows of a lane go from the rank that reads it to the one
    that trains on them.
    """

    any_order = False

    def __init__(
        self,
        sources: Mapping[str, Source],
        data: DataConfig,
        *,
        state: Mapping[str, Any] | None = None,
        rank: int = 0,
        world: int = 1,
        unit: int = 1,
        channel: Channel | None = None,
    ):
        self.places = rank_places(rank, world, data.global_batch, unit)
        self._data = data
        self._specs = data.named_sources()
        self._rank = rank
        self._world = world
        self._unit = unit
        self._channel = channel
        state = state or {"streams": {}, "ended": [], "end": None}
        # Sources that have ended: the first position without it, and the number of the source.
        self._ended: list[list[int]] = [list(event) for event in state["ended"]]
        # The first position that no source fills, once it is known.
        self._end: int | None = state["end"]
        self._pool: ThreadPoolExecutor | None = None
        if data.workers:
            self._pool = ThreadPoolExecutor(data.workers, "lanes")
        gather = channel.gather if channel and world > 1 else _gather_alone
        ranks = ReadingRanks(rank, world, gather, self._pool)
        self._readers: dict[str, SourceReader] = {}
        for number, (name, source) in enumerate(sources.items()):
            self._readers[name] = source.open(state["streams"], ranks, shift=number)
        self._plan()

    def read(self, step: int, count: int) -> StepRows:
        rows = StepRows(count, self._data.seq_len, self._rank, self._world, self._unit)
        following = (step + 1) * self._data.global_batch
        rows.end = not self._fill(rows, step)
        rows.deliver(self._channel)
        if self._ended and self._ended[-1][0] == following:
            self._plan()
        rows.after = self._snapshot()
        rows.shares = self._shares(following)
        return rows

    def origins(self, step: int) -> dict[int, Origin]:
        return self.read(step, len(self.places)).origins

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _plan(self) -> None:
        """Make the schedule from the weights of the stages, without the sources that have ended."""
        batch = self._data.global_batch
        weights_from = {0: [spec.weight for spec in self._specs.values()]}
        for stage in self._data.stages:
            weights = [stage.weights.get(name, 0.0) for name in self._specs]
            weights_from[stage.from_step * batch] = weights
        starts = sorted({*weights_from, *(start for start, _ in self._ended)})
        self._stages: list[tuple[int, list[float]]] = []
        weights = []
        for start in starts:
            weights = weights_from.get(start, weights)
            gone = {source for position, source in self._ended if position <= start}
            left = [0.0 if n in gone else weight for n, weight in enumerate(weights)]
            if not sum(left):
                if self._end is None or start < self._end:
                    self._end = start
                break
            self._stages.append((start, left))
        self._schedule = MixtureSchedule(self._stages)

    def _fill(self, rows: StepRows, step: int) -> int:
        """Let each source fill its places of the step. Returns how many were filled."""
        batch = self._data.global_batch
        first = step * batch
        if self._end is not None and first >= self._end:
            return 0
        sources, turns = self._schedule.at(first + np.arange(batch))
        filled = 0
        for number, (name, reader) in enumerate(self._readers.items()):
            places = np.flatnonzero(sources == number)
            dealt = reader.fill(rows, places, turns[places])
            filled += dealt
            if dealt < len(places):
                # Its last pass has ended. Its other places of this step stay without targets.
                self._ended.append([first + batch, number])
                if self._specs[name].at_end != "hand_on":
                    self._end = first + batch
        return filled

    def _snapshot(self) -> dict[str, Any]:
        """The state of the streams, as far as this rank reads them."""
        streams = {}
        for name, reader in self._readers.items():
            snapshot = reader.snapshot()
            if snapshot is not None:
                streams[name] = snapshot
        return {"streams": streams, "ended": [*self._ended], "end": self._end}

    def _shares(self, position: int) -> dict[str, float]:
        """Asked and actual share of this stage's sequences, and passes, of each source so far."""
        start, weights = max(stage for stage in self._stages if stage[0] < position)
        given_before = self._schedule.before(start)
        given = self._schedule.before(position)
        figures: dict[str, float] = {}
        for number, (name, reader) in enumerate(self._readers.items()):
            so_far = int(given[number])
            in_stage = so_far - int(given_before[number])
            figures[f"asked_{name}"] = weights[number] / sum(weights)
            figures[f"share_{name}"] = in_stage / (position - start)
            figures[f"passes_{name}"] = reader.passes(so_far)
        return figures


def _gather_alone(value: Any) -> list[Any]:
    return [value]


def merge_after(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of the streams, from what each rank reads of them."""
    merged: dict[str, Any] = json.loads(json.dumps(ranks[0]))
    for after in ranks[1:]:
        for name, stream in after.get("streams", {}).items():
            merged["streams"][name]["lanes"].update(stream["lanes"])
    return merged


def count_left_out(after: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of filtered and bad rows, empty documents and others that streams left out.

    It counts up to the end of the blocks in which the streams stand.
    """
    total = Counter[str]()
    for stream in after.get("streams", {}).values():
        for cursor in stream["lanes"].values():
            total.update(cursor.get("left_out", {}))
    return dict(sorted(total.items()))
