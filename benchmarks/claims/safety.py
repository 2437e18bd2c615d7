"""What safety costs: parsing tables in a child process, token ids, and the checks of a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch

from benchmarks import corpus
from benchmarks.checks_per_step import CHECKS
from benchmarks.checks_per_step import measure as measure_checks
from benchmarks.claim import (
    COST,
    Claim,
    Context,
    Figure,
    Measured,
    Target,
    must_equal,
    take_turns,
)
from benchmarks.gpu.data import write_random
from benchmarks.streams import LENGTH, batches_of, config_of, opened
from dist_lm.config import Config
from dist_lm.data.dataset import Dataset
from dist_lm.data.prepared.sequences import TokenSequences
from dist_lm.data.text import tables


class TableInThisProcess:
    """What TableFile is, without a process of its own and without validation."""

    def __init__(self, file: BinaryIO, format: str, columns: list[str]):
        import pyarrow.parquet as pq  # it starts a thread, so it is imported after the fork

        self._table = pq.ParquetFile(file)
        self._columns = columns
        self.schema = self._table.schema_arrow
        self.groups: list[tuple[int, list[int]]] = []
        for number in range(self._table.num_row_groups):
            group = self._table.metadata.row_group(number)
            self.groups.append((group.num_rows, [group.column(0).total_uncompressed_size]))

    def batches(
        self, *, row_groups: list[int], batch_rows: int, passed_over: int = 0
    ) -> Iterator[Any]:
        for batch in self._table.iter_batches(batch_rows, row_groups, self._columns):
            begin = min(passed_over, len(batch))
            passed_over -= begin
            yield batch.slice(begin)

    def close(self) -> None:
        self._table.close()


@contextmanager
def unprotected_tables() -> Iterator[None]:
    """Inside, tables are parsed in this process."""
    table_file = tables.TableFile
    tables.TableFile = TableInThisProcess  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        tables.TableFile = table_file  # type: ignore[misc]


def parse_tables(ctx: Context) -> Measured:
    """A whole pass of streaming, from Parquet to batches, with and without it."""
    file = corpus.make_tokenizer(ctx.scratch / "tokenizer", ctx.pick(8192, 300), ctx.pick(8, 0.1))
    corpus.write_files(ctx.scratch / "text", "parquet", ctx.pick(16, 0.4), files=4)
    config = config_of(ctx.scratch / "text", file, ctx.scratch)
    data = opened(config)
    found: dict[str, int] = {}

    def ours() -> None:
        found["ours"] = sum_of_pass(config, data)

    def unprotected() -> None:
        with unprotected_tables():
            found["other"] = sum_of_pass(config, data)

    ours()
    unprotected()
    equal = must_equal(found["ours"], found["other"], "sums of all tokens")
    return take_turns(ctx, ours, unprotected, equal)


def sum_of_pass(config: Config, data: Dataset) -> int:
    batches = batches_of(config, data)
    total = 0
    while not (batch := batches.take()).end:
        total += int(batch.micros[0].tokens_BT.sum())
    batches.close()
    return total


def check_tokens(ctx: Context) -> Measured:
    steps = ctx.pick(400, 3)
    shards = ctx.scratch / "shards"
    write_random(shards, ctx.pick(50_257, 600), ctx.pick(20_000_000, 100_000))
    tokenizer = shards / "tokenizer.json"
    config = config_of(shards, tokenizer, ctx.scratch, data__stream=False, data__seq_len=LENGTH)
    data = opened(config)

    def ours() -> torch.Tensor:
        batches = batches_of(config, data)
        for _ in range(steps):
            batch = batches.take()
        batches.close()
        return batch.micros[0].tokens_BT

    def unchecked() -> torch.Tensor:
        refuse = TokenSequences._refuse_unknown_ids
        TokenSequences._refuse_unknown_ids = lambda *given: None  # type: ignore[method-assign]
        try:
            return ours()
        finally:
            TokenSequences._refuse_unknown_ids = refuse  # type: ignore[method-assign]

    equal = must_equal(ours().tolist(), unchecked().tolist(), "batches")

    def our_side() -> None:
        ours()

    def other_side() -> None:
        unchecked()

    return take_turns(ctx, our_side, other_side, equal, clock="cpu")


def checks_of_a_step(ctx: Context) -> Measured:
    """The checks are timed where train's loop calls them, so both sides are one run."""
    figures = measure_checks(ctx.pick(30, 2))
    ours = figures["all checks"] / 1e6
    step = figures["a step"] / 1e6
    return Measured([ours], [step], "equal run", {"checks": len(CHECKS)})


OF_A_STEP = Figure("of a step", lambda ours, other: ours / other)

CLAIMS = (
    Claim(
        name="table-parser",
        sentence="streaming Parquet whose parser is a process of its own, against one in ours",
        figure=COST,
        target=Target(most=1.05),
        measure=parse_tables,
        probe="copy",
    ),
    Claim(
        name="token-check",
        sentence="batches of prepared shards with the check of token ids, against those without",
        figure=COST,
        target=Target(most=1.1),
        measure=check_tokens,
        probe="copy",
    ),
    Claim(
        name="step-checks",
        sentence="all checks of a training step, as a share of the step (the quickstart's size)",
        figure=OF_A_STEP,
        target=Target(most=0.01),
        measure=checks_of_a_step,
        rounds=1,
    ),
)
