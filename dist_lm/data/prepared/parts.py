"""Several prepared folders as one source."""

import contextlib
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from dist_lm.config import DataConfig
from dist_lm.data.prepared.cache import ShardCache
from dist_lm.data.prepared.sequences import Span, TokenSequences
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.remote import is_remote
from dist_lm.errors import DataError


def open_shards(folders: Sequence[str | Path], split: str, data: DataConfig) -> TokenSequences:
    """One split of prepared folders, or of those at URLs through this machine's cache."""
    parts = [_open_folder(str(folder), split, data.cache_gb) for folder in folders]
    return parts[0] if len(parts) == 1 else JoinedShards(parts)


def parts_of(shards: TokenSequences) -> Sequence[TokenShards]:
    """The prepared folders that sequences are of."""
    if isinstance(shards, JoinedShards):
        return shards.parts
    return [shards] if isinstance(shards, TokenShards) else []


def _open_folder(where: str, split: str, cache_gb: float) -> TokenShards:
    if not is_remote(where):
        return TokenShards(where, split)
    cache = Path(os.environ.get("DIST_LM_CACHE") or Path.home() / ".cache" / "dist_lm")
    return TokenShards(where, split, ShardCache(where, cache, round(cache_gb * 1e9)))


class JoinedShards(TokenSequences):
    """The shards of several prepared folders, one folder after the other.

    Sequences are numbered through all of them, so they are shuffled as one whole.
    """

    def __init__(self, parts: Sequence[TokenShards]):
        super().__init__()
        first = parts[0]
        self._shards: list[tuple[TokenShards, int]] = []  # each with its number in its folder
        self.title = f"{first.folder} and {len(parts) - 1} more"
        self.parts = parts
        self.files = []
        self.sizes = []
        self.dtype = first.dtype
        self.vocab_size = first.vocab_size
        for part in parts:
            _refuse_other_tokenizer(part, first)
            self._shards += [(part, number) for number in range(len(part.files))]
            self.files += [f"{part.folder}/{name}" for name in part.files]
            self.sizes += part.sizes

    def hashes(self) -> list[str]:
        return list(chain.from_iterable(part.hashes() for part in self.parts))

    def local_hashes(self) -> dict[str, str]:
        hashes: dict[str, str] = {}
        for part in self.parts:
            hashes |= part.local_hashes()
        return hashes

    def path_of(self, shard: int) -> str:
        return self.files[shard]

    def open_shard(self, shard: int) -> contextlib.AbstractContextManager[np.ndarray]:
        part, number = self._shards[shard]
        return part.open_shard(number)

    def documents_of(self, sequence: int, seq_len: int, stride: int) -> list[Span]:
        for part in self.parts:
            count = sum(part.counts(seq_len, stride))
            if sequence < count:
                return part.documents_of(sequence, seq_len, stride)
            sequence -= count
        raise AssertionError(f"sequence {sequence} is behind the last one")


def _refuse_other_tokenizer(part: TokenShards, first: TokenShards) -> None:
    if part.manifest["tokenizer"]["sha256"] != first.manifest["tokenizer"]["sha256"]:
        raise DataError(
            f"{part.folder} has another tokenizer than {first.folder}; rule: one for all; nearest:"
            f" prepare it with --tokenizer {first.folder}"
        )
