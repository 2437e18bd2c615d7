"""What a step trained on, and whether a run has seen a text.

    python -m dist_lm.show RUN --step N [--world W [--rank R]]
    python -m dist_lm.show RUN --find "a passage"

Prints, for each sequence of the global batch of update N (as in metrics.jsonl, from 1), where it was read from, the
documents in it (file and row) with their token spans, and their text, from the run's folder and data alone; streams are
read again from the nearest checkpoint on. With --world, also which rank of so many processes trains on it; --rank shows
only that one's. --find prints the steps so far whose sequences held the passage, or a part of it.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.cli import read_yaml, resolve, split_arguments
from dist_lm.config import Config, total_steps
from dist_lm.console import printable
from dist_lm.data.dataset import Dataset, open_dataset
from dist_lm.data.manifest import MANIFEST, find_prepared
from dist_lm.data.mix import MixtureReader
from dist_lm.data.order import sequence_ids
from dist_lm.data.shards import TokenShards
from dist_lm.data.stream import PackedSequence, StreamSpec
from dist_lm.errors import CheckpointError, DataError, UserError, run_entry
from dist_lm.metrics import read_metrics

BAD_CHECKPOINT = 66
RULE = "rule: python -m dist_lm.show RUN --step N [--world W [--rank R]], or RUN --find TEXT"
FLAGS = {
    "step": "The update, from 1.",
    "world": "Number of processes.",
    "rank": "Show only this one's share.",
    "find": "A passage to look for.",
}

Step = dict[int, tuple[str, int | PackedSequence]]  # place: source, and its sequence


def main(argv: list[str]) -> None:
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__, end="")
        return
    given, settings = split_arguments([] if argv[0].startswith("--") else argv[1:], FLAGS)
    twice = any(len(values) > 1 for values in given.values())
    if not given or settings or twice or ("find" in given and len(given) > 1):
        raise UserError(f"{' '.join(argv)}: {RULE}")
    run_dir, settings_file = argv[0], Path(argv[0], "config.yaml")
    if not settings_file.is_file():
        raise CheckpointError(f"{run_dir}: has no config.yaml; rule: the folder of a run")
    config = resolve(
        (str(settings_file), read_yaml(settings_file)),
        ("RUN", {"run.dir": run_dir, "data.workers": 0}),
    )
    data = open_data(config)
    if "find" in given:
        find(config, data, given["find"][0])
        return
    batch = config.data.global_batch
    steps = total_steps(config, data.sequences)
    step = _number(given, "step", 1, steps or sys.maxsize)
    world = _number(given, "world", 1, batch) if "world" in given else 1
    rank = _number(given, "rank", 0, world - 1) if "rank" in given else None
    show(config, data, step, world, rank)


def open_data(config: Config) -> Dataset:
    """The run's data as it was prepared; never prepares anything, and refuses what is not what the run trained on."""

    def only_if_prepared(look: Callable[[], Any]) -> Any:
        specs, folder = (
            config.data.named_sources() | config.data.validation,
            Path(config.run.dir, "data"),
        )
        raw = {name: spec for name, spec in specs.items() if not find_prepared(spec.input)}
        for name, spec in raw.items():
            own = (
                folder / ("val" if name in config.data.validation else "sources") / name / MANIFEST
            )
            if len(raw) == len(
                specs
            ):  # the tokenizer was learned for the run, not a prepared source's
                own = folder / "tokenizer.json"
            elif config.data.stream and name not in config.data.validation:
                own = folder / "streams.json"
            if not own.is_file():
                raise DataError(
                    f"{config.run.dir}: its data is neither in {folder} nor prepared at"
                    f" {config.data.field_of(name)}={spec.input} (seen from here); rule: run this where the run was"
                    " started"
                )
        return look()

    data = open_dataset(config, only_if_prepared, say=lambda _: None)
    for state in _checkpoints(config)[-1:]:
        if _read_state(state)["data"] != data.identity:
            first = next(iter(data.sources.values()))
            where = (
                first.folder if isinstance(first, TokenShards) else f"the text of {config.run.dir}"
            )
            raise DataError(f"{where}: its hashes are not those that {state.parent} trained on")
    return data


def show(config: Config, data: Dataset, step: int, world: int, rank: int | None) -> None:
    """Print the sequences of update `step`; its global batch is that of index step - 1."""
    length = config.data.seq_len
    made = next(read_steps(config, data, step - 1))
    if not made:
        raise UserError(f"--step={step} is behind the end of the data")
    print(
        f"step {step}: {len(made)} sequences of {length} inputs and their targets ({length + 1} tokens)"
    )
    for place, (name, sequence) in sorted(made.items()):
        if rank in (None, place % world):
            on_rank = f", rank {place % world}" if world > 1 else ""
            position = (step - 1) * config.data.global_batch + place
            title, tokens, spans = _look_up(config, data, name, sequence, position)
            print(f"\nplace {place}{on_rank}: {title}")
            for file, row, start, stop in spans:
                print(
                    f"  {printable(file)} row {row}, tokens {start} to {stop - 1} of the sequence"
                )
                for line in data.tokenizer.decode(tokens[start:stop], skip_special=False).split(
                    "\n"
                ):
                    print(f"    | {printable(line)}")


