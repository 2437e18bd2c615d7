"""Any text source -> token shards: a folder that training reads from.

It is made once and may be verified at any time. Being stopped does no harm: the same command goes
on. The result is the same bytes for any number of processes.
"""

import os
import sys
from pathlib import Path

from pydantic import Field

from dist_lm.cli import Command, ConfigFlags, load
from dist_lm.config import DataConfig
from dist_lm.console import notice
from dist_lm.errors import INTERRUPTED, DataError, UserError, run_entry

CORES = len(os.sched_getaffinity(0))


class PrepareFlags(ConfigFlags):
    """Turn any text source into token shards: a folder that training reads from, made once.

    The settings are those of training without their "data.". Of several named sources each is made
    into a folder of its own below the output, with one tokenizer for all.

    It may be stopped at any time: the same command goes on. The result is the same bytes for any
    number of processes.
    """

    output: str | None = Field(None, description="Folder to make, or to go on with.")
    processes: int | None = Field(
        None, ge=1, description=f"Texts encoded at once, in threads or processes; unset: {CORES}."
    )
    verify: str | None = Field(
        None, description="Check every hash of a prepared folder instead of making one."
    )


# Settings of training that say which text is prepared, and how.
SETTINGS = (
    "input",
    "sources",
    "text_column",
    "separator",
    "template",
    "filter",
    "bad_rows",
    "dtype",
    "tokenizer",
    "val_fraction",
)
PREPARE = Command(
    "python -m dist_lm.prepare --input TEXT --output DIR --tokenizer bpe:8192, or --verify DIR",
    PrepareFlags,
    settings={name: f"data.{name}" for name in SETTINGS},
)


def main(argv: list[str]) -> None:
    config, flags = load(argv, PREPARE)
    if (flags.verify is None) == (flags.output is None):
        raise UserError("exactly one of --output DIR and --verify DIR must be given")
    from dist_lm.data.prepared import shards  # numpy, which is slow to import

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
        prepare(config.data, Path(flags.output), flags.processes or CORES)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)


def prepare(data: DataConfig, output: Path, processes: int) -> None:
    """Prepare the only source into a folder, or each of several into a folder below it."""
    # numpy and tokenizers, which are slow to import
    from dist_lm.data.prepared.kept import learn_tokenizer
    from dist_lm.data.prepared.preparing import prepare_dataset
    from dist_lm.data.text.files import find_files
    from dist_lm.data.text.formats import Reader
    from dist_lm.data.tokenizer import Tokenizer

    sources = data.named_sources()
    if len(sources) == 1:
        (name,) = sources
        prepare_dataset(data, output, processes, name=name)
        return
    readers = []
    for name, source in sources.items():
        label = data.field_of(name)
        readers.append(Reader(source, find_files(source, label), data.bad_rows, label))
    learn_tokenizer(data, readers, output, notice)
    tokenizer = Tokenizer.load(output)
    for name in sources:
        prepare_dataset(data, output / name, processes, name=name, tokenizer=tokenizer)


if __name__ == "__main__":
    run_entry(main, prints_result=False)
