"""Streams: over whole passes every token once, the same order in every world, exact resume anywhere."""

import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_lm.config import SourceConfig, UserError
from dist_lm.sources import Reader, find_sources
from dist_lm.stream import Recipe, Row, Stream
from dist_lm.text import train_tokenizer

BYTES = train_tokenizer("byte", [])


def together(world: int, work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """Run work(rank, gather) in a thread a rank."""
    barrier, box = threading.Barrier(world, timeout=60), [None] * world

    def gather(rank: int, value: Any) -> list[Any]:
        box[rank] = json.dumps(value)  # what a real exchange can carry
        barrier.wait()
        found = [json.loads(text) for text in box]
        barrier.wait()
        return found

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: work(rank, lambda value: gather(rank, value)), range(world)))


def recipe_of(path: Any, lanes: int = 3, **fields: Any) -> Recipe:
    source = SourceConfig(input=str(path))
    reader = Reader(source, find_sources(source))
    parts = reader.parts(lanes)
    fields = {"seq_len": 8, "keep": lambda texts: texts, "key": np.array([5], np.uint64)} | fields
    return Recipe(reader, parts, BYTES, lanes=min(lanes, len(parts)), **fields)


def read(
    recipe: Recipe, steps: list[int], state: Any = None, world: int = 1, threads: int = 0
) -> tuple[list[Row], Any]:
    """The sequences of so many per step, and where the stream then stands; ranks must agree on it all."""

    def work(rank: int, gather: Callable[[Any], list[Any]]) -> tuple[list[Any], Any]:
        pool = ThreadPoolExecutor(threads) if threads else None
        stream = Stream(recipe, state, rank=rank, world=world, gather=gather, pool=pool)
        rows = [row for count in steps for row in stream.deal(count)]
        if pool:
            pool.shutdown()
        return rows, stream.snapshot()

    ranks = together(world, work)
    assert len({tuple(lane for lane, _ in rows) for rows, _ in ranks}) == 1, "ranks dealt differently"
    rows = [next(row for _, row in place if row) for place in zip(*(rows for rows, _ in ranks), strict=True)]
    state = ranks[0][1]
    for _, theirs in ranks:
        assert {**theirs, "lanes": 0} == {**state, "lanes": 0}
        state["lanes"].update(theirs["lanes"])
    return rows, json.loads(json.dumps(state))


def write_source(folder: Path, rng: random.Random, kind: str) -> list[str]:
    folder.mkdir()
    documents = []
    for number in range(rng.randint(1, 5)):
        texts = ["".join(rng.choices("abc \n", k=rng.choice([1, 3, 9, 40]))) + "." for _ in range(rng.randint(0, 9))]
        documents += texts
        if kind == "parquet":
            pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / f"{number}.parquet",
                           row_group_size=rng.randint(1, 4))  # fmt: skip
        elif kind == "jsonl":
            lines = [json.dumps({"text": text}) + "\n" * rng.randint(1, 3) for text in texts]
            (folder / f"{number}.jsonl").write_text("".join(lines))
        else:
            (folder / f"{number}.csv").write_text("text\n" + "".join('"' + text + '"\n' for text in texts))
    return documents


def ids(rows: list[Row]) -> list[list[int]]:
    return [row.tokens.tolist() for row in rows]


def tokens_trained_on(rows: list[Row], best: bool) -> Counter[int]:
    """Every token that is an input, or the target that no sequence has as input."""
    if best:
        return Counter(int(t) for row in rows for t in row.tokens[:8])
    return Counter(int(t) for row in rows for t in row.tokens[1:])


def check_case(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    kind, lanes, passes = rng.choice(["parquet", "jsonl", "csv"]), rng.randint(1, 6), rng.randint(1, 3)
    best, batch = rng.random() < 0.3, rng.randint(1, 9)
    documents = write_source(folder, rng, kind)
    held = {text for text in documents if hash_of(text) % 4 == 0}
    recipe = recipe_of(
        folder, lanes, passes=passes, best_fit=best, block=(rng.randint(1, 6), 2**20), seq_len=8,
        keep=lambda texts: None if (text := "".join(texts)) in held else iter([text]),
    )  # fmt: skip
    kept = [text for text in documents if text not in held]
    if not kept:
        with pytest.raises(UserError, match="no document to train on"):
            read(recipe_of(folder, lanes, keep=recipe.keep), [1])
        return
    whole, end = read(recipe, [10**6])
    expected = Counter(b for text in kept for b in [*BYTES.encode(text), BYTES.eot])
    expected = Counter({token: n * passes for token, n in expected.items()})
    got = tokens_trained_on(whole, best)
    if not best:  # the first token of each lane is an input alone
        assert (expected - got).total() <= recipe.lanes and not got - expected
        firsts = Counter(int(row.tokens[0]) for row in whole)
        assert not (expected - got) - firsts
    else:
        assert got == expected
    assert all(1 < len(row.tokens) <= 9 or best for row in whole)
    cut = rng.randint(0, len(whole))
    for world in rng.sample([1, 2, 3, 4, 8], 2):
        steps = [batch] * (-(-len(whole) // batch) + 1)
        stop = rng.randint(0, len(steps))
        first, state = read(recipe, steps[:stop], world=world, threads=rng.randint(0, 2))
        second, last = read(recipe, steps[stop:], state, world=rng.choice([1, 2, 3, 4, 8]), threads=rng.randint(0, 2))
        assert ids(first + second) == ids(whole), (seed, world, stop)
        assert last["pass"] == passes
    del cut, end


def hash_of(text: str) -> int:
    return sum(text.encode()) * 7 % 61


def test_random_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_lm.sources.SMALLEST_RANGE", 16)
    monkeypatch.setattr("dist_lm.stream.BATCH", (2, 30))
    for seed in range(200):
        check_case(tmp_path / str(seed), seed)
