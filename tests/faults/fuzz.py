"""Puts damaged input to everything that reads what a stranger may have written.

    python -m tests.faults.fuzz TARGET [--first N] [--count N]

Input number N of a target is a function of the target's name and N, so a finding is repeated by its
number, and a campaign can stop and go on. An input may be read, or refused by a UserError. Anything
else is a finding: another exception, a signal, more than SECONDS or more than MEMORY_BYTES.
"""

import argparse
import json
import mmap
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from dist_lm.errors import UserError
from tests.faults.operations import scratch_folder
from tests.procs import DEVNULL, ROOT, Process

SECONDS = 5  # for one input
STUCK_SECONDS = 30  # of work in a call into C, which no signal handler can end
WAIT_SECONDS = 600  # without work: for something that never comes, or on a machine with other work
FOREVER = 10.0**9  # seconds
LONGEST_ERROR = 2_100  # characters
MEMORY_BYTES = 4 * 2**30  # more than the process has when it begins


class TooSlow(BaseException):
    """Not an Exception, so that no code that we test takes it for its own."""


class Target:
    """Something that reads outside input. A new one says these two things."""

    def __init__(self, folder: Path):
        """Make in the folder what undamaged input is."""

    def feed(self, rng: random.Random) -> None:
        """Damage the input by the generator, and let the program read it."""
        raise NotImplementedError


@dataclass
class Report:
    """What a range of inputs did."""

    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds
    # By kind of finding: how often, and the number of the first input.
    findings: dict[str, list[int]] = field(default_factory=dict)

    def find(self, what: str, number: int) -> None:
        count, first = self.findings.get(what, [0, number])
        self.findings[what] = [count + 1, min(first, number)]

    def add(self, other: "Report") -> None:
        self.inputs += other.inputs
        self.refused += other.refused
        self.slowest = max(self.slowest, other.slowest)
        for what, (count, first) in other.findings.items():
            before, earlier = self.findings.get(what, [0, first])
            self.findings[what] = [before + count, min(earlier, first)]


# --- in the process that is fuzzed


def feed_range(
    name: str, first: int, count: int, progress: "mmap.mmap", seconds: float = FOREVER
) -> Report:
    """Feed inputs to a target, and note in `progress` which one is being read.

    None is begun after so many seconds. Each finding is printed at once, because a later input may
    end this process.
    """
    from tests.faults.targets import TARGETS

    report = Report()
    with scratch_folder() as folder:
        target = TARGETS[name](folder)
        limit_memory()
        end = time.monotonic() + seconds
        for number in range(first, first + count):
            began = time.monotonic()
            if began > end and number > first:
                break
            progress[:8] = number.to_bytes(8, "little")
            what = feed_one(target, random.Random(f"{name} {number}"))
            if what.startswith(TooSlow.__name__):  # the machine may have had other work
                what = feed_one(target, random.Random(f"{name} {number}"))
            report.inputs += 1
            report.slowest = max(report.slowest, time.monotonic() - began)
            if what == "refused":
                report.refused += 1
            elif what:
                print(json.dumps([what, number]), flush=True)
    return report


def feed_one(target: Target, rng: random.Random) -> str:
    """Nothing if it was read, `refused`, or where it went wrong."""
    try:
        with limited_time(), silence():
            target.feed(rng)
        return ""
    except UserError as error:
        if "\n" in str(error):
            return "an error of several lines"
        return "refused" if len(str(error)) <= LONGEST_ERROR else "a very long error"
    except BaseException as error:
        return f"{type(error).__name__} in {place_of(error)}"


def place_of(error: BaseException) -> str:
    """The last function of ours that an exception passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/dist_lm/" in frame.filename]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}: {frame.name}"


@contextmanager
def silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def limited_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(argv: list[str]) -> None:
    from tests.faults import mutants
    from tests.faults.targets import TARGETS

    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=FOREVER, help="begin none after so long")
    parser.add_argument("--mutant", choices=sorted(mutants.MUTANTS))
    parser.add_argument("--progress", help="a file that says which input is being read")
    chosen = parser.parse_args(argv)
    if chosen.mutant:
        mutants.MUTANTS[chosen.mutant]()
    with open(chosen.progress, "r+b") if chosen.progress else tempfile.TemporaryFile() as file:
        file.truncate(8)
        with mmap.mmap(file.fileno(), 8) as progress:
            report = feed_range(chosen.target, chosen.first, chosen.count, progress, chosen.seconds)
    print(json.dumps({"refused": report.refused, "slowest": report.slowest}))


# --- in the process that looks after it


def fuzz(target: str, first: int, count: int, mutant: str = "", seconds: float = FOREVER) -> Report:
    """Feed inputs to a target in a process of its own, for so many seconds.

    A process that dies is a finding, and another one goes on behind that input.
    """
    report = Report()
    began = time.monotonic()
    while report.inputs < count and (left := seconds - (time.monotonic() - began)) > 0:
        words = [target, "--first", str(first + report.inputs)]
        words += ["--count", str(count - report.inputs), "--seconds", str(left)]
        if mutant:
            words += ["--mutant", mutant]
        report.add(_fuzz_until_death(words, first + report.inputs))
    return report


def _fuzz_until_death(words: list[str], first: int) -> Report:
    """What the process reported, and whether it died of its last input."""
    with tempfile.NamedTemporaryFile() as progress, tempfile.TemporaryFile("w+") as printed:
        progress.truncate(8)
        command = [sys.executable, "-m", "tests.faults.fuzz", *words, "--progress", progress.name]
        process = Process(command, stdout=printed, stderr=DEVNULL, cwd=ROOT)
        is_stuck = _wait_while_it_moves(process, Path(progress.name))
        process.kill()
        process.wait()
        number = max(first, int.from_bytes(Path(progress.name).read_bytes()[:8], "little"))
        printed.seek(0)
        report = _read_report(printed)
    report.inputs = number + 1 - first
    if process.returncode != 0:
        report.find("stuck" if is_stuck else f"ended by {process.returncode}", number)
    return report


def _read_report(printed: IO[str]) -> Report:
    """What the process printed until it ended."""
    report = Report()
    for line in printed:
        content = json.loads(line)
        if isinstance(content, list):
            report.find(*content)
        else:
            report.refused = content["refused"]
            report.slowest = content["slowest"]
    return report


def _wait_while_it_moves(process: Process, progress: Path) -> bool:
    """Wait for the end. Returns whether it stuck at one input."""
    before: Any = None
    since = time.monotonic()
    worked = 0.0
    while process.poll() is None:
        now = progress.read_bytes()
        if now != before:
            before = now
            since = time.monotonic()
            worked = seconds_of_work(process.pid)
        is_working = seconds_of_work(process.pid) - worked > STUCK_SECONDS
        if is_working or time.monotonic() - since > WAIT_SECONDS:
            return True
        time.sleep(0.02)
    return False


def seconds_of_work(pid: int) -> float:
    """What a process has used of a processor so far. Waiting for one is not its fault."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:  # it has ended
        return 0.0
    return float(times.user + times.system)


if __name__ == "__main__":
    main(sys.argv[1:])
