"""Token shards on disk: write, map, verify.

A prepared folder holds one safetensors file a shard (tokens, end-of-text after each document, and where each document
starts), the tokenizer, and `dataset.json`, the manifest, which is written last: a folder that has it is whole.
Invariant: every file is written aside, fsynced and renamed; sizes are checked when opened, hashes by `verify`.

A prepared folder may come from a stranger. Its manifest and the headers of its shards are therefore checked where they
are read: a name in them never leads out of the folder, and what they say of sizes and types fits the files.
"""

import contextlib
import hashlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import ValidationError

from dist_lm.config import DataConfig
from dist_lm.data.cache import ShardCache
from dist_lm.data.manifest import MANIFEST, Count, _Checked, _first_fault, read_manifest
from dist_lm.data.remote import is_remote, open_file
from dist_lm.disk import safetensors_head, write_file
from dist_lm.errors import DataError, UserError

_LONGEST_HEADER = 2**16  # bytes of a shard's header; ours have less than 2**9
_DTYPES: dict[str, np.dtype[Any]] = {
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Tensor(_Checked):
    """A one-dimensional tensor in the header of a safetensors file."""

    dtype: Literal["U16", "U32", "I64"]
    shape: tuple[Count]
    data_offsets: tuple[Count, Count]


class _Header(_Checked):
    """The tensors of a shard."""

    document_start: _Tensor
    document_source: _Tensor
    document_row: _Tensor
    tokens: _Tensor


class Span(NamedTuple):
    """A part of one document inside a sequence: tokens[start:stop] of its T+1."""

    source: str
    row: int
    start: int
    stop: int


def write_shard(
    path: Path,
    tokens: np.ndarray,
    starts: Sequence[int],
    sources: Sequence[int],
    rows: Sequence[int],
) -> dict[str, Any]:
    """Write one shard; its entry in the manifest. Document n starts at starts[n] (0 if begun in the shard before)."""
    arrays: dict[str, np.ndarray] = {
        "document_start": np.array(starts, "<i8"),
        "document_source": np.array(sources, "<i8"),
        "document_row": np.array(rows, "<i8"),
        "tokens": tokens,
    }
    head = safetensors_head(
        (name, _NAMES[a.dtype], a.shape, a.nbytes) for name, a in arrays.items()
    )
    sha256 = write_file(path, [head, *(array.view(np.uint8).data for array in arrays.values())])
    size = len(head) + sum(array.nbytes for array in arrays.values())
    return {"file": path.name, "tokens": len(tokens), "bytes": size, "sha256": sha256}


def map_shard(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a shard, read from disk only where touched."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise _refuse_shard(path, f"{size} bytes are no safetensors file")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    base = 8 + int.from_bytes(data[:8], "little")
    if base > min(len(data), 8 + _LONGEST_HEADER):
        raise _refuse_shard(path, f"its header has {base - 8} bytes of {size}")
    try:
        header = _Header.model_validate_json(data[8:base])
    except ValidationError as error:
        raise _refuse_shard(path, _first_fault(error)) from error
    arrays = {}
    for name, tensor in header:
        dtype = _DTYPES[tensor.dtype]
        (count,) = tensor.shape
        begin, end = tensor.data_offsets
        if end - begin != count * dtype.itemsize or base + end > len(data):
            raise _refuse_shard(
                path,
                f"{name}: bytes {begin} to {end} are not {count} of {tensor.dtype} in the file",
            )
        arrays[name] = np.frombuffer(data, dtype, count, base + begin)
    return arrays


def _refuse_shard(path: str | Path, reason: str) -> UserError:
    return DataError(f"{path}: not a shard as it was prepared: {reason}; nearest: prepare again")


def verify(folder: str | Path) -> list[str]:
    """Check every file of a prepared folder or URL against its manifest; the damaged ones, each with what is wrong."""
    manifest = read_manifest(folder)
    files = {"tokenizer.json": manifest["tokenizer"]["sha256"]}
    files |= {
        shard["file"]: shard["sha256"]
        for split in manifest["splits"].values()
        for shard in split["shards"]
    }
    damaged = []
    for name, sha256 in files.items():
        try:
            with (
                open_file(f"{folder}/{name}")
                if is_remote(str(folder))
                else open(Path(folder, name), "rb") as file
            ):
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            damaged.append(f"{name} ({error.strerror or error})")
        else:
            damaged += (
                [f"{name} (sha256 {found[:12]}, not {sha256[:12]})"] if found != sha256 else []
            )
    return damaged


class TokenShards:
    """The shards of one split ('train' or 'val') as sequences of T+1 tokens, the last shared with the next sequence.

    A folder at a URL is read through a cache of local copies, each in use only while it is read: one at a time.
    """

    def __init__(self, folder: str | Path, split: str, cache: ShardCache | None = None):
        assert (cache is not None) == is_remote(str(folder)), (
            "a folder at a URL, and no other, has a cache"
        )
        self.folder, self.cache, self.manifest = folder, cache, read_manifest(folder)
        self.entries: list[dict[str, Any]] = self.manifest["splits"][split]["shards"]
        self.files: list[str] = [entry["file"] for entry in self.entries]
        self.sizes: list[int] = [entry["tokens"] for entry in self.entries]
        for entry in self.entries if cache is None else []:
            path = Path(folder, entry["file"])
            size = path.stat().st_size if path.is_file() else "missing"
            if size != entry["bytes"]:
                raise DataError(
                    f"{path}: {size} where {MANIFEST} has {entry['bytes']} bytes; prepare again"
                )
        # a mapping holds a file open, so a few at a time: the order of training reads few shards at once
        self._map = lru_cache(maxsize=64)(
            lambda shard: self._open(shard, Path(folder, self.files[shard]))
        )
        self.dtype = np.dtype(self.manifest["tokenizer"]["dtype"])
        self._ends = lru_cache(
            lambda seq_len, stride: list(accumulate(self.counts(seq_len, stride)))
        )

    def _open(self, shard: int, path: Path) -> dict[str, np.ndarray]:
        """The arrays of a shard, which are what the manifest says."""
        arrays = map_shard(path)
        tokens = arrays["tokens"]
        if len(tokens) != self.sizes[shard] or tokens.dtype != self.dtype:
            found = f"{len(tokens)} tokens of {tokens.dtype}"
            raise _refuse_shard(
                path, f"{found} where {MANIFEST} has {self.sizes[shard]} of {self.dtype}"
            )
        return arrays

    @contextlib.contextmanager
    def _shard(self, shard: int) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of a shard, to be used inside."""
        if self.cache is None:
            yield self._map(shard)
            return
        entry = self.entries[shard]
        path = self.cache.get(entry["file"], entry["bytes"], entry["sha256"])
        try:
            yield self._open(shard, path)
        finally:
            self.cache.release(entry["file"])

    def counts(self, seq_len: int, stride: int) -> list[int]:
        """How many sequences each shard has."""
        return [(size - 1 - seq_len) // stride + 1 if size > seq_len else 0 for size in self.sizes]

    def count(self, data: DataConfig) -> int:
        """How many sequences there are in an epoch."""
        ends: list[int] = self._ends(data.seq_len, data.stride)
        return ends[-1] if ends else 0

    def tail_tokens(self, seq_len: int, stride: int) -> int:
        """Tokens at the shards' ends that are no sequence's target."""
        counts = zip(self.sizes, self.counts(seq_len, stride), strict=True)
        return sum(size - 1 - ((n - 1) * stride + seq_len if n else 0) for size, n in counts)

    def find(self, sequence: int, seq_len: int, stride: int) -> tuple[int, int]:
        """The shard of a sequence, and where in it its first token is."""
        ends: list[int] = self._ends(seq_len, stride)  # sequences up to the end of each shard
        assert 0 <= sequence < (ends[-1] if ends else 0), (
            f"sequence {sequence} is none of {ends[-1] if ends else 0}"
        )
        shard = bisect_right(ends, sequence)
        return shard, (sequence - (ends[shard - 1] if shard else 0)) * stride

    def read(self, sequences: Sequence[int] | np.ndarray, seq_len: int, stride: int) -> np.ndarray:
        """(N, seq_len + 1) tokens in the type they are stored in."""
        out = np.empty((len(sequences), seq_len + 1), self.dtype)
        places = [
            self.find(sequence, seq_len, stride) for sequence in np.asarray(sequences).tolist()
        ]
        rows = sorted(range(len(places)), key=places.__getitem__)
        for shard, here in groupby(rows, key=lambda row: places[row][0]):
            with self._shard(shard) as arrays:
                tokens = arrays["tokens"]
                for row in here:
                    start = places[row][1]
                    out[row] = tokens[start : start + seq_len + 1]
        return out

    def documents_of(self, sequence: int, seq_len: int, stride: int) -> list[Span]:
        """The documents that a sequence's T+1 tokens come from."""
        shard, first = self.find(sequence, seq_len, stride)
        names, spans, end = self.manifest["sources"], [], first + seq_len + 1
        with self._shard(shard) as arrays:
            self._check_documents(shard, arrays)
            starts = arrays["document_start"]
            n = int(np.searchsorted(starts, first, "right")) - 1
            while n < len(starts) and starts[n] < end:
                stop = int(starts[n + 1]) if n + 1 < len(starts) else self.sizes[shard]
                name = names[int(arrays["document_source"][n])]["name"]
                begin = max(int(starts[n]), first) - first
                spans.append(
                    Span(name, int(arrays["document_row"][n]), begin, min(stop, end) - first)
                )
                n += 1
        return spans

    def _check_documents(self, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuse documents that do not follow each other in the shard, or come from no source of the manifest."""
        path = f"{self.folder}/{self.files[shard]}"
        starts, sources = arrays["document_start"], arrays["document_source"]
        is_whole = len(starts) == len(sources) == len(arrays["document_row"]) > 0
        if (
            not is_whole
            or starts[0] != 0
            or starts[-1] >= self.sizes[shard]
            or (starts[1:] <= starts[:-1]).any()
        ):
            raise _refuse_shard(path, "its documents do not follow each other")
        known = len(self.manifest["sources"])
        if sources.min() < 0 or sources.max() >= known:
            raise _refuse_shard(path, f"a document is from none of the {known} sources")
