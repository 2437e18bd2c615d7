"""disk."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_CHUNK = 16 * 2**20


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write, hash and fsync a file; its size and sha256."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for whole in parts:
            part = memoryview(whole)
            for begin in range(
                0, len(part), _CHUNK
            ):  # hashing and writing leave Python alone while they work
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
