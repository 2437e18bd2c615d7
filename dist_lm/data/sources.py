"""The two kinds of source, prepared shards and raw streams, behind one interface.

A `Source` is what was opened: the same on all ranks, and without a position. A mixture opens it
once more, as a `SourceReader`, which gives sequence after sequence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from dist_lm.config import SourceConfig
from dist_lm.console import count
from dist_lm.data.lane import StreamSpec
from dist_lm.data.order import Ints, sequence_ids
from dist_lm.data.prepared.sequences import TokenSequences
from dist_lm.data.provenance import PreparedSearch, PreparedSequence, Search, StreamSearch
from dist_lm.data.public_facts import PublicFacts, facts_of_files, facts_of_shards
from dist_lm.data.rows import StepRows
from dist_lm.data.stream import Stream
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import DataError, UserError


class ReadingRanks(NamedTuple):
    """The ranks that read a mixture together."""

    rank: int
    world: int
    gather: Callable[[Any], list[Any]]  # every rank's value, by rank
    pool: Executor | None  # threads that read ahead


class SourceReader(Protocol):
    """A source as a mixture reads it, from its first sequence on or from where it stood."""

    def fill(self, rows: StepRows, places: Ints, turns: Ints) -> int:
        """Put the next sequences at these places of the global batch. Returns their number.

        `turns` has, for each place, how many earlier positions of the run had this source. All
        ranks.
        """

    def passes(self, given: int) -> float:
        """The number of passes over the source after this many positions."""

    def snapshot(self) -> dict[str, Any] | None:
        """The state, as far as this rank reads the source; None: it follows from the position."""


class Source(Protocol):
    """A source of text, opened."""

    @property
    def folder(self) -> str | None:
        """The prepared folder or URL; None: raw text."""

    def open(self, state: Mapping[str, Any], ranks: ReadingRanks, shift: int) -> SourceReader:
        """Open it in a mixture, where `state` says if it has it; `shift` is its number there."""

    def describe(self, weight: float, world: int) -> list[str]:
        """Lines for the start of a run."""

    def public_facts(self, spec: SourceConfig) -> PublicFacts:
        """What a model card tells of it; `spec` are its settings."""

    def identity(self, val_fraction: float) -> list[str]:
        """Marks that are equal where the tokens are."""

    def refuse_too_short(self, where: str) -> None:
        """Raise if it is known to have no sequence; `where` names the setting and its value."""

    def search(self, text: str, tokenizer: Tokenizer) -> Search:
        """A search for a passage in its sequences."""


@dataclass(frozen=True)
class PreparedSource:
    """Prepared shards in a shuffled order, epoch after epoch, another one in each.

    A sequence is a function of its position, so this is its own reader, without any state.
    """

    name: str
    shards: TokenSequences
    seq_len: int
    stride: int
    seed: int  # of the order
    end: int | None = None  # how many sequences there are in all epochs; None: no end

    @property
    def folder(self) -> str | None:
        return self.shards.title

    @cached_property
    def sequences(self) -> int:
        """Sequences in an epoch."""
        return sum(self.shards.counts(self.seq_len, self.stride))

    def ids(self, positions: Ints) -> Ints:
        """The sequence at each position of the source's order."""
        return sequence_ids(positions, self.sequences, self.seed)

    def read(self, ids: Ints) -> np.ndarray:
        """(N, T+1) tokens in the type they are stored in."""
        return self.shards.read(ids, self.seq_len, self.stride)

    def origin(self, number: int, epoch: int | None = None) -> PreparedSequence:
        return PreparedSequence(
            self.name, self.shards, self.seq_len, self.stride, number=number, epoch=epoch
        )

    def open(self, state: Mapping[str, Any], ranks: ReadingRanks, shift: int) -> SourceReader:
        return self

    def fill(self, rows: StepRows, places: Ints, turns: Ints) -> int:
        if self.end is not None:
            is_inside = turns < self.end
            places = places[is_inside]
            turns = turns[is_inside]
        ours = rows.ours(places)
        ids = self.ids(turns[ours])
        try:
            rows.put(places[ours], self.read(ids))
        except UserError as error:
            rows.failure = error
        for place, number in zip(places[ours].tolist(), ids.tolist(), strict=True):
            rows.origins[place] = self.origin(number)
        return len(places)

    def passes(self, given: int) -> float:
        return given / self.sequences

    def snapshot(self) -> dict[str, Any] | None:
        return None

    def describe(self, weight: float, world: int) -> list[str]:
        return [f"source {self.name}: prepared shards; weight {weight}"]

    def public_facts(self, spec: SourceConfig) -> PublicFacts:
        return facts_of_shards(self.name, spec, self.shards)

    def identity(self, val_fraction: float) -> list[str]:
        return self.shards.hashes()

    def refuse_too_short(self, where: str) -> None:
        if self.sequences:
            return
        sizes = self.shards.sizes
        if not sum(sizes):
            raise DataError(
                f"{where} has nothing left to train on; rule: the documents of data.validation and"
                " data.val_fraction are held out; nearest: other text to train on or to hold out"
            )
        nearest = max(max(sizes) - 1, 1)
        raise DataError(
            f"data.seq_len={self.seq_len} needs {self.seq_len + 1} tokens in one shard,"
            f" {where} has {sum(sizes)} to train on; nearest: {nearest}"
        )

    def search(self, text: str, tokenizer: Tokenizer) -> Search:
        return PreparedSearch(self.shards, self.seq_len, self.stride, text, tokenizer)


@dataclass(frozen=True)
class StreamSource:
    """Raw text that is read, tokenized and packed while the run trains."""

    spec: StreamSpec

    @property
    def folder(self) -> str | None:
        return None

    def open(self, state: Mapping[str, Any], ranks: ReadingRanks, shift: int) -> SourceReader:
        return Stream(
            self.spec,
            state.get(self.spec.name),
            rank=ranks.rank,
            world=ranks.world,
            gather=ranks.gather,
            pool=ranks.pool,
            shift=shift,
        )

    def describe(self, weight: float, world: int) -> list[str]:
        name, lanes = self.spec.name, self.spec.lanes
        lines = []
        if lanes < world:
            lines.append(
                f"warning: {name} has {count(lanes, 'lane')}, fewer than the {world} processes"
            )
        parts = f"{count(len(self.spec.parts), 'part')} in {count(lanes, 'lane')}"
        lines.append(f"source {name}: {parts}; weight {weight}")
        return lines

    def public_facts(self, spec: SourceConfig) -> PublicFacts:
        return facts_of_files(self.spec.name, spec, self.spec.reader.files)

    def identity(self, val_fraction: float) -> list[str]:
        reader = self.spec.reader
        options = reader.spec.model_dump(mode="json", exclude={"input", "weight", "revision"})
        # A file's mark is its time of change, which a copy need not have; a hub dataset's is its
        # commit.
        files = [[file.name, file.size, "" if file.path else file.mark] for file in reader.files]
        return [json.dumps([self.spec.name, options, files, val_fraction])]

    def refuse_too_short(self, where: str) -> None:
        """Never raises: only reading shows what a stream has."""

    def search(self, text: str, tokenizer: Tokenizer) -> Search:
        return StreamSearch(text, tokenizer, self.spec.reader)
