"""Runs one section in this process: `python -m benchmarks.gpu.section NAME --folder DIR ...`.

The command starts this; nobody need type it. The section's file gets a line for each figure, and a
last line with its outcome. A process that ends without that line has crashed.
"""

import argparse
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.context import Context, Skip
from benchmarks.gpu.listing import BY_NAME
from benchmarks.gpu.resultfile import append

WARM = "-warm"  # ends the name of a task that only fills the compile cache


def run_section(name: str, folder: Path, *, is_dry: bool, seconds: float) -> None:
    """Do a section and write its outcome. `folder` holds the data and all sections' folders."""
    is_warming = name.endswith(WARM)
    own = folder / name
    own.mkdir()
    ctx = Context(
        own,
        file_of(folder, name),
        is_dry=is_dry,
        is_warming=is_warming,
        end=time.time() + seconds,
    )
    function = find(BY_NAME[name.removesuffix(WARM)].function)
    outcome = {"result": "passed", "why": ""}
    try:
        function(ctx)
    except Skip as error:
        outcome = {"result": "skipped", "why": str(error)}
    except Exception as error:
        traceback.print_exc()
        outcome = {"result": "failed", "why": in_a_line(error)}
    if ctx.has_failed:
        outcome["result"] = "failed"
    append(ctx.file, outcome)


def in_a_line(error: Exception) -> str:
    """What went wrong, and where in our code."""
    frames = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split())
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return f"{type(error).__name__} at {where}: {text[:400]}"


def find(path: str) -> Callable[[Context], None]:
    """The function of a section, from "module.function"."""
    module, name = path.split(".")
    function: Callable[[Context], None] = getattr(
        importlib.import_module(f"benchmarks.gpu.sections.{module}"), name
    )
    return function


def end_with_parent() -> None:
    """If the command is killed, end this process and all that it has started."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def file_of(folder: Path, name: str) -> Path:
    """Where a section writes its figures."""
    return folder / f"{name}.jsonl"


def main() -> None:
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    run_section(args.name, args.folder, is_dry=False, seconds=args.seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is written, and the destructors of process groups may wait for ever


if __name__ == "__main__":
    main()
