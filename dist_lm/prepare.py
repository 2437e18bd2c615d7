"""Any text source -> token shards: a folder that training reads from, made once, verified at any time.

    python -m dist_lm.prepare --input TEXT --output DIR --tokenizer bpe:8192
    python -m dist_lm.prepare --verify DIR

It may be stopped at any time: the same command goes on. The result is the same bytes for any number of processes.
"""

import argparse
import os
import sys
from pathlib import Path

from dist_lm.cli import FlagParser, parse_value, resolve
from dist_lm.config import DataConfig
from dist_lm.errors import DataError, UserError, run_entry

SETTINGS = (
    "input",
    "tokenizer",
    "text_column",
    "separator",
    "val_fraction",
)  # flags that are fields of data


def _command_line(argv: list[str]) -> argparse.Namespace:
    parser = FlagParser("python -m dist_lm.prepare", __doc__)
    for name in SETTINGS:
        field = DataConfig.model_fields[name]
        parser.add_argument(f"--{name}", help=f"{field.description} ({field.default})")
    cores = str(len(os.sched_getaffinity(0)))
    parser.add_argument("--output", metavar="DIR", help="Folder to make, or to go on with.")
    parser.add_argument(
        "--processes", default=cores, help=f"Processes that encode ({cores}: all cores)."
    )
    parser.add_argument(
        "--verify", metavar="DIR", help="Check every hash of a prepared folder instead."
    )
    return parser.read(argv)


def main(argv: list[str]) -> None:
    arguments = _command_line(argv)
    if (arguments.verify is None) == (arguments.output is None):
        raise UserError("exactly one of --output DIR and --verify DIR must be given")
    if not arguments.processes.isdecimal() or int(arguments.processes) < 1:
        raise UserError(
            f"--processes={arguments.processes} must be a whole number of 1 or more; nearest: 1"
        )
    given = {
        f"data.{name}": value
        for name in SETTINGS
        if (value := getattr(arguments, name)) is not None
    }
    config = resolve(
        ("command line", {name: parse_value(name, [value]) for name, value in given.items()})
    )
    from dist_lm.data import preparing, shards

    if arguments.verify is not None:
        damaged = shards.verify(arguments.verify)
        if damaged:
            raise DataError(
                f"{arguments.verify}: damaged: {', '.join(damaged)}; nearest: prepare it again"
            )
        print(f"{arguments.verify}: every hash is right")
        return
    try:
        preparing.prepare_dataset(config.data, Path(arguments.output), int(arguments.processes))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_entry(main)
