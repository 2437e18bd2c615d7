"""One token shard on disk: a safetensors file with tokens, and where each document starts.

A shard may come from a stranger. Its header is therefore checked where it is read: what it says of
sizes and types fits the file.
"""

import mmap
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from dist_lm.disk import disk_may_fail, safetensors_head, write_file
from dist_lm.errors import DataError, UserError
from dist_lm.outside import CheckedModel, Count, check, parse_json

_LONGEST_HEADER = 2**16  # bytes of a shard's header; ours have less than 2**9
_HEADER_SIZE_BYTES = 8  # in front of the header
_DTYPES: dict[str, np.dtype[Any]] = {
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorHeader(CheckedModel):
    """A one-dimensional tensor in the header of a safetensors file."""

    dtype: Literal["U16", "U32", "I64"]
    shape: Annotated[list[Count], Field(min_length=1, max_length=1)]
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]


class ShardHeader(CheckedModel):
    """The tensors of a shard: its tokens, and three numbers for each document in it."""

    document_start: TensorHeader  # its first token
    document_source: TensorHeader  # the file that it comes from, in the manifest's list
    document_row: TensorHeader
    tokens: TensorHeader


def write_shard(
    path: Path,
    tokens: np.ndarray,
    starts: Sequence[int],
    sources: Sequence[int],
    rows: Sequence[int],
) -> dict[str, Any]:
    """Write one shard; returns its entry in the manifest.

    Document n starts at starts[n], which is 0 if it was begun in the shard before.
    """
    arrays: dict[str, np.ndarray] = {
        "document_start": np.array(starts, "<i8"),
        "document_source": np.array(sources, "<i8"),
        "document_row": np.array(rows, "<i8"),
        "tokens": tokens,
    }
    tensors = []
    for name, values in arrays.items():
        tensors.append((name, _NAMES[values.dtype], values.shape, values.nbytes))
    head = safetensors_head(tensors)
    contents = [values.view(np.uint8).data for values in arrays.values()]
    sha256 = write_file(path, [head, *contents])
    size = len(head) + sum(values.nbytes for values in arrays.values())
    return {"file": path.name, "tokens": len(tokens), "bytes": size, "sha256": sha256}


def map_shard(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a shard, read from disk only where they are touched."""
    with disk_may_fail(path, "a shard is not read"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _HEADER_SIZE_BYTES:
            raise bad_shard(path, f"{size} bytes are no safetensors file")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header_size = int.from_bytes(data[:_HEADER_SIZE_BYTES], "little")
    base = _HEADER_SIZE_BYTES + header_size  # where the tensors begin
    if header_size > _LONGEST_HEADER or base > len(data):
        raise bad_shard(path, f"its header has {header_size} bytes of {size}")
    refuse = partial(bad_shard, path)
    header = check(parse_json(data[_HEADER_SIZE_BYTES:base], refuse), ShardHeader, refuse)
    arrays = {}
    for name, tensor in header:
        dtype = _DTYPES[tensor.dtype]
        (count,) = tensor.shape
        begin, end = tensor.data_offsets
        if end - begin != count * dtype.itemsize or base + end > len(data):
            fault = f"{name}: bytes {begin} to {end} are not {count} of {tensor.dtype} in the file"
            raise bad_shard(path, fault)
        arrays[name] = np.frombuffer(data, dtype, count, base + begin)
    return arrays


def bad_shard(path: str | Path, reason: str) -> UserError:
    """The error over a shard whose content is not what was written."""
    return DataError(f"{path}: not a shard as it was prepared: {reason}; nearest: prepare again")
