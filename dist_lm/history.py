"""What a run trained on, step by step, read again from its folder and its data alone.

Nothing is prepared or written, and data that is not what the run trained on is refused.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.config import Config
from dist_lm.console import printable
from dist_lm.data.dataset import Dataset, open_dataset
from dist_lm.data.manifest import MANIFEST, find_prepared
from dist_lm.data.mix import MixtureReader
from dist_lm.data.order import sequence_ids
from dist_lm.data.shards import Span, TokenShards
from dist_lm.data.stream import PackedSequence, StreamSpec
from dist_lm.errors import CheckpointError, DataError, UserError
from dist_lm.metrics import read_metrics

# The sequences of a step: by their place in the global batch, the source and its sequence.
Step = dict[int, tuple[str, int | PackedSequence]]


# --- the data of a run


def open_data(config: Config) -> Dataset:
    """The run's data as it was prepared."""

    def only_if_prepared(look: Callable[[], Any]) -> Any:
        refuse_unprepared(config)
        return look()

    data = open_dataset(config, only_if_prepared, say=lambda _: None)
    for path in _checkpoints(config)[-1:]:
        if _read_state(path)["data"] != data.identity:
            source = next(iter(data.sources.values()))
            where = f"the text of {config.run.dir}"
            if isinstance(source, TokenShards):
                where = str(source.folder)
            raise DataError(f"{where}: its hashes are not those that {path.parent} trained on")
    return data


def refuse_unprepared(config: Config) -> None:
    """Refuse sources that would have to be prepared first."""
    folder = Path(config.run.dir, "data")
    sources = config.data.named_sources() | config.data.validation
    raw = {name: source for name, source in sources.items() if not find_prepared(source.input)}
    for name, source in raw.items():
        is_validation = name in config.data.validation
        if len(raw) == len(sources):
            # The tokenizer was learned for the run, or else it is a prepared source's.
            made = folder / "tokenizer.json"
        elif config.data.stream and not is_validation:
            made = folder / "streams.json"
        else:
            made = folder / ("val" if is_validation else "sources") / name / MANIFEST
        if not made.is_file():
            raise DataError(
                f"{config.run.dir}: its data is neither in {folder} nor prepared at"
                f" {config.data.field_of(name)}={source.input} (seen from here);"
                " rule: run this where the run was started"
            )


