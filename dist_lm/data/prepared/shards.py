"""Token shards of a prepared folder: check them, and read sequences from them.

A prepared folder holds shards (one safetensors file each), the tokenizer, and `dataset.json`, the
manifest, which is written last: a folder that has it is whole.
A shard's size is checked by `check_sizes`, its hash by `verify` or by the cache.
"""

import contextlib
import hashlib
import io
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.data.prepared.cache import ShardCache
from dist_lm.data.prepared.manifest import MANIFEST, read_manifest
from dist_lm.data.prepared.sequences import Span, TokenSequences
from dist_lm.data.prepared.shard_file import bad_shard, map_shard
from dist_lm.data.remote import is_remote, open_file
from dist_lm.errors import DataError

# A mapping holds a file open, so only some are kept. The order of training reads few at once.
_MAPPED_SHARDS = 64


def verify(folder: str | Path) -> list[str]:
    """Check every file of a prepared folder or URL against its manifest.

    Returns the names of the damaged files, each with what is wrong.
    """
    manifest = read_manifest(folder)
    expected = {"tokenizer.json": manifest["tokenizer"]["sha256"]}
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            expected[shard["file"]] = shard["sha256"]
    damaged = []
    for name, sha256 in expected.items():
        try:
            with _open_file_of(folder, name) as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            damaged.append(f"{name} ({error.strerror or error})")
            continue
        if actual != sha256:
            damaged.append(f"{name} (sha256 {actual[:12]}, not {sha256[:12]})")
    return damaged


class TokenShards(TokenSequences):
    """The shards of one split ('train' or 'val') of a prepared folder.

    A folder at a URL is read through a cache of local copies: one shard at a time, in use only
    while it is read. `entries` has what the manifest says of each shard.
    """

    def __init__(self, folder: str | Path, split: str, cache: ShardCache | None = None):
        assert (cache is not None) == is_remote(str(folder)), (
            "a folder at a URL, and no other, has a cache"
        )
        super().__init__()
        self.title = str(folder)
        self.folder = folder
        self.cache = cache
        self.manifest = read_manifest(folder)
        self.entries: list[dict[str, Any]] = self.manifest["splits"][split]["shards"]
        self.files: list[str] = [entry["file"] for entry in self.entries]
        self.sizes: list[int] = [entry["tokens"] for entry in self.entries]
        self.dtype = np.dtype(self.manifest["tokenizer"]["dtype"])
        self.vocab_size = self.manifest["tokenizer"]["vocab_size"]
        self._map_local = lru_cache(maxsize=_MAPPED_SHARDS)(self._open_local)

    def hashes(self) -> list[str]:
        hashes = []
        for split in self.manifest["splits"].values():
            hashes += [shard["sha256"] for shard in split["shards"]]
        return hashes

    def local_hashes(self) -> dict[str, str]:
        hashes = {}
        if self.cache is None:
            for entry in self.entries:
                path = os.path.abspath(Path(self.folder, entry["file"]))
                hashes[path] = entry["sha256"]
        return hashes

    @contextlib.contextmanager
    def open_shard(self, shard: int) -> Iterator[np.ndarray]:
        with self._open_shard(shard) as arrays:
            yield arrays["tokens"]

    def path_of(self, shard: int) -> str:
        return f"{self.folder}/{self.files[shard]}"

    def documents_of(self, sequence: int, seq_len: int, stride: int) -> list[Span]:
        shard, first = self.find(sequence, seq_len, stride)
        end = first + seq_len + 1
        names = [source["name"] for source in self.manifest["sources"]]
        spans = []
        with self._open_shard(shard) as arrays:
            self._check_documents(shard, arrays)
            starts = [*arrays["document_start"].tolist(), self.sizes[shard]]
            n = bisect_right(starts, first) - 1
            while starts[n] < end:
                name = names[int(arrays["document_source"][n])]
                row = int(arrays["document_row"][n])
                start = max(starts[n], first) - first
                stop = min(starts[n + 1], end) - first
                spans.append(Span(name, row, start, stop))
                n += 1
        return spans

    def check_sizes(self) -> None:
        """Refuse a local folder in which a shard is missing or has another size."""
        if self.cache:
            return
        for entry in self.entries:
            path = Path(self.folder, entry["file"])
            size = path.stat().st_size if path.is_file() else "missing"
            if size != entry["bytes"]:
                raise DataError(
                    f"{path}: {size} where {MANIFEST} has {entry['bytes']} bytes; prepare again"
                )

    @contextlib.contextmanager
    def _open_shard(self, shard: int) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of a shard, to be used inside."""
        if self.cache is None:
            yield self._map_local(shard)
            return
        entry = self.entries[shard]
        path = self.cache.get(entry["file"], entry["bytes"], entry["sha256"])
        try:
            yield self._open(shard, path)
        finally:
            self.cache.release(entry["file"])

    def _open_local(self, shard: int) -> dict[str, np.ndarray]:
        return self._open(shard, Path(self.folder, self.files[shard]))

    def _open(self, shard: int, path: Path) -> dict[str, np.ndarray]:
        """The arrays of a shard; refuses one whose tokens are not as the manifest says."""
        arrays = map_shard(path)
        tokens = arrays["tokens"]
        if len(tokens) != self.sizes[shard] or tokens.dtype != self.dtype:
            actual = f"{len(tokens)} tokens of {tokens.dtype}"
            expected = f"{self.sizes[shard]} of {self.dtype}"
            raise bad_shard(path, f"{actual} where {MANIFEST} has {expected}")
        return arrays

    def _check_documents(self, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuse documents that do not follow each other in the shard, or have no known source."""
        path = f"{self.folder}/{self.files[shard]}"
        starts = arrays["document_start"]
        sources = arrays["document_source"]
        rows = arrays["document_row"]
        are_whole = len(starts) == len(sources) == len(rows) > 0
        if not are_whole or not _follow_each_other(starts, self.sizes[shard]):
            raise bad_shard(path, "its documents do not follow each other")
        known = len(self.manifest["sources"])
        if sources.min() < 0 or sources.max() >= known:
            raise bad_shard(path, f"a document is from none of the {known} sources")


def _follow_each_other(starts: np.ndarray, size: int) -> bool:
    """Whether documents with these first tokens fill a shard of that size, in order."""
    if starts[0] != 0 or starts[-1] >= size:
        return False
    # Compared and not subtracted, because a stranger's numbers could overflow.
    return bool((starts[1:] > starts[:-1]).all())


def _open_file_of(folder: str | Path, name: str) -> io.BufferedReader:
    """Open a file of a prepared folder or URL."""
    if is_remote(str(folder)):
        return open_file(f"{folder}/{name}")
    return open(Path(folder, name), "rb")
