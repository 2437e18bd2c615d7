"""Streams: over whole passes every token once, one order in every world, exact resume anywhere."""

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
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
from dist_lm.data.lane import Amount, Lane, StreamSpec
from dist_lm.data.mix import MixtureReader, merge_after
from dist_lm.data.order import MixtureSchedule, period_of
from dist_lm.data.packing import PackedSequence, best_fit
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.stream import Dealt, Stream
from dist_lm.data.text.files import find_files
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import CheckpointError, UserError

BYTES = train_tokenizer("byte", [])
LENGTH = 8
WORLDS = (1, 2, 3, 4, 8)


def together(world: int, work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """Run work(rank, gather) in a thread a rank."""
    barrier = threading.Barrier(world, timeout=60)
    box = [""] * world

    def gather(rank: int, value: Any) -> list[Any]:
        box[rank] = json.dumps(value)  # what a real exchange can carry
        barrier.wait()
        found = [json.loads(text) for text in box]
        barrier.wait()
        return found

    def work_of(rank: int) -> Any:
        return work(rank, partial(gather, rank))

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work_of, range(world)))


class ThreadChannel:
    """gather() and exchange() among threads, of what a real exchange can carry."""

    def __init__(self, rank: int, gather: Callable[[Any], list[Any]]):
        self.rank = rank
        self.gather = gather

    def exchange(self, parts: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
        sent = self.gather([part.tolist() for part in parts])
        received = [torch.tensor(of_rank[self.rank], dtype=torch.int64) for of_rank in sent]
        assert [len(part) for part in received] == lengths
        return received


def spec_of(path: Any, lanes: int = 3, **fields: Any) -> StreamSpec:
    source = SourceConfig(input=str(path))
    reader = Reader(source, find_files(source))
    parts = reader.parts(lanes)
    fields = {
        "seq_len": LENGTH,
        "keep": lambda texts: texts,
        "key": np.array([5], np.uint64),
    } | fields
    return StreamSpec("text", reader, parts, BYTES, lanes=min(lanes, len(parts)), **fields)


def read(
    spec: StreamSpec, steps: list[int], state: Any = None, world: int = 1, threads: int = 0
) -> tuple[list[PackedSequence], Any]:
    """The sequences of steps of these sizes, and where the stream then stands; all ranks agree."""

    def work(rank: int, gather: Callable[[Any], list[Any]]) -> tuple[list[Dealt], Any]:
        pool = ThreadPoolExecutor(threads) if threads else None
        stream = Stream(spec, state, rank=rank, world=world, gather=gather, pool=pool)
        dealt = []
        for count in steps:
            dealt += stream.deal(count)
        if pool:
            pool.shutdown()
        return dealt, stream.snapshot()

    ranks = together(world, work)
    sequences = []
    for turns in zip(*(dealt for dealt, _ in ranks), strict=True):
        assert len({turn.lane for turn in turns}) == 1, "ranks dealt differently"
        sequences.append(next(turn.sequence for turn in turns if turn.sequence))
    _, after = ranks[0]
    for _, after_rank in ranks:
        assert {**after_rank, "lanes": 0} == {**after, "lanes": 0}
        after["lanes"].update(after_rank["lanes"])
    return sequences, json.loads(json.dumps(after))


def write_source(folder: Path, rng: random.Random, kind: str) -> list[str]:
    folder.mkdir()
    documents = []
    for number in range(rng.randint(1, 5)):
        texts = []
        for _ in range(rng.randint(0, 9)):
            letters = rng.choices("abc \n", k=rng.choice([1, 3, 9, 40]))
            texts.append("".join(letters) + ".")
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
            lines = [f'"{text}"\n' for text in texts]
            (folder / f"{number}.csv").write_text("text\n" + "".join(lines))
    return documents


def ids(rows: list[PackedSequence]) -> list[list[int]]:
    return [row.tokens.tolist() for row in rows]


def check_case(folder: Path, seed: int) -> None:
    """A random source: whole passes in one world, then cut anywhere and continued in others."""
    rng = random.Random(seed)
    kind = rng.choice(["parquet", "jsonl", "csv"])
    lanes = rng.randint(1, 6)
    passes = rng.randint(1, 3)
    best = rng.random() < 0.3
    batch = rng.randint(1, 9)
    documents = write_source(folder, rng, kind)
    held = {text for text in documents if sum(text.encode()) % 4 == 0}

    def keep(texts: Iterator[str]) -> Iterator[str] | None:
        text = "".join(texts)
        return None if text in held else iter([text])

    block = Amount(rng.randint(1, 6), 2**20)
    spec = spec_of(folder, lanes, passes=passes, best_fit=best, block=block, keep=keep)
    kept = [text for text in documents if text not in held]
    if not kept:
        with pytest.raises(UserError, match="no document to train on; rule: at least one"):
            read(spec_of(folder, lanes, keep=keep), [1])
        return
    whole, _ = read(spec, [10**6])
    source = Counter[int]()
    for text in kept * passes:
        source.update([*BYTES.encode(text), BYTES.eot])
    inputs = Counter[int]()
    targets = Counter[int]()
    for row in whole:
        inputs.update(row.tokens[:LENGTH].tolist())
        targets.update(row.tokens[1:].tolist())
    if best:  # every token is an input once
        assert inputs == source
    else:  # every token but the first one of a lane is a target once
        firsts = source - targets
        assert not targets - source and firsts.total() <= spec.lanes
        assert not firsts - Counter(int(row.tokens[0]) for row in whole)
    steps = [batch] * (-(-len(whole) // batch) + 1)
    stop = rng.randint(0, len(steps))
    first, state = read(spec, steps[:stop], world=rng.choice(WORLDS), threads=rng.randint(0, 2))
    second, last = read(
        spec, steps[stop:], state, world=rng.choice(WORLDS), threads=rng.randint(0, 2)
    )
    assert ids(first + second) == ids(whole)
    assert last["pass"] == passes


def check_cases(folder: Path, monkeypatch: pytest.MonkeyPatch, seeds: range) -> None:
    monkeypatch.setattr("dist_lm.data.text.formats.SMALLEST_RANGE", 16)
    monkeypatch.setattr("dist_lm.data.lane.LARGEST_BATCH", Amount(2, 30))
    for seed in seeds:
        try:
            check_case(folder / str(seed), seed)
        except BaseException as error:
            raise AssertionError(f"case {seed}") from error


def test_random_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_cases(tmp_path, monkeypatch, range(40))


@pytest.mark.slow
@pytest.mark.long
def test_more_random_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_cases(tmp_path, monkeypatch, range(40, 240))


@pytest.mark.campaign
def test_10000_random_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_cases(tmp_path, monkeypatch, range(240, 10_240))


def test_reading_ahead_never_comes_between_a_lane_and_what_it_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that another thread makes while a lane is asked what it has are not lost."""
    monkeypatch.setattr("dist_lm.data.lane.LARGEST_BATCH", Amount(2, 30))
    write_source(tmp_path / "x", random.Random(3), "jsonl")
    spec = spec_of(tmp_path / "x", lanes=1, passes=1)
    whole, _ = read(spec, [10**6])
    count = Lane._count

    def slow_count(lane: Lane, passed: int) -> int:
        found = count(lane, passed)
        for _ in range(3):
            reader = threading.Thread(target=lane.read_ahead, args=(10**6,))
            reader.start()
            reader.join()
        return found

    monkeypatch.setattr(Lane, "_count", slow_count)
    disturbed, _ = read(spec, [1] * (len(whole) + 1))
    assert ids(disturbed) == ids(whole) != []


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), length=st.integers(1, 12))
def test_best_fit_cuts_only_what_is_too_long(sizes: list[int], length: int) -> None:
    inputs = Counter[tuple[int, int]]()  # by document and place in it
    whole = set()
    for fragments in best_fit(sizes, length):
        total = sum(end - begin for _, begin, end in fragments)
        assert total <= length or (len(fragments) == 1 and total == length + 1)
        for number, begin, end in fragments:
            inputs.update((number, at) for at in range(begin, end))
            if (begin, end) == (0, sizes[number]):
                whole.add(number)
        if total > length:  # its last token is a target only
            number, _, end = fragments[0]
            inputs[number, end - 1] -= 1
    expected = Counter[tuple[int, int]]()
    for number, size in enumerate(sizes):
        expected.update((number, at) for at in range(size))
    assert inputs == expected
    assert whole >= {number for number, size in enumerate(sizes) if size <= length}


# --- mixtures


def dataset_of(folder: Path, lanes: int = 3, **data: Any) -> tuple[Config, Dataset]:
    """Two streams and prepared shards; the folder is that of a run."""
    rng = random.Random(1)
    if not folder.exists():
        folder.mkdir()
        write_source(folder / "a", rng, "parquet")
        write_source(folder / "b", rng, "jsonl")
        texts = ["".join(rng.choices("xyz ", k=30)) for _ in range(200)]
        text = folder / "c.txt"
        text.write_text("#".join(texts))
        prepare_dataset(DataConfig(input=str(text), separator="#", tokenizer="byte"), folder / "c")
    named = {}
    for name, weight in {"a": 0.7, "b": 0.2, "c": 0.1}.items():
        named[name] = {"input": str(folder / name), "weight": weight} | data.pop(name, {})
    fields = {
        "sources": named,
        "stream": True,
        "seq_len": LENGTH,
        "global_batch": 7,
        "lanes": lanes,
        "val_fraction": 0.0,
    }
    run = {"dir": str(folder / "run"), "eval_every": 0}
    config = Config.model_validate({"data": fields | data, "run": run}, strict=False)
    return config, open_dataset(config, lambda work: work(), say=lambda _: None)


def global_batches(
    config: Config, data: Dataset, steps: range, world: int = 1, state: Any = None
) -> tuple[list[np.ndarray], dict[str, Any], list[dict[str, float]]]:
    """Targets and tokens of each step's places; where the streams then stand; the shares."""
    batch = config.data.global_batch

    def work(rank: int, gather: Callable[[Any], list[Any]]) -> tuple[list[np.ndarray], Any, Any]:
        mix = MixtureReader(
            data.sources,
            config.data,
            state=state,
            rank=rank,
            world=world,
            channel=ThreadChannel(rank, gather),
        )
        made: list[np.ndarray] = []
        after: dict[str, Any] = {}
        shares: list[dict[str, float]] = []
        for step in steps:
            rows = mix.read(step, batch)
            after = rows.after
            shares.append(rows.shares)
            made.append(np.concatenate([rows.targets[:, None], rows.tokens], 1))
        mix.close()
        return made, after, shares

    ranks = together(world, work)
    global_rows = []
    for number in range(len(steps)):
        of_rank = [made[number] for made, _, _ in ranks]
        in_order = [of_rank[place % world][place // world] for place in range(batch)]
        global_rows.append(np.stack(in_order))
    return global_rows, merge_after([after for _, after, _ in ranks]), ranks[0][2]


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
    stages = [(0, weights)]
    if sum(later[: len(weights)]):
        stages.append((start, later[: len(weights)]))
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
    """Which source each row of each step came from, by its letters; - without a target."""

    def source_of(row: np.ndarray) -> str:
        if not row[0]:
            return "-"
        text = set(BYTES.decode(row[1:]))
        return next((name for name, letters in kinds.items() if text & set(letters)), "?")

    return ["".join(map(source_of, step)) for step in steps]


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


def two_lanes(folder: Path, **fields: Any) -> StreamSpec:
    """A source of two files, each a lane."""
    (folder / "text").mkdir()
    for name in ("a", "b"):
        rows = [json.dumps({"text": f"{name} {number}"}) for number in range(30)]
        (folder / "text" / f"{name}.jsonl").write_text("\n".join(rows))
    return spec_of(folder / "text", lanes=2, **fields)


@pytest.mark.parametrize("best_fit", [False, True])
def test_a_stream_that_claims_a_million_passes_is_refuted_by_one(
    tmp_path: Path, best_fit: bool
) -> None:
    """Its lanes would otherwise read the text a million times to come as far."""
    spec = two_lanes(tmp_path, best_fit=best_fit)
    _, state = read(spec, [3])
    documents = 0

    def keep(texts: Iterator[str]) -> Iterator[str]:
        nonlocal documents
        documents += 1
        assert documents < 1000, "it reads on and on"
        return texts

    with pytest.raises(CheckpointError, match="has text left in pass 0, and the others are in"):
        read(replace(spec, keep=keep), [3], {**state, "pass": 1_000_000})


def test_a_stream_cannot_have_made_more_passes_than_there_are(tmp_path: Path) -> None:
    spec = two_lanes(tmp_path, passes=2)
    _, state = read(spec, [3])
    with pytest.raises(CheckpointError, match="text has made 3 passes of 2"):
        read(spec, [3], {**state, "pass": 3})


def test_a_lane_cannot_stand_behind_its_block(tmp_path: Path) -> None:
    """Else the rest of its pass would be left out."""
    spec = two_lanes(tmp_path)
    _, state = read(spec, [3])
    state["lanes"]["0"]["document"] = 31
    with pytest.raises(CheckpointError, match="stands at document 31 of 30"):
        read(spec, [3], state)
