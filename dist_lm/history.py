"""Reads again what a run trained on, step by step, from its folder and its data alone.

Nothing is prepared or written, and data that is not what the run trained on is refused.
"""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from dist_lm.checkpoint.state import read_state
from dist_lm.config import Config, batch_layout
from dist_lm.console import count as count_of
from dist_lm.console import printable
from dist_lm.data.dataset import Dataset, open_dataset
from dist_lm.data.order import batch_after, batch_of_step, rank_of
from dist_lm.data.prepared.found import prepared_folders
from dist_lm.data.prepared.manifest import MANIFEST
from dist_lm.data.provenance import Origin
from dist_lm.errors import DataError, UserError
from dist_lm.metrics import read_metrics

# --- the data of a run


def open_data(config: Config) -> Dataset:
    """The run's data as it was prepared."""

    def only_if_prepared(look: Callable[[], Any]) -> Any:
        refuse_unprepared(config)
        return look()

    data = open_dataset(config, only_if_prepared, say=lambda _: None)
    for path in _checkpoints(config)[-1:]:
        if read_state(path.parent)["data"] != data.identity:
            first = next(iter(data.sources.values()))
            where = first.folder or f"the text of {config.run.dir}"
            raise DataError(f"{where}: its hashes are not those that {path.parent} trained on")
    return data


def refuse_unprepared(config: Config) -> None:
    """Refuse sources that would have to be prepared first."""
    folder = Path(config.run.dir, "data")
    sources = config.data.named_sources() | config.data.validation
    raw = {name: source for name, source in sources.items() if not prepared_folders(source)}
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
                f" {config.data.field_of(name)}={source.title} (seen from here);"
                " rule: run this where the run was started"
            )


def read_steps(config: Config, data: Dataset, first: int) -> Iterator[dict[int, Origin]]:
    """The sequences, by place, of steps `first`, `first` + 1, ... (from 0), read by one process."""
    begin: dict[str, Any] = {"step": first, "streams": None}
    if not data.any_order:
        begin = _newest_before(config, first)
    reader = data.open_reader(config.data, state=begin["streams"])
    stepped_over = _stepped_over(config)
    read_up_to = batch_after(begin["step"], stepped_over)
    for step in count(begin["step"]):
        number = batch_of_step(step, stepped_over)
        if not data.any_order:
            for passed in range(read_up_to, number):
                reader.origins(passed)
        read_up_to = number + 1
        origins = reader.origins(number)
        if step >= first:
            yield origins


def _stepped_over(config: Config) -> list[list[int]]:
    """The ranges of batches that the newest checkpoint says were stepped over."""
    for path in _checkpoints(config)[-1:]:
        ranges: list[list[int]] = read_state(path.parent).get("stepped_over", [])
        return ranges
    return []


def _newest_before(config: Config, step: int) -> dict[str, Any]:
    """The facts of the newest checkpoint that is not behind a step; without one, the beginning."""
    newest: dict[str, Any] = {"step": 0, "streams": None}
    for path in _checkpoints(config):
        state = read_state(path.parent)
        if newest["step"] < state["step"] <= step:
            newest = state
    return newest


def _checkpoints(config: Config) -> list[Path]:
    return sorted(Path(config.run.dir).glob("step-*/state.json"))


# --- one step


def show(config: Config, data: Dataset, step: int, world: int, rank: int | None) -> None:
    """Print the sequences of update `step`, of all ranks or of one.

    Updates count from 1 and global batches from 0, so its batch is that of index step - 1.
    """
    length = config.data.seq_len
    sequences = next(read_steps(config, data, step - 1))
    if not sequences:
        raise UserError(f"--step={step} is behind the end of the data")
    sequences_of_step = count_of(len(sequences), "sequence")
    print(
        f"step {step}: {sequences_of_step} of {length} inputs and their targets"
        f" ({length + 1} tokens)"
    )
    unit = batch_layout(config, world).unit
    for place, sequence in sorted(sequences.items()):
        trainer = rank_of(place, world, unit)
        if rank is not None and trainer != rank:
            continue
        on_rank = f", rank {trainer}" if world > 1 else ""
        print(f"\nplace {place}{on_rank}: {sequence.title()}")
        tokens = sequence.tokens()
        for file, row, start, stop in sequence.documents():
            print(f"  {printable(file)} row {row}, tokens {start} to {stop - 1} of the sequence")
            text = data.tokenizer.decode(tokens[start:stop], skip_special=False)
            for line in text.split("\n"):
                print(f"    | {printable(line)}")


# --- a passage


def find(config: Config, data: Dataset, text: str) -> None:
    """Print the steps so far that had the passage, by following the run's whole order again."""
    steps, _ = read_metrics(config.run.dir)
    last = max((figures["step"] for figures in steps), default=0)
    searches = {name: source.search(text, data.tokenizer) for name, source in data.sources.items()}
    seen: dict[int, set[str]] = {}
    for step, origins in zip(range(1, last + 1), read_steps(config, data, 0), strict=False):
        for origin in origins.values():
            for at, where in searches[origin.source].look(step, origin):
                seen.setdefault(at, set()).add(where)
    for step in sorted(seen):
        print(f"step {step}: {', '.join(sorted(seen[step]))}")
    print(f"{printable(text)!r}: in {len(seen)} of the {count_of(last, 'step')} so far")
