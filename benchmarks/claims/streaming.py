"""Parquet files to batches: against the usual `datasets` pipeline, and against the bare engine."""

import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import corpus
from benchmarks.claim import (
    FASTER,
    SHARE,
    Claim,
    Context,
    Measured,
    Target,
    must_be_near,
    must_equal,
    take_turns,
)
from benchmarks.isolation import run_ranks
from benchmarks.streams import BATCH, LENGTH, batches_of, config_of, opened, read_pass
from dist_lm.data.tokenizer import Tokenizer

_WORLD = 2
_FILES = 8


def against_datasets(ctx: Context) -> Measured:
    """Two processes, each on a core, from opening the files to the end of a pass."""
    tokenizer = corpus.make_tokenizer(
        ctx.scratch / "tokenizer", ctx.pick(8192, 300), ctx.pick(8, 0.1)
    )
    text = ctx.scratch / "text"
    corpus.write_files(text, "parquet", ctx.pick(16, 0.6), _FILES)

    def be_rank(rank: int) -> list[dict[str, list[float]]]:
        return _rounds_of_rank(ctx, rank, text, tokenizer)

    answers = run_ranks(_WORLD, be_rank, ctx.scratch)
    sides: dict[str, list[float]] = {}
    totals: dict[str, float] = {}
    for side in ("ours", "theirs"):
        rounds = zip(*(answer[side] for answer in answers), strict=True)
        sides[side] = []
        for of_ranks in rounds:
            totals[side] = sum(tokens for _, tokens in of_ranks)
            sides[side].append(max(seconds for seconds, _ in of_ranks) / totals[side])
    # Theirs drops the end of each thousand documents.
    equal = must_be_near(totals["ours"], totals["theirs"], "numbers of tokens", within=0.2)
    measured = Measured(sides["ours"], sides["theirs"], equal)
    measured.notes["ours, M tokens/s"] = round(float(1e-6 / np.median(measured.ours)), 2)
    return measured


def _rounds_of_rank(ctx: Context, rank: int, text: Path, tokenizer: Path) -> Any:
    """Seconds and tokens of each round of both sides, on this rank."""
    import torch  # after the fork
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    theirs = _usual_pipeline(rank, text, tokenizer)

    def ours() -> int:
        config = config_of(text, tokenizer, ctx.scratch)
        return read_pass(batches_of(config, opened(config), rank=rank, world=_WORLD))

    found: dict[str, list[tuple[float, int]]] = {"ours": [], "theirs": []}
    for number in range(ctx.rounds + ctx.pick(1, 0)):
        for name, side in (("ours", ours), ("theirs", theirs)):
            dist.barrier()
            began = time.perf_counter()
            tokens = side()
            if number or ctx.is_quick:
                found[name].append((time.perf_counter() - began, tokens))
    dist.barrier()
    return found


def _usual_pipeline(rank: int, text: Path, tokenizer: Path) -> Callable[[], int]:
    """What transformers' run_clm.py does, streamed."""
    import datasets
    import torch
    import transformers
    from datasets.distributed import split_dataset_by_node

    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), eos_token="<|endoftext|>"
    )
    peer.model_max_length = 10**9  # no warning about the length
    files = sorted(str(path) for path in text.iterdir())

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(chain(*examples[key])) for key in examples}
        total = len(joined["input_ids"]) // LENGTH * LENGTH
        result = {}
        for key, ids in joined.items():
            result[key] = [ids[i : i + LENGTH] for i in range(0, total, LENGTH)]
        result["labels"] = result["input_ids"].copy()
        return result

    def one_pass() -> int:
        rows = datasets.load_dataset("parquet", split="train", streaming=True, data_files=files)
        rows = rows.map(lambda found: peer(found["text"]), batched=True, remove_columns=["text"])
        rows = rows.map(group_texts, batched=True).shuffle(seed=1, buffer_size=1000)
        rows = split_dataset_by_node(rows, rank, _WORLD)
        collate = transformers.default_data_collator
        loader = torch.utils.data.DataLoader(rows, BATCH // _WORLD, collate_fn=collate)
        return sum(batch["input_ids"].numel() for batch in loader)

    return one_pass


def against_engine(ctx: Context) -> Measured:
    """One core. The engine alone encodes a list that lies in memory."""
    file = corpus.make_tokenizer(ctx.scratch / "tokenizer", ctx.pick(8192, 300), ctx.pick(8, 0.1))
    text = ctx.scratch / "text"
    paths = corpus.write_files(text, "parquet", ctx.pick(16, 0.6), _FILES)
    documents = corpus.read_parquet(paths)
    config = config_of(text, file, ctx.scratch)
    data = opened(config)
    tokenizer = Tokenizer.load(file)
    engine = tokenizer._engine
    assert engine is not None, tokenizer.why_slow()
    tokens: dict[str, int] = {}

    def ours() -> None:
        tokens["ours"] = read_pass(batches_of(config, data))

    def bare() -> None:
        tokens["bare"] = 0
        for document in documents:
            tokens["bare"] += len(engine.encode_to_numpy(document, disallowed_special=())) + 1

    ours()
    bare()
    # The first token is no target, and the last sequence is not whole.
    equal = must_be_near(tokens["ours"], tokens["bare"], "numbers of tokens", within=0.01)
    ids = tokenizer.encode_arrays(documents[:100])
    some = [engine.encode_to_numpy(document).tolist() for document in documents[:100]]
    must_equal([one.tolist() for one in ids], some, "tokens")
    return take_turns(ctx, ours, bare, equal)


CLAIMS = (
    Claim(
        name="streaming-datasets",
        sentence="streaming Parquet to batches on two processes, against datasets' usual way",
        figure=FASTER,
        target=Target(least=4.0),
        measure=against_datasets,
        threads=2,
        rounds=3,
        probe="copy",
        peers=("transformers",),
    ),
    Claim(
        name="streaming-engine",
        sentence="streaming Parquet to batches, as a share of the bare tiktoken engine's speed",
        figure=SHARE,
        target=Target(least=0.8),
        measure=against_engine,
        probe="copy",
    ),
)
