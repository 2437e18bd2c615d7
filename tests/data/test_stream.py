"""Streams: over whole passes every token once, the same order in every world, exact resume anywhere."""

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.config import Config, DataConfig, SourceConfig
from dist_lm.data.dataset import Dataset, open_dataset
from dist_lm.data.files import find_files
from dist_lm.data.formats import Reader
from dist_lm.data.mix import MixtureReader, merge_after
from dist_lm.data.order import MixtureSchedule, period_of
from dist_lm.data.preparing import prepare_dataset
from dist_lm.data.stream import PackedSequence, Stream, StreamSpec, best_fit
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import UserError

BYTES = train_tokenizer("byte", [])
LENGTH, WORLDS = 8, (1, 2, 3, 4, 8)


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
        return list(
            pool.map(lambda rank: work(rank, lambda value: gather(rank, value)), range(world))
        )


class ThreadChannel:
    """gather() and exchange() among threads, of what a real exchange can carry."""

    def __init__(self, rank: int, gather: Callable[[Any], list[Any]]):
        self.rank, self.gather = rank, gather

    def exchange(self, parts: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
        everything = self.gather([part.tolist() for part in parts])
        received = [torch.tensor(theirs[self.rank], dtype=torch.int64) for theirs in everything]
        assert [len(part) for part in received] == lengths
        return received


def recipe_of(path: Any, lanes: int = 3, **fields: Any) -> StreamSpec:
    source = SourceConfig(input=str(path))
    reader = Reader(source, find_files(source))
    parts = reader.parts(lanes)
    fields = {
        "seq_len": LENGTH,
        "keep": lambda texts: texts,
        "key": np.array([5], np.uint64),
    } | fields
    return StreamSpec(reader, parts, BYTES, lanes=min(lanes, len(parts)), **fields)


def read(
    recipe: StreamSpec, steps: list[int], state: Any = None, world: int = 1, threads: int = 0
) -> tuple[list[PackedSequence], Any]:
    """The sequences of so many per step, and where the stream then stands; ranks must agree on it all."""

    def work(rank: int, gather: Callable[[Any], list[Any]]) -> tuple[list[Any], Any]:
        pool = ThreadPoolExecutor(threads) if threads else None
        stream = Stream(recipe, state, rank=rank, world=world, gather=gather, pool=pool)
        rows = [row for count in steps for row in stream.deal(count)]
        if pool:
            pool.shutdown()
        return rows, stream.snapshot()

    ranks = together(world, work)
    assert len({tuple(lane for lane, _ in rows) for rows, _ in ranks}) == 1, (
        "ranks dealt differently"
    )
    rows = [
        next(row for _, row in place if row)
        for place in zip(*(rows for rows, _ in ranks), strict=True)
    ]
    state = ranks[0][1]
    for _, theirs in ranks:
        assert {**theirs, "lanes": 0} == {**state, "lanes": 0}
        state["lanes"].update(theirs["lanes"])
    return rows, json.loads(json.dumps(state))


def write_source(folder: Path, rng: random.Random, kind: str) -> list[str]:
    folder.mkdir()
    documents = []
    for number in range(rng.randint(1, 5)):
        texts = [
            "".join(rng.choices("abc \n", k=rng.choice([1, 3, 9, 40]))) + "."
            for _ in range(rng.randint(0, 9))
        ]
        documents += texts
        if kind == "parquet":
            pq.write_table(
                pa.table({"text": pa.array(texts, pa.string())}),
                folder / f"{number}.parquet",
                row_group_size=rng.randint(1, 4),
            )
        elif kind == "jsonl":
            lines = [json.dumps({"text": text}) + "\n" * rng.randint(1, 3) for text in texts]
            (folder / f"{number}.jsonl").write_text("".join(lines))
        else:
            (folder / f"{number}.csv").write_text(
                "text\n" + "".join('"' + text + '"\n' for text in texts)
            )
    return documents


def ids(rows: list[PackedSequence]) -> list[list[int]]:
    return [row.tokens.tolist() for row in rows]


def check_case(folder: Path, seed: int) -> None:
    """A random source: whole passes in one world, then cut anywhere and continued in others."""
    rng = random.Random(seed)
    kind, lanes, passes = (
        rng.choice(["parquet", "jsonl", "csv"]),
        rng.randint(1, 6),
        rng.randint(1, 3),
    )
    best, batch = rng.random() < 0.3, rng.randint(1, 9)
    documents = write_source(folder, rng, kind)
    held = {text for text in documents if sum(text.encode()) % 4 == 0}

    def keep(texts: Iterator[str]) -> Iterator[str] | None:
        text = "".join(texts)
        return None if text in held else iter([text])

    recipe = recipe_of(
        folder, lanes, passes=passes, best_fit=best, block=(rng.randint(1, 6), 2**20), keep=keep
    )
    kept = [text for text in documents if text not in held]
    if not kept:
        with pytest.raises(UserError, match="no document to train on; rule: at least one"):
            read(recipe_of(folder, lanes, keep=keep), [1])
        return
    whole, _ = read(recipe, [10**6])
    source = Counter(token for text in kept for token in [*BYTES.encode(text), BYTES.eot])
    source = Counter({token: number * passes for token, number in source.items()})
    if best:  # every token is an input once
        assert Counter(token for row in whole for token in row.tokens[:LENGTH].tolist()) == source
    else:  # every token but the first one of a lane is a target once
        targets = Counter(token for row in whole for token in row.tokens[1:].tolist())
        firsts = source - targets
        assert not targets - source and firsts.total() <= recipe.lanes
        assert not firsts - Counter(int(row.tokens[0]) for row in whole)
    steps = [batch] * (-(-len(whole) // batch) + 1)
    stop = rng.randint(0, len(steps))
    first, state = read(recipe, steps[:stop], world=rng.choice(WORLDS), threads=rng.randint(0, 2))
    second, last = read(
        recipe, steps[stop:], state, world=rng.choice(WORLDS), threads=rng.randint(0, 2)
    )
    assert ids(first + second) == ids(whole)
    assert last["pass"] == passes


def check_cases(folder: Path, monkeypatch: pytest.MonkeyPatch, seeds: range) -> None:
    monkeypatch.setattr("dist_lm.data.formats.SMALLEST_RANGE", 16)
    monkeypatch.setattr("dist_lm.data.stream.BATCH", (2, 30))
    for seed in seeds:
        try:
            check_case(folder / str(seed), seed)
        except BaseException as error:
            raise AssertionError(f"case {seed}") from error


def test_random_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_cases(tmp_path, monkeypatch, range(40))


@pytest.mark.slow
def test_more_random_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_cases(tmp_path, monkeypatch, range(40, 540))


@pytest.mark.campaign
def test_10000_random_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_cases(tmp_path, monkeypatch, range(1000, 11_000))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), length=st.integers(1, 12))
def test_best_fit_cuts_only_what_is_too_long(sizes: list[int], length: int) -> None:
    rows = best_fit(sizes, length)
    inputs = Counter(
        (number, at) for row in rows for number, begin, end in row for at in range(begin, end)
    )
    ahead = Counter(
        (row[0][0], row[0][2] - 1)
        for row in rows
        if sum(end - begin for _, begin, end in row) > length
    )
    assert inputs - ahead == Counter(
        {(number, at): 1 for number, size in enumerate(sizes) for at in range(size)}
    )
    for row in rows:
        total = sum(end - begin for _, begin, end in row)
        assert total <= length or (len(row) == 1 and total == length + 1)
    whole = {part[0] for row in rows for part in row if part[1:] == (0, sizes[part[0]])}
    assert whole >= {number for number, size in enumerate(sizes) if size <= length}


# --- mixtures


def dataset_of(folder: Path, lanes: int = 3, **data: Any) -> tuple[Config, Dataset]:
    """Two streams and prepared shards; the folder is that of a run."""
    rng = random.Random(1)
    if not folder.exists():
        folder.mkdir()
        write_source(folder / "a", rng, "parquet")
        write_source(folder / "b", rng, "jsonl")
        (folder / "c.txt").write_text(
            "#".join("".join(rng.choices("xyz ", k=30)) for _ in range(200))
        )
        prepare_dataset(
            DataConfig(input=str(folder / "c.txt"), separator="#", tokenizer="byte"), folder / "c"
        )
    weights = {"a": 0.7, "b": 0.2, "c": 0.1}
    named = {
        name: {"input": str(folder / name), "weight": weight} | data.pop(name, {})
        for name, weight in weights.items()
    }
    fields = {
        "sources": named,
        "stream": True,
        "seq_len": LENGTH,
        "global_batch": 7,
        "lanes": lanes,
        "val_fraction": 0.0,
    }
    config = Config.model_validate(
        {"data": fields | data, "run": {"dir": str(folder / "run"), "eval_every": 0}}, strict=False
    )
    return config, open_dataset(config, lambda work: work(), say=lambda _: None)


def global_batches(
    config: Config, data: Dataset, steps: range, world: int = 1, state: Any = None
) -> tuple[list[np.ndarray], dict[str, Any], list[dict[str, float]]]:
    """Tokens and targets of each step's places, where the streams then stand, and the shares reported."""
    batch = config.data.global_batch

    def work(rank: int, gather: Callable[[Any], list[Any]]) -> tuple[list[np.ndarray], Any, Any]:
        mix = MixtureReader(
            data,
            config.data,
            1,
            state=state,
            rank=rank,
            world=world,
            channel=ThreadChannel(rank, gather),
        )
        made, after, shares = [], {}, []
        for step in steps:
            table, targets = np.zeros((batch, LENGTH + 1), np.int64), np.zeros((batch, 1), np.int64)
            found = mix.read(step, table, targets[:, 0])
            after, shares = found["after"], [*shares, found["shares"]]
            made.append(np.concatenate([targets, table], 1))
        mix.close()
        return made, after, shares

    ranks = together(world, work)
    places = [
        np.stack([ranks[j % world][0][n][j // world] for j in range(batch)])
        for n in range(len(steps))
    ]
    return places, merge_after([after for _, after, _ in ranks]), ranks[0][2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_is_the_same_in_every_world_and_after_a_resume(
    tmp_path: Path, workers: int
) -> None:
    config, data = dataset_of(tmp_path / "x", workers=workers)
    whole, _, shares = global_batches(config, data, range(60))
    assert len({row.tobytes() for step in whole for row in step}) > 50
    for world in (2, 3, 7):
        before, state, _ = global_batches(config, data, range(23), world)
        behind, _, _ = global_batches(
            config, data, range(23, 60), 8 - world, json.loads(json.dumps(state))
        )
        assert np.array_equal(before + behind, whole)
    assert {key: round(value, 9) for key, value in shares[-1].items() if "passes" not in key} == {
        "asked_a": 0.7,
        "asked_b": 0.2,
        "asked_c": 0.1,
        "share_a": 0.7,
        "share_b": 0.2,
        "share_c": 0.1,
    }


@settings(max_examples=20, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.7, 0.2, 0.1, 1.0, 3.0, 1 / 3]), min_size=1, max_size=4),
    later=st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=4, max_size=4),
    start=st.integers(1, 300),
)
def test_shares_are_exact_over_every_period(
    weights: list[float], later: list[float], start: int
) -> None:
    stages = [
        (0, weights),
        *([(start, later[: len(weights)])] if sum(later[: len(weights)]) else []),
    ]
    mixture = MixtureSchedule(stages)
    sources, earlier = mixture.at(np.arange(1500))
    counts = np.zeros(len(weights), int)
    for source, before in zip(sources, earlier, strict=True):
        assert counts[source] == before
        counts[source] += 1
    assert (mixture.before(1500) == counts).all()
    for (begin, wanted), end in zip(stages, [*(s for s, _ in stages[1:]), 1500], strict=True):
        period = sum(period_of(wanted))
        for at in range(begin, end - period, period):
            here = np.bincount(sources[at : at + period], minlength=len(wanted))
            assert (here == period_of(wanted)).all()
            assert (abs(here / period - np.array(wanted) / sum(wanted)) < 1e-3).all()


def sources_of(steps: list[np.ndarray], kinds: dict[str, str]) -> list[str]:
    """Which source each row of each step came from, told by its letters; - where there is no target."""
    return [
        "".join(
            next(
                (n for n, letters in kinds.items() if set(BYTES.decode(row[1:])) & set(letters)),
                "?",
            )
            if row[0]
            else "-"
            for row in step
        )
        for step in steps
    ]


LETTERS = {"c": "xyz", "a": "abc \n."}  # a and b are written with the same letters


def test_what_happens_when_a_source_ends(tmp_path: Path) -> None:
    config, data = dataset_of(tmp_path / "x", b={"at_end": "stop"})
    stopped, state, _ = global_batches(config, data, range(60), 2)
    assert state["end"] and not any((step[:, 0] > 0).any() for step in stopped[-1:])
    ended = max(n for n, step in enumerate(stopped) if (step[:, 0] > 0).any())
    config, data = dataset_of(tmp_path / "x", b={"at_end": "hand_on"})
    handed, state, shares = global_batches(config, data, range(60), 3)
    assert state["end"] is None and state["ended"] == [[(ended + 1) * 7, 1]]
    assert (np.array([step[:, 0] for step in handed[ended + 1 :]]) == LENGTH).all()
    assert (
        shares[-1]["asked_b"] == shares[-1]["share_b"] == 0
        and round(shares[-1]["asked_a"], 9) == 0.875
    )
    assert np.array_equal(stopped[:ended], handed[:ended])


def test_stages_change_the_mixture(tmp_path: Path) -> None:
    stages = (
        {"from_step": 10, "weights": {"c": 1.0}},
        {"from_step": 20, "weights": {"a": 1.0, "c": 1.0}},
    )
    config, data = dataset_of(tmp_path / "x", stages=stages)
    steps = sources_of(global_batches(config, data, range(30), 2)[0], LETTERS)
    assert all(set(step) == {"c"} for step in steps[10:20])
    assert "".join(steps[20:]).count("c") == "".join(steps[20:]).count("a") == 35
    assert "".join(steps[:10]).count("c") == 7