def steps_of_run(config: Config, data: Dataset) -> int:
    """How many steps the run has at most."""
    if config.run.steps:
        return config.run.steps
    if config.run.epochs and data.sequences:
        return -(-config.run.epochs * data.sequences // config.data.global_batch)
    return sys.maxsize  # the data says when it ends


def read_steps(config: Config, data: Dataset, first: int) -> Iterator[Step]:
    """The sequences of steps `first`, `first` + 1, ... (from 0), as one process would read them."""
    if data.sequences is not None:
        return _steps_of_shards(config, data, data.sequences, first)
    return _steps_of_mixture(config, data, first)


def _steps_of_shards(config: Config, data: Dataset, sequences: int, first: int) -> Iterator[Step]:
    """Prepared shards: the order is a function of the position, so any step is as near."""
    (name,) = data.sources
    batch = config.data.global_batch
    step = first
    while True:
        positions = step * batch + np.arange(batch, dtype=np.int64)
        if config.run.epochs:
            # What lies beyond the last epoch fills up the last step, without targets.
            positions = positions[positions < config.run.epochs * sequences]
        ids = sequence_ids(positions, sequences, config.run.seed).tolist()
        yield {place: (name, sequence) for place, sequence in enumerate(ids)}
        step += 1


def _steps_of_mixture(config: Config, data: Dataset, first: int) -> Iterator[Step]:
    """Mixtures and streams: read from the nearest checkpoint before the step, or from the start."""
    states: list[dict[str, Any]] = [{"step": 0, "streams": None}]
    states += [_read_state(path) for path in _checkpoints(config)]
    earlier = [state for state in states if state["step"] <= first]
    near = max(earlier, key=lambda state: state["step"])
    reader = MixtureReader(data, config.data, config.run.seed, state=near["streams"])
    batch = config.data.global_batch
    for step in range(near["step"], sys.maxsize):
        tokens = np.zeros((batch, config.data.seq_len + 1), np.int64)
        reader.read(step, tokens, np.zeros(batch, np.int64))
        if step >= first:
            yield reader.origins


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


# --- one step


def show(config: Config, data: Dataset, step: int, world: int, rank: int | None) -> None:
    """Print the sequences of update `step`, of all ranks or of one.

    Updates count from 1 and global batches from 0, so its batch is that of index step - 1.
    """
    length = config.data.seq_len
    sequences = next(read_steps(config, data, step - 1))
    if not sequences:
        raise UserError(f"--step={step} is behind the end of the data")
    print(
        f"step {step}: {len(sequences)} sequences of {length} inputs and their targets"
        f" ({length + 1} tokens)"
    )
    for place, (name, sequence) in sorted(sequences.items()):
        if rank is not None and place % world != rank:
            continue
        on_rank = f", rank {place % world}" if world > 1 else ""
        position = (step - 1) * config.data.global_batch + place
        title, tokens, spans = look_up(config, data, name, sequence, position)
        print(f"\nplace {place}{on_rank}: {title}")
        for span in spans:
            print(
                f"  {printable(span.source)} row {span.row},"
                f" tokens {span.start} to {span.stop - 1} of the sequence"
            )
            text = data.tokenizer.decode(tokens[span.start : span.stop], skip_special=False)
            for line in text.split("\n"):
                print(f"    | {printable(line)}")


def look_up(
    config: Config, data: Dataset, name: str, sequence: int | PackedSequence, position: int
) -> tuple[str, np.ndarray, Sequence[Span]]:
    """What a sequence is, its tokens, and the documents in them."""
    source = data.sources[name]
    if isinstance(source, TokenShards):
        assert isinstance(sequence, int)
        return _look_up_in_shards(config, data, source, sequence, position)
    assert isinstance(sequence, PackedSequence)
    row_number = cache(source.reader.row_number)
    files = source.reader.sources
    spans = []
    for span in sequence.spans:
        row = row_number(span.file, span.row)
        spans.append(Span(files[span.file].name, row, span.start, span.stop))
    title = f"source {name}, pass {sequence.passed + 1}, {len(sequence.tokens)} tokens"
    return title, sequence.tokens, spans


def _look_up_in_shards(
    config: Config, data: Dataset, shards: TokenShards, sequence: int, position: int
) -> tuple[str, np.ndarray, Sequence[Span]]:
    length = config.data.seq_len
    stride = config.data.stride
    shard, first = shards.find(sequence, length, stride)
    epoch = ""
    if data.sequences:
        epoch = f" of epoch {position // data.sequences + 1}"
    title = f"sequence {sequence}{epoch}, {shards.files[shard]} tokens {first} to {first + length}"
    (tokens,) = shards.read([sequence], length, stride)
    return title, tokens, shards.documents_of(sequence, length, stride)


# --- a passage


def find(config: Config, data: Dataset, text: str) -> None:
    """Print the steps so far that had the passage, by following the run's whole order again."""
    steps, _ = read_metrics(config.run.dir)
    last = max((figures["step"] for figures in steps), default=0)
    search = Search(config, data, text)
    for step, sequences in zip(range(1, last + 1), read_steps(config, data, 0), strict=False):
        for name, sequence in sequences.values():
            search.add(step, name, sequence)
    for step in sorted(search.seen):
        print(f"step {step}: {', '.join(sorted(search.seen[step]))}")
    print(f"{printable(text)!r}: in {len(search.seen)} of the {last} steps so far")


class Search:
    """Looks for a passage in the sequences of a run, which are added in the order of training."""

    def __init__(self, config: Config, data: Dataset, text: str):
        self.data = data
        self.text = text
        self.seen: dict[int, set[str]] = {}  # step: where the passage was read
        self.holding: dict[str, set[int]] = {}  # source: its sequences that hold the passage
        for name, source in data.sources.items():
            if isinstance(source, TokenShards):
                self.holding[name] = sequences_with(config, data, source, text)
        # Of each document of a stream that goes on in its next sequence: the step and the tokens of
        # the part before.
        self.unfinished: dict[tuple[str, int, int], tuple[int, np.ndarray]] = {}

    def add(self, step: int, name: str, sequence: int | PackedSequence) -> None:
        source = self.data.sources[name]
        if isinstance(source, StreamSpec):
            assert isinstance(sequence, PackedSequence)
            self._add_of_stream(step, name, source, sequence)
        elif sequence in self.holding[name]:
            self._note(step, f"{name}: sequence {sequence}")

    def _add_of_stream(
        self, step: int, name: str, source: StreamSpec, sequence: PackedSequence
    ) -> None:
        for file, row, start, stop in sequence.spans:
            tokens = sequence.tokens[start:stop]
            earlier, before = self.unfinished.pop((name, file, row), (step, tokens[:0]))
            # The last token of a sequence is the first one of the next.
            fresh = tokens[min(1, len(before)) :]
            if self._is_in(np.concatenate([before, fresh])):
                where = f"{source.reader.sources[file].name} row {row}"
                self._note(step, where)
                if not self._is_in(tokens):  # then it began in the part before
                    self._note(earlier, where)
            if stop == len(sequence.tokens):
                self.unfinished[name, file, row] = (step, tokens)

    def _is_in(self, tokens: np.ndarray) -> bool:
        return self.text in self.data.tokenizer.decode(tokens)

    def _note(self, step: int, where: str) -> None:
        self.seen.setdefault(step, set()).add(where)


def sequences_with(config: Config, data: Dataset, shards: TokenShards, text: str) -> set[int]:
    """The sequences of prepared shards that hold a passage, or a part of it.

    A passage may begin in one sequence and go on in the next.
    """
    holding = set[int]()
    length = config.data.seq_len
    stride = config.data.stride
    before = np.empty(0, np.int64)
    for sequence in range(shards.count(config.data)):
        (tokens,) = shards.read([sequence], length, stride)
        if text in data.tokenizer.decode(tokens):
            holding.add(sequence)
        elif text in data.tokenizer.decode(np.concatenate([before[:stride], tokens])):
            holding |= {sequence - 1, sequence}
        before = tokens
    return holding
