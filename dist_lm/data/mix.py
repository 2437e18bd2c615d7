"""data.mix."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_lm.config import DataConfig
from dist_lm.data.dataset import Dataset
from dist_lm.data.order import (
    FOR_SHARDS_IN_A_MIXTURE,
    Ints,
    MixtureSchedule,
    hash_words,
    sequence_ids,
)
from dist_lm.data.shards import TokenShards
from dist_lm.data.stream import PackedSequence, Stream, StreamSpec

if TYPE_CHECKING:
    from dist_lm.channel import Channel


class MixtureReader:
    """The rows of each step from several sources by weight. Streams stand where the last step left them, so steps are
    read in order. Every rank follows the whole order; the rows of a lane go from the rank that reads it to the one that
    trains on them."""

    def __init__(
        self,
        dataset: Dataset,
        data: DataConfig,
        seed: int,
        *,
        state: Mapping[str, Any] | None = None,
        rank: int = 0,
        world: int = 1,
        channel: Channel | None = None,
    ):
        self.dataset, self.data, self.seed = dataset, data, seed
        self.rank, self.world, self.channel = rank, world, channel
        state = state or {"streams": {}, "ended": [], "end": None}
        self.ended: list[list[int]] = [
            list(event) for event in state["ended"]
        ]  # [first position without it, source]
        self.end: int | None = state[
            "end"
        ]  # the first position that no source fills, once it is known
        self._pool = ThreadPoolExecutor(data.workers, "lanes") if data.workers else None
        gather = channel.gather if channel and world > 1 else lambda value: [value]
        self.streams = {
            name: Stream(
                source,
                state["streams"].get(name),
                rank=rank,
                world=world,
                gather=gather,
                pool=self._pool,
                shift=number,
            )
            for number, (name, source) in enumerate(dataset.sources.items())
            if isinstance(source, StreamSpec)
        }
        self.origins: dict[
            int, tuple[str, int | PackedSequence]
        ] = {}  # source, and sequence, of each own place of the last step
        self._plan_mixture()

    def _plan_mixture(self) -> None:
        specs, batch = self.data.named_sources(), self.data.global_batch
        changes = [(0, [spec.weight for spec in specs.values()])]
        for stage in self.data.stages:
            changes.append(
                (stage.from_step * batch, [stage.weights.get(name, 0.0) for name in specs])
            )
        starts = sorted({start for start, _ in changes} | {start for start, _ in self.ended})
        self.stages: list[tuple[int, list[float]]] = []
        for start in starts:
            weights = [weights for at, weights in changes if at <= start][-1]
            gone = {source for at, source in self.ended if at <= start}
            left = [0.0 if n in gone else weight for n, weight in enumerate(weights)]
            if not sum(left):
                self.end = start if self.end is None else min(start, self.end)
                break
            self.stages.append((start, left))
        self.mixture = MixtureSchedule(self.stages)

    def read(self, step: int, table: Ints, row_targets: Ints) -> dict[str, Any]:
        """Fill this rank's rows; where the streams stand afterwards. All ranks."""
        batch, length = self.data.global_batch, self.data.seq_len
        sources, earlier = self.mixture.at(step * batch + np.arange(batch))
        moves: list[
            tuple[int, int, PackedSequence | None]
        ] = []  # (place, rank that has read it, row)
        given, following, self.origins = 0, (step + 1) * batch, {}
        over = self.end is not None and step * batch >= self.end
        for number, (name, source) in enumerate(self.dataset.sources.items() if not over else ()):
            wanted = np.flatnonzero(sources == number)
            if isinstance(source, TokenShards):
                count = source.count(self.data)
                repeats = self.data.named_sources()[name].at_end == "repeat"
                inside = wanted if repeats else wanted[earlier[wanted] < count]
                own = inside[inside % self.world == self.rank]
                ids = sequence_ids(
                    earlier[own],
                    count,
                    int(
                        hash_words(self.seed, FOR_SHARDS_IN_A_MIXTURE, zlib.crc32(name.encode()))[0]
                    ),
                )
                table[own // self.world] = source.read(ids, length, self.data.stride)
                row_targets[own // self.world] = length
                self.origins |= {
                    place: (name, made)
                    for place, made in zip(own.tolist(), ids.tolist(), strict=True)
                }
                dealt = len(inside)
            else:
                stream = self.streams[name]
                rows = stream.deal(len(wanted))
                for place, (lane, row) in zip(wanted.tolist(), rows, strict=False):
                    moves.append((place, stream.owner(lane), row))
                    if row is not None:
                        self.origins[place] = name, row
                dealt = len(rows)
            given += dealt
            if dealt < len(
                wanted
            ):  # its last pass has ended; the other places of this step stay without targets
                self.ended.append([following, number])
                if self.data.named_sources()[name].at_end != "hand_on":
                    self.end = following
        self._deliver(moves, table, row_targets)
        if self.ended and self.ended[-1][0] == following:
            self._plan_mixture()
        after = {
            "streams": {name: stream.snapshot() for name, stream in self.streams.items()},
            "ended": [*self.ended],
            "end": self.end,
        }
        return {"end": not given, "after": after, "shares": self.shares(step)}

    def shares(self, step: int) -> dict[str, float]:
        """Asked and actual share of the sequences of this stage, and the passes begun, of each source up to a step."""
        position, figures = (step + 1) * self.data.global_batch, {}
        start, weights = max(stage for stage in self.stages if stage[0] < position)
        for number, name in enumerate(self.dataset.sources):
            before, now = (int(self.mixture.before(at)[number]) for at in (start, position))
            figures[f"asked_{name}"] = weights[number] / sum(weights)
            figures[f"share_{name}"] = (now - before) / (position - start)
            source = self.dataset.sources[name]
            stream = self.streams.get(name)
            figures[f"passes_{name}"] = stream.passed if stream else now / source.count(self.data)  # type: ignore[union-attr]
        return figures

    def _deliver(
        self,
        moves: Sequence[tuple[int, int, PackedSequence | None]],
        table: Ints,
        row_targets: Ints,
    ) -> None:
        """Put rows where they are trained on, over the network where another rank has read them. All ranks."""
        width = self.data.seq_len + 2
        sent: list[list[np.ndarray]] = [[] for _ in range(self.world)]
        wanted: list[list[int]] = [[] for _ in range(self.world)]
        for place, owner, made in moves:
            to = place % self.world
            if made is not None:
                packed = np.zeros(width, np.int64)
                packed[0], packed[1 : 1 + len(made.tokens)] = len(made.tokens) - 1, made.tokens
                sent[to].append(packed)
            if to == self.rank:
                wanted[owner].append(place // self.world)
        received = [np.concatenate(rows) if rows else np.empty(0, np.int64) for rows in sent]
        if any(place % self.world != owner for place, owner, _ in moves):
            assert self.channel, "several ranks have a channel"
            import torch  # slow, and preparing needs none of it

            lengths = [len(rows) * width for rows in wanted]
            tensors = [torch.from_numpy(part) for part in received]
            received = [tensor.numpy() for tensor in self.channel.exchange(tensors, lengths)]
        for rows, values_of_rank in zip(wanted, received, strict=True):
            for row, values in zip(rows, values_of_rank.reshape(-1, width), strict=True):
                row_targets[row], table[row] = values[0], values[1:]

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)


def merge_after(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the streams stand, from what each rank reads of them."""
    merged: dict[str, Any] = json.loads(json.dumps(ranks[0]))
    for theirs in ranks[1:]:
        for name, stream in theirs.get("streams", {}).items():
            merged["streams"][name]["lanes"].update(stream["lanes"])
    return merged


def count_left_out(after: Mapping[str, Any]) -> dict[str, int]:
    """What the streams left out, up to the end of the blocks they stand in: filtered and bad rows, empty documents."""
    total = Counter[str]()
    for stream in after.get("streams", {}).values():
        for cursor in stream["lanes"].values():
            total.update(cursor.get("left_out", {}))
    return dict(sorted(total.items()))
