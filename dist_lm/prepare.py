"""Any text source -> token shards: a folder that training reads from.

It is made once and may be verified at any time. Being stopped does no harm: the same command goes
on. The result is the same bytes for any number of processes.
"""

import os
import sys
from pathlib import Path

from pydantic import Field

from dist_lm.cli import Command, read_flags_and_settings, resolve
from dist_lm.config import Section
from dist_lm.errors import INTERRUPTED, DataError, UserError, run_entry

CORES = len(os.sched_getaffinity(0))


class PrepareFlags(Section):
    """Turn any text source into token shards: a folder that training reads from, made once.

    It may be stopped at any time: the same command goes on. The result is the same bytes for any
    number of processes.
    """

    output: str | None = Field(None, description="Folder to make, or to go on with.")
    processes: int | None = Field(
        None, ge=1, description=f"Processes that encode; unset: one for each core, {CORES}."
    )
    verify: str | None = Field(
        None, description="Check every hash of a prepared folder instead of making one."
    )


PREPARE = Command(
    "python -m dist_lm.prepare --input TEXT --output DIR --tokenizer bpe:8192, or --verify DIR",
    PrepareFlags,
    settings={
        name: f"data.{name}"
        for name in ("input", "tokenizer", "text_column", "separator", "val_fraction")
    },
)


def main(argv: list[str]) -> None:
    flags, settings = read_flags_and_settings(argv, PREPARE)
    if (flags.verify is None) == (flags.output is None):
        raise UserError("exactly one of --output DIR and --verify DIR must be given")
    config = resolve(("command line", settings))
    from dist_lm.data.prepared import (  # numpy and pyarrow, which are slow to import
        preparing,
        shards,
    )

    if flags.verify is not None:
        damaged = shards.verify(flags.verify)
        if damaged:
            raise DataError(
                f"{flags.verify}: damaged: {', '.join(damaged)}; nearest: prepare it again"
            )
        print(f"{flags.verify}: every hash is right")
        return
    assert flags.output is not None
    try:
        preparing.prepare_dataset(config.data, Path(flags.output), flags.processes or CORES)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    run_entry(main, prints_result=False)
