"""The proof on a GPU: `python -m benchmarks.gpu --seconds 300`.

Runs every section that fits into the time, writes a line for each to a result file, and prints one
table. Without a GPU it runs tiny sizes of every section on the CPU, and reports them as dry. The
exit code is 1 if a check failed, 3 if what may not be left out has no result, 2 for a mistake on
the command line, and otherwise 0.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import table
from benchmarks.gpu.listing import Section, choose, tasks_of
from benchmarks.gpu.processes import ROOT, Command, Fork, environment
from benchmarks.gpu.resultfile import HEADER, append, last_line, read_results, read_section
from benchmarks.gpu.scheduler import Process, Result, Scheduler, Task, exit_code

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
LEAST_SECONDS = 120
PLACES_ON_GPU = 6  # checks that run side by side
MEMORY_SHARE = 0.95  # of the card, that tasks may claim together
NOT_DONE = ("failed", "skipped")  # results after which --failed runs a section again
DATA_SECONDS = 90.0  # at most, for making the data
# What the sections of a dry run import, some of it late: one import is enough for all forks.
LATE_MODULES = (
    "torch._dynamo",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "dist_lm.train",
    "dist_lm.loop",
    "benchmarks.gpu.data",
    "benchmarks.gpu.section",
)


def main() -> int:
    args = read_arguments()
    if args.table:
        table.main(args.table)
        return 0
    try:
        sections = selected(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.list:
        for section in sections:
            must = "must run" if section.task.must else ""
            print(f"{section.task.name:10} {section.task.seconds:4.0f} s  {section.title}  {must}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends all sections
    folder = Path(tempfile.mkdtemp(prefix="dist_lm-gpu-"))
    try:
        return Whole(args, sections, folder).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--seconds",
        type=int,
        default=300,
        help=f"the whole ends by itself within this time (at least {LEAST_SECONDS}; 300)",
    )
    parser.add_argument(
        "--only", action="append", default=[], help="sections, e.g. C5 or C5,S1 (repeatable)"
    )
    parser.add_argument(
        "--failed", type=Path, help="run what failed or was skipped in this result file"
    )
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("--list", action="store_true", help="print the sections and stop")
    parser.add_argument("--table", type=Path, help="print this result file as a table and stop")
    args = parser.parse_args()
    if args.seconds < LEAST_SECONDS:
        parser.error(f"--seconds {args.seconds} must be at least {LEAST_SECONDS}")
    return args


def selected(args: argparse.Namespace) -> list[Section]:
    """The sections that the command line asks for."""
    words = [word for words in args.only for word in words.split(",")]
    sections = choose(words)
    if not args.failed:
        return sections
    header, results = read_results(args.failed)
    done = [result["section"] for result in results if result["result"] not in NOT_DONE]
    # What is not in the results was cut off.
    left = [name for name in header["sections"] if name not in done]
    return [section for section in sections if section.task.name in left]


class Whole:
    """One call of the command, from the data to the table."""

    def __init__(self, args: argparse.Namespace, sections: list[Section], folder: Path):
        self.began = time.monotonic()
        self.deadline = self.began + args.seconds
        self.folder = folder
        self.facts = probe()
        self.is_dry = "card" not in self.facts
        self.gigabytes = self.facts.get("memory_bytes", 0) / 1e9
        self.tasks = tasks_of(sections, self.gigabytes)
        if self.is_dry:
            # Nothing compiles for a card, so there is nothing to prepare.
            self.tasks = [task for task in self.tasks if task.kind != "warm"]
        self.file = args.out or self.usual_file()
        self.results: list[Result] = []
        self.forked = 0

    def usual_file(self) -> Path:
        """A dated name with the card in it. A dry run says nothing worth keeping."""
        if self.is_dry:
            return self.folder / "dry.jsonl"
        card = re.sub(r"[^A-Za-z0-9]+", "-", self.facts["card"]).strip("-")
        path = RESULTS / f"{date.today()}-{card}.jsonl"
        number = 2
        while path.exists():  # an earlier result stays as it came
            path = RESULTS / f"{date.today()}-{card}-{number}.jsonl"
            number += 1
        return path

    def run(self) -> int:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        asked = [task.name for task in self.tasks if task.kind != "warm"]
        header = {"section": HEADER, "date": str(date.today()), "sections": asked, **self.facts}
        self.file.write_text(json.dumps(header) + "\n", encoding="utf-8")
        if self.is_dry:
            prepare_to_fork()
        reason = self.make_data()
        if reason:
            print(f"error: the data could not be made: {reason}", file=sys.stderr)
            return 1
        places = PLACES_ON_GPU
        if self.is_dry:
            places = len(os.sched_getaffinity(0))
        Scheduler(
            self.tasks_to_run(),
            start=self.start,
            read=self.read,
            record=self.record,
            deadline=self.deadline,
            places=places,
            gigabytes=MEMORY_SHARE * self.gigabytes if not self.is_dry else 1e9,
        ).run()
        print()
        print(table.markdown(header, self.results))
        print(f"{time.monotonic() - self.began:.0f} s in all; the result file is {self.file}")
        return exit_code(self.tasks, self.results, self.is_dry)

    def tasks_to_run(self) -> list[Task]:
        """In a dry run nothing is timed, so all sections may run side by side."""
        if not self.is_dry:
            return self.tasks
        changes = {"alone": False, "seconds": 1.0, "timeout": 120.0, "gigabytes": 0.0}
        return [replace(task, **changes) for task in self.tasks]

    def make_data(self) -> str:
        """Make the data of all sections; why it failed, or nothing."""
        log = self.folder / "data.log"
        process: Process
        if self.is_dry:
            from benchmarks.gpu.data import make_data

            work = partial(make_data, self.folder, is_dry=True)
            process = Fork(work, log, environment(), leads=True)
        else:
            words = [sys.executable, "-m", "benchmarks.gpu.data", str(self.folder)]
            process = Command(words, log, environment(), leads=True)
        end = time.monotonic() + DATA_SECONDS
        while (code := process.poll()) is None and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
        return "" if code == 0 else last_line(log) or f"exit code {code}"

    # --- what the scheduler asks for

    def start(self, task: Task) -> Process:
        log = self.folder / f"{task.name}.log"
        left = self.deadline - time.monotonic()
        seconds = min(task.timeout, left)
        if self.is_dry:
            core = self.forked % len(os.sched_getaffinity(0))
            self.forked += 1
            work = partial(run_on_core, core, task.name, self.folder, seconds)
            return Fork(work, log, environment(), leads=True)
        words = [sys.executable, "-m", "benchmarks.gpu.section", task.name]
        words += ["--folder", str(self.folder), "--seconds", str(seconds)]
        return Command(words, log, self.environment_of(task), leads=True)

    def environment_of(self, task: Task) -> dict[str, str]:
        """All sections share one cache of compiled kernels. What the user has set stays."""
        cores = len(os.sched_getaffinity(0))
        more = {
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "TOKENIZERS_PARALLELISM": "false",
            # A run sets it before CUDA starts. Sections start CUDA before their runs.
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        }
        if not task.alone:  # several compile side by side
            more["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(2, cores // 4))
        return environment() | {name: os.environ.get(name, more[name]) for name in more}

    def read(self, task: Task, code: int) -> Result:
        result = read_section(
            self.folder / f"{task.name}.jsonl", self.folder / f"{task.name}.log", code
        )
        if result["result"] == "passed":
            result["result"] = self.word_for_passed(task)
        return result

    def word_for_passed(self, task: Task) -> str:
        if self.is_dry:
            return "dry"
        return "measured" if task.kind == "speed" else "passed"

    def record(self, result: Result) -> None:
        """Write a result at once, and say it."""
        self.results.append(result)
        append(self.file, result)
        # Checkpoints of one section must not fill the disk for the next.
        shutil.rmtree(self.folder / result["section"], ignore_errors=True)
        why = f": {result['why']}" if result.get("why") else ""
        at = time.monotonic() - self.began
        print(
            f"{at:5.0f} s  {result['section']:14} {result['result']}"
            f" in {result['seconds']:g} s{why}",
            flush=True,
        )


# --- this machine


def probe() -> dict[str, Any]:
    """The facts of this machine.

    With a card they are asked for in another process, so that CUDA stays out of this one.
    """
    if not may_have_card():
        prepare_to_fork()
        from benchmarks.gpu.facts import collect

        return collect()
    words = [sys.executable, "-m", "benchmarks.gpu.facts"]
    done = subprocess.run(
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100
    )
    if done.returncode:
        raise SystemExit(f"error: torch does not work here: {done.stderr.strip()[-500:]}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def may_have_card() -> bool:
    """Whether it is worth asking torch for a card."""
    return bool(shutil.which("nvidia-smi")) or os.path.exists("/dev/nvidiactl")


def prepare_to_fork() -> None:
    """Import what the sections import, once. No thread may be started before a fork."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's import would start threads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in LATE_MODULES:
        importlib.import_module(name)
    with contextlib.suppress(ImportError):  # optional
        from transformers import AutoModelForCausalLM, GPT2LMHeadModel  # noqa: F401


def run_on_core(core: int, name: str, folder: Path, seconds: float) -> None:
    """A section of a dry run: on one core, so that several do not wait for each other's threads."""
    import torch  # imported before the fork

    from benchmarks.gpu.section import run_section

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core]})
    torch.set_num_threads(1)
    run_section(name, folder, is_dry=True, seconds=seconds)


if __name__ == "__main__":
    sys.exit(main())
