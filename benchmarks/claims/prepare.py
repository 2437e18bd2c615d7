"""`prepare` of Parquet files, against `datasets.map` with the same tokenizer, saved to disk.

Both read the same files, use two processes or threads, and leave the same tokens on the disk.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import corpus
from benchmarks.claim import FASTER, Claim, Context, Measured, Target, must_equal, take_turns
from benchmarks.streams import config_of
from dist_lm.data.dataset import open_dataset
from dist_lm.data.prepared.preparing import prepare_dataset

_PROCESSES = 2


def against_datasets(ctx: Context) -> Measured:
    import datasets  # it starts threads, so it is imported after the fork
    import transformers

    datasets.disable_progress_bars()
    tokenizer = corpus.make_tokenizer(
        ctx.scratch / "tokenizer", ctx.pick(8192, 300), ctx.pick(8, 0.1)
    )
    size = ctx.pick(24, 0.2)
    paths = corpus.write_files(ctx.scratch / "text", "parquet", size, files=4)
    config = config_of(
        ctx.scratch / "text", tokenizer, ctx.scratch, data__stream=False, data__seq_len=64
    )
    shards = ctx.scratch / "shards"
    saved = ctx.scratch / "saved"
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), eos_token="<|endoftext|>"
    )
    peer.model_max_length = 10**9  # no warning about the length

    def ours() -> None:
        shutil.rmtree(shards, ignore_errors=True)
        prepare_dataset(config.data, shards, _PROCESSES, lambda text: None)

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": peer(rows["text"])["input_ids"]}

    def theirs() -> None:
        shutil.rmtree(saved, ignore_errors=True)
        rows = datasets.load_dataset(
            "parquet",
            data_files=[str(path) for path in paths],
            split="train",
            cache_dir=str(ctx.scratch / "cache"),
        )
        encoded = rows.map(
            encode,
            batched=True,
            num_proc=_PROCESSES,
            remove_columns=["text"],
            load_from_cache_file=False,
        )
        encoded.save_to_disk(str(saved))

    ours()
    theirs()
    equal = must_equal(_our_tokens(shards, config), _their_tokens(saved, peer), "tokens")
    measured = take_turns(ctx, ours, theirs, equal)
    measured.notes["ours, MB/s"] = round(float(size / np.median(measured.ours)), 1)
    return measured


def _our_tokens(folder: Path, config: Any) -> list[int]:
    data = config.data.model_copy(update={"input": str(folder)})
    alone = open_dataset(
        config.model_copy(update={"data": data}), lambda work: work(), lambda text: None
    ).alone
    assert alone
    tokens: list[int] = []
    for number in range(len(alone.shards.files)):
        with alone.shards.open_shard(number) as shard:
            tokens += shard.tolist()
    return tokens


def _their_tokens(folder: Path, peer: Any) -> list[int]:
    import datasets  # as above

    tokens: list[int] = []
    for ids in datasets.load_from_disk(str(folder))["input_ids"]:
        tokens += [*ids, peer.eos_token_id]
    return tokens


CLAIMS = (
    Claim(
        name="prepare-datasets",
        sentence="prepare of Parquet, against datasets.map (batched, num_proc=2) and its saving",
        figure=FASTER,
        target=Target(least=4.0),
        measure=against_datasets,
        threads=2,
        rounds=3,
        probe="copy",
        peers=("transformers",),
        tried="threads instead of processes: 0.75 of the CPU time, the same bytes",
    ),
)
