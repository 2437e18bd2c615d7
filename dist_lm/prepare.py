"""Any text source -> token shards: a folder that training reads from, made once, verified at any time.

    python -m dist_lm.prepare --input TEXT --output DIR --tokenizer bpe:8192
    python -m dist_lm.prepare --verify DIR

It may be stopped at any time: the same command goes on. The result is the same bytes for any number of processes.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from dist_lm.config import DataConfig, UserError, did_you_mean, resolve, run_entry

SETTINGS = ("input", "tokenizer", "text_column", "separator", "val_fraction")  # flags that are fields of data


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        word = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        hint = did_you_mean(word, self._option_string_actions) if word.startswith("--") else ""
        raise UserError(message.removeprefix("argument ") + hint)


def _command_line(argv: list[str]) -> argparse.Namespace:
    parser = _Parser("python -m dist_lm.prepare", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name in SETTINGS:
        field = DataConfig.model_fields[name]
        kind = _number if name == "val_fraction" else str
        text = f"{field.description} ({field.default})"
        parser.add_argument(f"--{name}", type=kind, default=field.default, help=text)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--output", metavar="DIR", help="Folder to make, or to go on with.")
    parser.add_argument("--processes", type=_number, default=cores, help=f"Processes that encode ({cores}: all cores).")
    parser.add_argument("--verify", metavar="DIR", help="Check every hash of a prepared folder instead.")
    flags = [word.partition("=") for word in argv]  # hyphens in a flag's name work as underscores do
    return parser.parse_args(
        [f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else name + equals + value
         for name, equals, value in flags]
    )  # fmt: skip


def _number(text: str) -> float | int | str:
    """What is not a number stays text, for the rule of its field to refuse."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def main(argv: list[str]) -> None:
    arguments = _command_line(argv)
    if (arguments.verify is None) == (arguments.output is None):
        raise UserError("exactly one of --output DIR and --verify DIR must be given")
    if not isinstance(arguments.processes, int) or arguments.processes < 1:
        raise UserError(f"--processes={arguments.processes!r} must be a whole number of 1 or more; nearest: 1")
    config = resolve(("command line", {f"data.{name}": getattr(arguments, name) for name in SETTINGS}))
    from dist_lm import data, shards  # only now: a mistake in the command line is answered at once

    if arguments.verify is not None:
        damaged = shards.verify(arguments.verify)
        if damaged:
            raise UserError(f"{arguments.verify}: damaged: {', '.join(damaged)}; nearest: prepare it again", 65)
        print(f"{arguments.verify}: every hash is right")
        return
    try:
        data.prepare_dataset(config.data, Path(arguments.output), arguments.processes)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_entry(main)
