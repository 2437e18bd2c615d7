"""Preparing a corpus against `tokenizers.encode_batch` alone, on the same cores, side by side.

    python benchmarks/prepare.py            # target: ratio >= 0.8

The corpus is the standard library's text, a few times over, in one .jsonl file; the tokenizer is a BPE trained on it
beforehand. Ours reads, splits, encodes, hashes and writes shards, its processes' start included; theirs encodes lists
that lie in memory, with all its threads. They take turns, so that what else the machine does hits both.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import tokenizers

from dist_lm.config import DataConfig
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.text.files import find_files
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer_training import train_tokenizer


def seconds(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", default="bpe:8192", help="what is trained and used")
    parser.add_argument(
        "--copies", type=int, default=4, help="of the standard library's text (9 MB)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()

    stdlib = DataConfig().as_source()
    documents = [
        "".join(texts) for *_, texts in Reader(stdlib, find_files(stdlib)).documents(Counter())
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(args.tokenizer, documents).save(folder)
        documents *= args.copies
        megabytes = sum(len(document.encode()) for document in documents) / 1e6
        with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
        config = DataConfig(
            input=str(folder / "corpus.jsonl"), tokenizer=str(folder / "tokenizer.json")
        )
        raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

        def ours() -> None:
            shutil.rmtree(folder / "shards", ignore_errors=True)
            prepare_dataset(config, folder / "shards", args.processes, lambda _: None)

        def theirs() -> None:
            for at in range(0, len(documents), 100):
                raw.encode_batch(documents[at : at + 100], add_special_tokens=False)

        pairs = [(seconds(theirs), seconds(ours)) for _ in range(args.rounds)]
    their_time, our_time = (statistics.median(times) for times in zip(*pairs, strict=True))
    figures = {
        "MB": round(megabytes, 1),
        "processes": args.processes,
        "encode_batch_MB_per_s": round(megabytes / their_time, 2),
        "prepare_MB_per_s": round(megabytes / our_time, 2),
        "ratio": round(their_time / our_time, 3),
        "rounds": [[round(t, 2) for t in pair] for pair in pairs],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
