"""Text that is made up from a seed: words as frequent as in a language (Zipf), documents of 4 kB.

All claims about text use it, so that none depends on files that others do not have.
"""

import contextlib
import gzip
import json
from collections.abc import Iterator
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

MB = 10**6
_WORDS = 60_000
_ROW_GROUP = 1000  # rows of Parquet


def documents(megabytes: float, seed: int = 1) -> Iterator[str]:
    """Documents of so much text in all."""
    rng = np.random.default_rng(seed)
    table = _words()
    endings = np.repeat(np.arange(4), [87, 7, 5, 1])  # as the table has them, by their frequency
    left = megabytes * MB
    while left > 0:
        sizes = rng.lognormal(6, 1, 500).astype(int) + 1
        ranks = (_WORDS ** rng.random(sizes.sum())).astype(int) - 1  # density 1 / rank
        ending = endings[rng.integers(0, 100, len(ranks))]
        chosen = table[ranks + _WORDS * ending].tolist()
        for begin, end in pairwise([0, *np.cumsum(sizes).tolist()]):
            document = "".join(chosen[begin:end])
            yield document
            left -= len(document)
            if left <= 0:
                return


@cache
def _words() -> np.ndarray:
    """Each word with each ending; the more frequent a word, the shorter it is."""
    rng = np.random.default_rng(1)
    sounds = []
    for consonant in "bcdfghklmnprstvwz":
        for vowel in "aeiou":
            sounds += [consonant + vowel + end for end in ("", "n", "r", "st")]
    drawn = rng.integers(len(sounds), size=(2 * _WORDS, 4)).tolist()
    lengths = rng.integers(1, 4, size=2 * _WORDS).tolist()
    words: dict[str, None] = {}
    for parts, length in zip(drawn, lengths, strict=True):
        if len(words) > 100:
            length += 1
        words["".join([sounds[part] for part in parts[:length]])] = None
    frequent = list(words)[:_WORDS]
    assert len(frequent) == _WORDS
    table: list[str] = []
    for ending in (" ", ", ", ". ", ".\n"):
        table += [word + ending for word in frequent]
    return np.array(table, object)


def write_files(folder: Path, kind: str, megabytes: float, files: int) -> list[Path]:
    """The corpus as files of one kind: parquet, jsonl or jsonl.gz."""
    folder.mkdir()
    paths = []
    for number in range(files):
        path = folder / f"{number}.{kind}"
        texts = documents(megabytes / files, seed=number)
        if kind == "parquet":
            _write_parquet(path, texts)
        else:
            _write_json_lines(path, texts)
        paths.append(path)
    return paths


def _write_parquet(path: Path, texts: Iterator[str]) -> None:
    import pyarrow as pa  # it starts a thread, so it is imported after a fork
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        while group := list(islice(texts, _ROW_GROUP)):
            writer.write_table(pa.table({"text": group}))


def _write_json_lines(path: Path, texts: Iterator[str]) -> None:
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(open(path, "wb"))
        if path.suffix == ".gz":
            file = stack.enter_context(gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1))
        for text in texts:
            file.write(json.dumps({"text": text}).encode() + b"\n")


def read_parquet(paths: list[Path]) -> list[str]:
    """All documents of some files."""
    import pyarrow.parquet as pq  # as above

    texts: list[str] = []
    for path in paths:
        texts += pq.read_table(path)["text"].to_pylist()
    return texts


def make_tokenizer(folder: Path, size: int, megabytes: float) -> Path:
    """A BPE of so many tokens, learned from a part of the text."""
    from dist_lm.data.tokenizer_training import train_tokenizer  # late, as above

    folder.mkdir()
    train_tokenizer(f"bpe:{size}", documents(megabytes, seed=0)).save(folder)
    return folder / "tokenizer.json"
