"""The first batch after a resume: of prepared shards early and late, and of streams."""

import json
import time
from typing import Any

from benchmarks import corpus
from benchmarks.claim import (
    COST,
    MS,
    Claim,
    Context,
    Figure,
    Measured,
    Target,
    must_equal,
    take_turns,
)
from benchmarks.claims.safety import unprotected_tables
from benchmarks.gpu.data import write_random
from benchmarks.streams import CPU, batches_of, config_of, opened
from dist_lm.config import batch_layout
from dist_lm.data.batches import Batch, Batches
from dist_lm.data.lane import START, _DocumentReader
from dist_lm.data.sources import StreamSource

_EARLY = 10
_LATE = 100_000


def shards(ctx: Context) -> Measured:
    """From the opened folder to the batch. Opening it reads the tokenizer, at any step alike."""
    folder = ctx.scratch / "shards"
    write_random(folder, ctx.pick(50_257, 600), ctx.pick(40_000_000, 400_000))
    config = config_of(
        folder, folder / "tokenizer.json", ctx.scratch, data__stream=False, run__epochs=10_000
    )

    began = time.process_time()
    data = opened(config)
    opening = time.process_time() - began

    def first_batches(step: int, number: int = 1) -> list[Batch]:
        reader = data.open_reader(config.data)
        layout = batch_layout(config, 1)
        eot = data.tokenizer.eot
        batches = Batches(reader, config.data, layout, CPU, eot=eot, first_step=step)
        found = [batches.take() for _ in range(number)]
        batches.close()
        return found

    for step in (_EARLY, _LATE):
        (resumed,) = first_batches(step)
        *_, uninterrupted = first_batches(step - 10, 11)
        equal = must_equal(_tokens(resumed), _tokens(uninterrupted), "batches")

    def late() -> None:
        first_batches(_LATE)

    def early() -> None:
        first_batches(_EARLY)

    measured = take_turns(ctx, late, early, equal, clock="cpu")
    measured.notes["opening the folder, ms"] = round(1000 * opening)
    return measured


def streams(ctx: Context) -> Measured:
    """From the cursors to the batch; the other side reads a block of each lane in this process."""
    file = corpus.make_tokenizer(ctx.scratch / "tokenizer", ctx.pick(8192, 300), ctx.pick(8, 0.1))
    corpus.write_files(ctx.scratch / "text", "parquet", ctx.pick(32, 0.8), files=2)
    config = config_of(ctx.scratch / "text", file, ctx.scratch)
    data = opened(config)
    (source,) = data.sources.values()
    assert isinstance(source, StreamSource)
    batches = batches_of(config, data)
    before = [batches.take().after for _ in range(ctx.pick(300, 2))][-1]
    following = batches.take()
    batches.close()
    state: dict[str, Any] = json.loads(json.dumps(before))

    def resume() -> Batch:
        batches = batches_of(config, data, state)
        batch = batches.take()
        batches.close()
        return batch

    equal = must_equal(_tokens(resume()), _tokens(following), "batches")
    lanes = state["streams"][source.spec.name]["lanes"]

    def ours() -> None:
        resume()

    def read_blocks() -> None:
        with unprotected_tables():
            read_block_of_each_lane()

    def read_block_of_each_lane() -> None:
        for lane in range(source.spec.lanes):
            cursor = {**lanes.get(str(lane), START), "document": 0}
            reader = _DocumentReader(source.spec, lane, cursor)
            reader._read_block()
            reader._found.close()

    read_blocks()
    measured = take_turns(ctx, ours, read_blocks, equal)
    measured.notes["lanes"] = source.spec.lanes
    measured.notes["ours, ms"] = round(1000 * sorted(measured.ours)[len(measured.ours) // 2])
    return measured


def _tokens(batch: Batch) -> list[list[int]]:
    rows: list[list[int]] = batch.micros[0].tokens_BT.tolist()
    return rows


def _shards_claim(name: str, sentence: str, figure: Figure, most: float) -> Claim:
    return Claim(
        name=name,
        sentence=sentence,
        figure=figure,
        target=Target(most=most),
        measure=shards,
        probe="copy",
    )


CLAIMS = (
    _shards_claim(
        "resume-flat", "first batch of shards at step 100,000, against step 10", COST, most=1.1
    ),
    _shards_claim(
        "resume-ms", "first batch of shards at step 100,000, from the opened folder", MS, most=50
    ),
    Claim(
        name="resume-stream",
        sentence="first batch of a Parquet stream late in a pass, against reading a block a lane",
        figure=COST,
        target=Target(most=1.0),
        measure=streams,
        tried="parsers of tables without numpy: half the start of each; a lane still waits for the"
        " start of its own",
        probe="copy",
    ),
)
