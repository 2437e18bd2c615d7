"""What a step trained on, and whether a run has seen a text; the command line, judged first."""

import sys
from pathlib import Path

from pydantic import Field

from dist_lm.cli import Command, read_flags, read_yaml, resolve
from dist_lm.config import Section
from dist_lm.errors import CheckpointError, UserError, run_entry
from dist_lm.explain import Numbers

# A number whose limits are the run's, so that it is checked when the run is open.
LimitedByRun = int | str | None


class ShowFlags(Section):
    """What a step trained on, and whether a run has seen a text.

    Prints, for each sequence of the global batch of update N (as in metrics.jsonl, from 1), where
    it was read from, the documents in it (file and row) with their token spans, and their text,
    from the run's folder and data alone. Streams are read again from the nearest checkpoint on.

    With --world, also which rank of that many processes trains on it; --rank shows only that one's.
    --find prints the steps so far whose sequences held the passage, or a part of it.
    """

    run: str = Field(description="The folder of a run.")
    step: LimitedByRun = Field(None, description="The update, from 1.")
    world: LimitedByRun = Field(None, description="Number of processes.")
    rank: LimitedByRun = Field(None, description="Show only this one's share.")
    find: str | None = Field(None, description="A passage to look for.")


SHOW = Command(
    "python -m dist_lm.show RUN --step N [--world W [--rank R]], or RUN --find TEXT",
    ShowFlags,
    positional="run",
)


def main(argv: list[str]) -> None:
    flags = read_flags(argv or ["--help"], SHOW)
    is_step_asked = any(value is not None for value in (flags.step, flags.world, flags.rank))
    if is_step_asked == (flags.find is not None):  # neither or both
        raise UserError(f"{' '.join(argv)}: rule: {SHOW.usage}")
    settings_file = Path(flags.run, "config.yaml")
    if not settings_file.is_file():
        raise CheckpointError(f"{flags.run}: has no config.yaml; rule: the folder of a run")
    config = resolve(
        (str(settings_file), read_yaml(settings_file)),
        ("RUN", {"run.dir": flags.run, "data.workers": 0}),
    )
    from dist_lm import history  # torch, numpy and pyarrow, which are slow to import

    data = history.open_data(config)
    if flags.find is not None:
        history.find(config, data, flags.find)
        return
    step = number("step", flags.step, 1, data.steps(config) or sys.maxsize)
    world = 1
    if flags.world is not None:
        world = number("world", flags.world, 1, config.data.global_batch)
    rank = None
    if flags.rank is not None:
        rank = number("rank", flags.rank, 0, world - 1)
    history.show(config, data, step, world, rank)


def number(name: str, value: LimitedByRun, low: int, high: int) -> int:
    text = "unset" if value is None else str(value)
    if isinstance(value, int) and low <= value <= high:
        return value
    raise UserError(Numbers(low, high).error(name, text))


if __name__ == "__main__":
    run_entry(main)
