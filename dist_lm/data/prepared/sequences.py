"""Stored tokens as sequences: what all kinds of token files have in common."""

import contextlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import numpy as np

from dist_lm.config import DataConfig
from dist_lm.data.prepared.shard_file import bad_shard


class Span(NamedTuple):
    """A part of one document inside a sequence: tokens[start:stop] of its T+1."""

    source: str
    row: int
    start: int
    stop: int


class TokenSequences(ABC):
    """Shards of tokens as sequences of T+1 tokens.

    The last token of a sequence is also the first of the next (with a stride of T).

    - `title`: what they are, for messages
    - `files`, `sizes`: the names of the shards, and how many tokens each has
    - `dtype`: in which tokens are stored
    - `vocab_size`: above all tokens
    """

    title: str
    files: list[str]
    sizes: list[int]
    dtype: np.dtype[Any]
    vocab_size: int

    def __init__(self) -> None:
        self._ends = lru_cache(self._sum_up_counts)

    @abstractmethod
    def hashes(self) -> list[str]:
        """Hashes that are equal exactly where the tokens are, of all splits."""

    @abstractmethod
    def local_hashes(self) -> dict[str, str]:
        """The sha256 that each shard on this machine must have, by path."""

    @abstractmethod
    def path_of(self, shard: int) -> str:
        """The path or URL of a shard, for messages."""

    @abstractmethod
    def documents_of(self, sequence: int, seq_len: int, stride: int) -> list[Span]:
        """The documents that a sequence's T+1 tokens come from."""

    @abstractmethod
    def open_shard(self, shard: int) -> contextlib.AbstractContextManager[np.ndarray]:
        """The tokens of a shard, to be used inside."""

    def counts(self, seq_len: int, stride: int) -> list[int]:
        """The number of sequences of each shard."""
        counts = []
        for size in self.sizes:
            count = 0
            if size > seq_len:
                last_start = size - 1 - seq_len
                count = last_start // stride + 1
            counts.append(count)
        return counts

    def count(self, data: DataConfig) -> int:
        """The number of sequences in an epoch."""
        ends = self._ends(data.seq_len, data.stride)
        return ends[-1] if ends else 0

    def tail_tokens(self, seq_len: int, stride: int) -> int:
        """Tokens at the shards' ends that are no sequence's target."""
        tail = 0
        for size, count in zip(self.sizes, self.counts(seq_len, stride), strict=True):
            last_target = (count - 1) * stride + seq_len if count else 0
            tail += size - 1 - last_target
        return tail

    def find(self, sequence: int, seq_len: int, stride: int) -> tuple[int, int]:
        """The shard of a sequence, and where in it its first token is."""
        ends = self._ends(seq_len, stride)
        total = ends[-1] if ends else 0
        assert 0 <= sequence < total, f"sequence {sequence} is none of {total}"
        shard = bisect_right(ends, sequence)
        before = ends[shard - 1] if shard else 0
        return shard, (sequence - before) * stride

    def read(self, sequences: Sequence[int] | np.ndarray, seq_len: int, stride: int) -> np.ndarray:
        """(N, seq_len + 1) tokens in the type they are stored in."""
        tokens_NT = np.empty((len(sequences), seq_len + 1), self.dtype)
        places = []  # as (shard, first token, row of the result)
        for row, sequence in enumerate(np.asarray(sequences).tolist()):
            shard, first = self.find(sequence, seq_len, stride)
            places.append((shard, first, row))
        # Each shard is opened once, and read from its beginning to its end.
        places.sort()
        for shard, in_shard in groupby(places, key=lambda place: place[0]):
            with self.open_shard(shard) as tokens:
                for _, first, row in in_shard:
                    tokens_NT[row] = tokens[first : first + seq_len + 1]
        self._refuse_unknown_ids(tokens_NT, places)
        return tokens_NT

    def _refuse_unknown_ids(
        self, tokens_NT: np.ndarray, places: list[tuple[int, int, int]]
    ) -> None:
        """Raise over a token that the tokenizer does not have."""
        if not tokens_NT.size or tokens_NT.max() < self.vocab_size:
            return
        for shard, _, row in places:
            largest = int(tokens_NT[row].max())
            if largest >= self.vocab_size:
                raise bad_shard(
                    self.path_of(shard), f"token {largest} is none of {self.vocab_size}"
                )

    def _sum_up_counts(self, seq_len: int, stride: int) -> list[int]:
        """The number of sequences up to the end of each shard."""
        return list(accumulate(self.counts(seq_len, stride)))