def _look_up(
    config: Config, data: Dataset, name: str, sequence: int | PackedSequence, position: int
) -> tuple[str, np.ndarray, Sequence[tuple[str, int, int, int]]]:
    """What a sequence is, its tokens, and the documents in them: file, row, and where they begin and end."""
    source, length, stride = data.sources[name], config.data.seq_len, config.data.stride
    if isinstance(source, TokenShards):
        assert isinstance(sequence, int)
        shard, first = source.find(sequence, length, stride)
        epoch = f" of epoch {position // data.sequences + 1}" if data.sequences else ""
        title = (
            f"sequence {sequence}{epoch}, {source.files[shard]} tokens {first} to {first + length}"
        )
        (tokens,) = source.read([sequence], length, stride)
        return title, tokens, source.documents_of(sequence, length, stride)
    assert isinstance(sequence, PackedSequence)
    number, files = cache(source.reader.row_number), source.reader.sources
    spans = [
        (files[span.file].name, number(span.file, span.row), span.start, span.stop)
        for span in sequence.spans
    ]
    title = f"source {name}, pass {sequence.passed + 1}, {len(sequence.tokens)} tokens"
    return title, sequence.tokens, spans


def read_steps(config: Config, data: Dataset, first: int) -> Iterator[Step]:
    """The sequences of steps `first`, `first` + 1, ... (from 0), as one process would read them."""
    batch, length = config.data.global_batch, config.data.seq_len
    if data.sequences is not None:
        (name,), epochs = data.sources, config.run.epochs
        while True:
            positions = first * batch + np.arange(batch, dtype=np.int64)
            if epochs:  # what is beyond the last epoch fills up the last step, without targets
                positions = positions[positions < epochs * data.sequences]
            ids = sequence_ids(positions, data.sequences, config.run.seed).tolist()
            yield {place: (name, sequence) for place, sequence in enumerate(ids)}
            first += 1
    states = [{"step": 0, "streams": None}, *(_read_state(path) for path in _checkpoints(config))]
    near: dict[str, Any] = max((s for s in states if s["step"] <= first), key=lambda s: s["step"])
    mix = MixtureReader(data, config.data, config.run.seed, state=near["streams"])
    for step in range(near["step"], sys.maxsize):
        mix.read(step, np.zeros((batch, length + 1), np.int64), np.zeros(batch, np.int64))
        if step >= first:
            yield mix.origins


def find(config: Config, data: Dataset, text: str) -> None:
    """Print the steps of the run so far that had the passage, by following its whole order again."""
    last = max((figures["step"] for figures in read_metrics(config.run.dir)[0]), default=0)
    holding = {
        name: _holding(config, data, source, text)
        for name, source in data.sources.items()
        if isinstance(source, TokenShards)
    }
    seen: dict[int, set[str]] = {}
    ends: dict[
        tuple[str, int, int], tuple[int, np.ndarray]
    ] = {}  # of documents that go on: step and tokens of one end
    for step, made in zip(range(1, last + 1), read_steps(config, data, 0), strict=False):
        for name, sequence in made.values():
            source = data.sources[name]
            if not isinstance(source, StreamSpec):
                if sequence in holding[name]:
                    seen.setdefault(step, set()).add(f"{name}: sequence {sequence}")
                continue
            assert isinstance(sequence, PackedSequence)
            for file, row, start, stop in sequence.spans:
                tokens, where = (
                    sequence.tokens[start:stop],
                    f"{source.reader.sources[file].name} row {row}",
                )
                earlier, begin = ends.pop((name, file, row), (step, tokens[:0]))
                if text in data.tokenizer.decode(
                    np.concatenate([begin, tokens[min(1, len(begin)) :]])
                ):
                    for at in {step} if text in data.tokenizer.decode(tokens) else {earlier, step}:
                        seen.setdefault(at, set()).add(where)
                if stop == len(sequence.tokens):  # its last token is the next sequence's first
                    ends[name, file, row] = step, tokens
    for step in sorted(seen):
        print(f"step {step}: {', '.join(sorted(seen[step]))}")
    print(f"{printable(text)!r}: in {len(seen)} of the {last} steps so far")


def _holding(config: Config, data: Dataset, shards: TokenShards, text: str) -> set[int]:
    """The sequences of prepared shards that hold a passage, or a part of one that goes on in their successor."""
    found, before = set[int](), np.empty(0, np.int64)
    length, stride = config.data.seq_len, config.data.stride
    for sequence in range(shards.count(config.data)):
        (tokens,) = shards.read([sequence], length, stride)
        if text in data.tokenizer.decode(tokens):
            found.add(sequence)
        elif text in data.tokenizer.decode(np.concatenate([before[:stride], tokens])):
            found |= {sequence - 1, sequence}
        before = tokens
    return found


def _checkpoints(config: Config) -> list[Path]:
    return sorted(Path(config.run.dir).glob("step-*/state.json"))


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {
            "step": state.get("step", 0),
            "data": state["data"],
            "streams": state.get("streams"),
        }
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__})") from error


def _number(given: dict[str, list[str]], name: str, low: int, high: int) -> int:
    (text,) = given.get(name, ["unset"])
    value = int(text) if re.fullmatch(r"-?\d{1,18}", text) else None
    if value is None or not low <= value <= high:
        nearest = low if value is None else min(max(value, low), high)
        raise UserError(
            f"--{name}={text} must be a whole number from {low} to {high}; nearest: {nearest}"
        )
    return value


if __name__ == "__main__":
    run_entry(main)
