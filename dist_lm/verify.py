"""Replay steps of a run and compare their bits; the command line, judged first."""

import sys
from pathlib import Path

from pydantic import Field

from dist_lm.cli import Command, read_flags, read_yaml, resolve
from dist_lm.config import Config, Section
from dist_lm.errors import CheckpointError, UserError, run_entry
from dist_lm.launcher import die_with_launcher


class VerifyFlags(Section):
    """Replay steps of a run with run.exact, and compare their bits with those that it recorded.

    Begins at the newest checkpoint before update N (as in metrics.jsonl, from 1) and compares the
    hash of each gradient up to update M, and the weights where a checkpoint lies. It may be started
    on any number of processes. Prints "equal" and exits with 0; or prints the first step that
    differs and, from the next checkpoint, the first tensors, and exits with 1. It writes nothing
    into the run folder.
    """

    run: str = Field(description="The folder of a run.")
    step: int | None = Field(None, ge=1, description="The first update to compare, from 1.")
    to: int | None = Field(None, ge=1, description="The last one; unset: the first alone.")
    units: bool = Field(
        False, description="Name units and ranks; the run needs run.log_unit_hashes."
    )


VERIFY = Command(
    "[torchrun --nproc-per-node W -m] dist_lm.verify RUN --step N [--to M] [--units]",
    VerifyFlags,
    positional="run",
)
DIFFERENT = 1  # the exit code


def main(argv: list[str]) -> None:
    flags = read_flags(argv or ["--help"], VERIFY)
    if flags.step is None:
        raise UserError(f"--step=unset: rule: {VERIFY.usage}")
    last = flags.to or flags.step
    if last < flags.step:
        raise UserError(
            f"--to={flags.to} must be at least --step={flags.step}; nearest: {flags.step}"
        )
    config = config_of(flags)
    from dist_lm.replay import verify  # torch, which is slow to import

    if not verify(config, flags.step, last):
        sys.exit(DIFFERENT)


def config_of(flags: VerifyFlags) -> Config:
    """The settings of the run's newest start, with what a replay must have otherwise."""
    settings_file = Path(flags.run, "config.yaml")
    if not settings_file.is_file():
        raise CheckpointError(f"{flags.run}: has no config.yaml; rule: the folder of a run")
    given = read_yaml(settings_file)
    if not given.get("run.exact"):
        raise UserError(
            f"{flags.run} was trained with run.exact=false, whose bits depend on the number of"
            " processes; rule: a run with run.exact=true"
        )
    if flags.units and not given.get("run.log_unit_hashes"):
        raise UserError(
            f"--units=true compares hashes of units, and {flags.run} has none; rule: a run with"
            " run.log_unit_hashes=true; nearest: leave out --units"
        )
    of_replay = {"run.dir": flags.run, "run.trackers": (), "run.log_unit_hashes": flags.units}
    return resolve((str(settings_file), given), ("RUN", of_replay))


if __name__ == "__main__":
    die_with_launcher()  # before all imports that take time: a launcher may be killed during them
    run_entry(main)
