"""Raw text: the documents of a file, glob, folder, hub dataset or the Python standard library, in a fixed order.

A .txt file is one document (or several, between `data.separator`s); a row of .jsonl, .json, .csv and .parquet is one.
Invariant: the same input gives the same documents in the same order, a chunk at a time, in bounded memory; what is not
UTF-8 text is refused by file and row.
"""

import codecs
import glob
import gzip
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dist_lm.config import DataConfig, UserError, did_you_mean

CHUNK = 2**20  # bytes read at once
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
PACKINGS = ("", ".gz", ".zst")
_NOT_STDLIB = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip"}


class Source(NamedTuple):
    """A file, or a part of a hub dataset; `size` in bytes as it lies on disk, 0 if unknown."""

    name: str
    path: str
    size: int


class Chunk(NamedTuple):
    """A stretch of a document, which is told from others by its source's number and its row there."""

    source: int
    row: int
    text: str


def find_sources(data: DataConfig) -> list[Source]:
    """The files of `data.input` in a fixed order."""
    if data.input == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in root.rglob("*.py") if not _NOT_STDLIB.intersection(f.relative_to(root).parts)]
        return _sources(files, root)
    path = Path(data.input)
    if path.is_file():
        return _sources([path], path.parent)
    if path.is_dir():
        return _sources([f for f in path.rglob("*") if f.is_file() and _format(f.name)], path)
    raise UserError(f"data.input={data.input!r}: no such file", 65)


def read_chunks(sources: list[Source], data: DataConfig, skipped: Counter[str]) -> Iterator[Chunk]:
    for number, source in enumerate(sources):
        for row, text in _read_text(source, data.separator):
            yield Chunk(number, row, text)


def _sources(files: list[Path], root: Path) -> list[Source]:
    named = sorted((f.relative_to(root).as_posix(), f) for f in files)
    return [Source(name, str(file), file.stat().st_size) for name, file in named]


def _format(name: str) -> str:
    return next((f for f in FORMATS for p in PACKINGS if name.endswith(f + p)), "")


def _read_text(source: Source, separator: str | None) -> Iterator[tuple[int, str]]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(source.path, "rb") as file:
        while data := file.read(CHUNK):
            yield 0, decoder.decode(data)
