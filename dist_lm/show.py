"""What a step trained on: `python -m dist_lm.show RUN --step N [--world W [--rank R]]`.

Prints, for each sequence of the global batch of update N (as in metrics.jsonl, from 1), the shard and the tokens it was
read from, the documents in it (source and row) with their token spans, and their text, from the run's config.yaml and
data alone. With --world, also which rank of so many processes trains on it; --rank shows only that one's.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.config import Config, UserError, read_yaml, resolve, run_entry, split_arguments
from dist_lm.data import BAD_DATA, Dataset, open_dataset
from dist_lm.order import sequence_ids
from dist_lm.shards import find_prepared
from dist_lm.text import printable

BAD_CHECKPOINT = 66
FLAGS = {"step": "The update, from 1.", "world": "Number of processes.", "rank": "Show only this one's share."}


def main(argv: list[str]) -> None:
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__, end="")
        return
    given, settings = split_arguments([] if argv[0].startswith("--") else argv[1:], FLAGS)
    if not given or settings or any(len(values) > 1 for values in given.values()):
        raise UserError(f"{' '.join(argv)}: rule: python -m dist_lm.show RUN --step N [--world W [--rank R]]")
    run_dir, settings_file = argv[0], Path(argv[0], "config.yaml")
    if not settings_file.is_file():
        raise UserError(f"{run_dir}: has no config.yaml; rule: the folder of a run", BAD_CHECKPOINT)
    config = resolve((str(settings_file), read_yaml(settings_file)), ("RUN", {"run.dir": run_dir}))
    data = open_data(config)
    batch = config.data.global_batch
    steps = config.run.steps or -(-(config.run.epochs or 0) * data.train_sequences // batch)
    step = _number(given, "step", 1, steps)
    world = _number(given, "world", 1, batch) if "world" in given else 1
    rank = _number(given, "rank", 0, world - 1) if "rank" in given else None
    show(config, data, step, world, rank)


def open_data(config: Config) -> Dataset:
    """The run's data as it was prepared; never prepares anything, and refuses what is not what the run trained on."""

    def no_preparing(_: Any) -> None:
        if not find_prepared(Path(config.run.dir, "data")):
            raise UserError(
                f"{config.run.dir}: its data is neither in {config.run.dir}/data nor prepared at data.input="
                f"{config.data.input} (seen from here); rule: run this where the run was started", BAD_DATA
            )  # fmt: skip

    data = open_dataset(config, no_preparing)
    for state in sorted(Path(config.run.dir).glob("step-*/state.json"))[-1:]:
        try:
            trained_on = json.loads(state.read_text(encoding="utf-8"))["data"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{state}: cannot be read ({type(error).__name__})", BAD_CHECKPOINT) from error
        if trained_on != data.identity:
            raise UserError(f"{data.train.folder}: its hashes are not those that {state.parent} trained on", BAD_DATA)
    return data


def show(config: Config, data: Dataset, step: int, world: int, rank: int | None) -> None:
    """Print the sequences of update `step`; its global batch is that of index step - 1."""
    length, stride, batch = config.data.seq_len, config.data.stride or config.data.seq_len, config.data.global_batch
    positions = (step - 1) * batch + np.arange(batch, dtype=np.int64)
    if config.run.epochs:  # what is beyond the last epoch fills up the last step, without targets
        positions = positions[positions < config.run.epochs * data.train_sequences]
    sequences = sequence_ids(positions, data.train_sequences, config.run.seed)
    print(f"step {step}: {len(positions)} sequences of {length} inputs and their targets ({length + 1} tokens)")
    for place, (position, sequence) in enumerate(zip(positions.tolist(), sequences.tolist(), strict=True)):
        if rank not in (None, place % world):
            continue
        shard, first = data.train.find(sequence, length, stride)
        on_rank = f", rank {place % world}" if world > 1 else ""
        print(
            f"\nplace {place}{on_rank}: sequence {sequence} of epoch {position // data.train_sequences + 1},"
            f" {data.train.files[shard]} tokens {first} to {first + length}"
        )
        (tokens,) = data.train.read([sequence], length, stride)
        for span in data.train.documents_of(sequence, length, stride):
            print(f"  {printable(span.source)} row {span.row}, tokens {span.start} to {span.stop - 1} of the sequence")
            for line in data.tokenizer.decode(tokens[span.start : span.stop], skip_special=False).split("\n"):
                print(f"    | {printable(line)}")


def _number(given: dict[str, list[str]], name: str, low: int, high: int) -> int:
    (text,) = given.get(name, ["unset"])
    value = int(text) if re.fullmatch(r"-?\d{1,18}", text) else None
    if value is None or not low <= value <= high:
        nearest = low if value is None else min(max(value, low), high)
        raise UserError(f"--{name}={text} must be a whole number from {low} to {high}; nearest: {nearest}")
    return value


if __name__ == "__main__":
    run_entry(main)
