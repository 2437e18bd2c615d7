"""Token shards on disk: write, map, verify.

A prepared folder holds one safetensors file a shard (tokens, end-of-text after each document, and where each document
starts), the tokenizer, and `dataset.json`, the manifest, which is written last: a folder that has it is whole.
Invariant: every file is written aside, fsynced and renamed; sizes are checked when opened, hashes by `verify`.
"""

import contextlib
import hashlib
import json
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_lm.config import DataConfig, UserError
from dist_lm.remote import ShardCache, exists, fetch_small, is_remote, open_file

MANIFEST = "dataset.json"
FORMAT = 1
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 16 * 2**20
_DTYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Span(NamedTuple):
    """A part of one document inside a sequence: tokens[start:stop] of its T+1."""

    source: str
    row: int
    start: int
    stop: int


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write, hash and fsync a file; its size and sha256."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for whole in parts:
            part = memoryview(whole)
            for begin in range(0, len(part), _CHUNK):  # hashing and writing leave Python alone while they work
                chunk = part[begin : begin + _CHUNK]
                digest.update(chunk)
                size += len(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write aside, fsync, rename, fsync the folder; the sha256 of what was written."""
    aside = path.with_name(f"tmp-{path.name}")
    _, sha256 = write_parts(aside, parts)
    os.replace(aside, path)
    sync_folder(path.parent)
    return sha256


def safetensors_head(tensors: Iterable[tuple[str, str, Sequence[int], int]], **more: Any) -> bytes:
    """How a safetensors file begins: the name, type, shape and bytes of each tensor that follows."""
    end = 0
    for name, dtype, shape, size in tensors:
        begin, end = end, end + size
        more[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(more).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text


def write_json(path: Path, content: Any) -> None:
    write_file(path, [(json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()])


def write_shard(
    path: Path, tokens: np.ndarray, starts: Sequence[int], sources: Sequence[int], rows: Sequence[int]
) -> dict[str, Any]:
    """Write one shard; its entry in the manifest. Document n starts at starts[n] (0 if begun in the shard before)."""
    arrays: dict[str, np.ndarray] = {
        "document_start": np.array(starts, "<i8"),
        "document_source": np.array(sources, "<i8"),
        "document_row": np.array(rows, "<i8"),
        "tokens": tokens,
    }
    head = safetensors_head((name, _NAMES[a.dtype], a.shape, a.nbytes) for name, a in arrays.items())
    sha256 = write_file(path, [head, *(array.view(np.uint8).data for array in arrays.values())])
    size = len(head) + sum(array.nbytes for array in arrays.values())
    return {"file": path.name, "tokens": len(tokens), "bytes": size, "sha256": sha256}


def map_shard(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a shard, read from disk only where touched."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    base = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:base])
    return {
        name: np.frombuffer(data, _DTYPES[entry["dtype"]], entry["shape"][0], base + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def find_prepared(path: str | Path) -> bool:
    """Whether a path or URL is a prepared folder."""
    return exists(f"{path}/{MANIFEST}") if is_remote(str(path)) else Path(path, MANIFEST).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    file = f"{folder}/{MANIFEST}"
    try:
        content = fetch_small(file) if is_remote(file) else Path(file).read_bytes()
        manifest: dict[str, Any] = json.loads(content)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable manifest ({type(error).__name__}); prepare again", 65) from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{file}: format {manifest.get('format')} is not the format {FORMAT} of this version", 65)
    return manifest


def verify(folder: str | Path) -> list[str]:
    """Check every file of a prepared folder or URL against its manifest; the damaged ones, each with what is wrong."""
    manifest = read_manifest(folder)
    files = {"tokenizer.json": manifest["tokenizer"]["sha256"]}
    files |= {shard["file"]: shard["sha256"] for split in manifest["splits"].values() for shard in split["shards"]}
    damaged = []
    for name, sha256 in files.items():
        try:
            with open_file(f"{folder}/{name}") if is_remote(str(folder)) else open(Path(folder, name), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            damaged.append(f"{name} ({error.strerror or error})")
        else:
            damaged += [f"{name} (sha256 {found[:12]}, not {sha256[:12]})"] if found != sha256 else []
    return damaged


class TokenShards:
    """The shards of one split ('train' or 'val') as sequences of T+1 tokens, the last shared with the next sequence.

    A folder at a URL is read through a cache of local copies, each in use only while it is read: one at a time.
    """

    def __init__(self, folder: str | Path, split: str, cache: ShardCache | None = None):
        assert (cache is not None) == is_remote(str(folder)), "a folder at a URL, and no other, has a cache"
        self.folder, self.cache, self.manifest = folder, cache, read_manifest(folder)
        self.entries: list[dict[str, Any]] = self.manifest["splits"][split]["shards"]
        self.files: list[str] = [entry["file"] for entry in self.entries]
        self.sizes: list[int] = [entry["tokens"] for entry in self.entries]
        for entry in self.entries if cache is None else []:
            path = Path(folder, entry["file"])
            size = path.stat().st_size if path.is_file() else "missing"
            if size != entry["bytes"]:
                raise UserError(f"{path}: {size} where {MANIFEST} has {entry['bytes']} bytes; prepare again", 65)
        # a mapping holds a file open, so a few at a time: the order of training reads few shards at once
        self._map = lru_cache(maxsize=64)(lambda shard: map_shard(Path(folder, self.files[shard])))
        self.dtype = np.dtype(self.manifest["tokenizer"]["dtype"])
        self._ends = lru_cache(lambda seq_len, stride: list(accumulate(self.counts(seq_len, stride))))

    @contextlib.contextmanager
    def _shard(self, shard: int) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of a shard, to be used inside."""
        if self.cache is None:
            yield self._map(shard)
            return
        entry = self.entries[shard]
        path = self.cache.get(entry["file"], entry["bytes"], entry["sha256"])
        try:
            yield map_shard(path)
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
        assert 0 <= sequence < (ends[-1] if ends else 0), f"sequence {sequence} is none of {ends[-1] if ends else 0}"
        shard = bisect_right(ends, sequence)
        return shard, (sequence - (ends[shard - 1] if shard else 0)) * stride

    def read(self, sequences: Sequence[int] | np.ndarray, seq_len: int, stride: int) -> np.ndarray:
        """(N, seq_len + 1) tokens in the type they are stored in."""
        out = np.empty((len(sequences), seq_len + 1), self.dtype)
        places = [self.find(sequence, seq_len, stride) for sequence in np.asarray(sequences).tolist()]
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
            starts = arrays["document_start"]
            n = int(np.searchsorted(starts, first, "right")) - 1
            while n < len(starts) and starts[n] < end:
                stop = int(starts[n + 1]) if n + 1 < len(starts) else self.sizes[shard]
                name = names[int(arrays["document_source"][n])]["name"]
                begin = max(int(starts[n]), first) - first
                spans.append(Span(name, int(arrays["document_row"][n]), begin, min(stop, end) - first))
                n += 1
        return spans
