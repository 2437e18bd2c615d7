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
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from dist_lm.cli import read_yaml, resolve, split_arguments
from dist_lm.config import Config
from dist_lm.console import printable
from dist_lm.data.dataset import Dataset, open_dataset
from dist_lm.data.manifest import MANIFEST, find_prepared
from dist_lm.data.provenance import Origin
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
    step = _number(given, "step", 1, data.steps(config) or sys.maxsize)
    world = _number(given, "world", 1, config.data.global_batch) if "world" in given else 1
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
            where = first.folder or f"the text of {config.run.dir}"
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
    for place, sequence in sorted(made.items()):
        if rank in (None, place % world):
            on_rank = f", rank {place % world}" if world > 1 else ""
            print(f"\nplace {place}{on_rank}: {sequence.title()}")
            tokens = sequence.tokens()
            for file, row, start, stop in sequence.documents():
                print(
                    f"  {printable(file)} row {row}, tokens {start} to {stop - 1} of the sequence"
                )
                for line in data.tokenizer.decode(tokens[start:stop], skip_special=False).split(
                    "\n"
                ):
                    print(f"    | {printable(line)}")


def read_steps(config: Config, data: Dataset, first: int) -> Iterator[dict[int, Origin]]:
    """The sequences, by place, of steps `first`, `first` + 1, ... (from 0), read by one process."""
    begin: dict[str, Any] = {"step": first, "streams": None}
    if not data.any_order:
        begin = _newest_before(config, first)
    reader = data.open_reader(config.data, state=begin["streams"])
    for step in count(begin["step"]):
        origins = reader.origins(step)
        if step >= first:
            yield origins


def _newest_before(config: Config, step: int) -> dict[str, Any]:
    """What the newest checkpoint says that is not behind a step; without one, the beginning."""
    newest: dict[str, Any] = {"step": 0, "streams": None}
    for path in _checkpoints(config):
        state = _read_state(path)
        if newest["step"] < state["step"] <= step:
            newest = state
    return newest


def find(config: Config, data: Dataset, text: str) -> None:
    """Print the steps of the run so far that had the passage, by following its whole order again."""
    last = max((figures["step"] for figures in read_metrics(config.run.dir)[0]), default=0)
    searches = {name: source.search(text, data.tokenizer) for name, source in data.sources.items()}
    seen: dict[int, set[str]] = {}
    for step, origins in zip(range(1, last + 1), read_steps(config, data, 0), strict=False):
        for origin in origins.values():
            for at, where in searches[origin.source].look(step, origin):
                seen.setdefault(at, set()).add(where)
    for step in sorted(seen):
        print(f"step {step}: {', '.join(sorted(seen[step]))}")
    print(f"{printable(text)!r}: in {len(seen)} of the {last} steps so far")


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
