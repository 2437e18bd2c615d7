"""Interrupts a piece of work at each of its file operations, and looks what is left.

    python -m tests.faults.operations SCENARIO [--mutant NAME] [--every N] [--first K]

runs the work once to count its operations, and then again for each fault: a kill before, after or
in the middle of the n-th operation, an error, a short write, a delay. After each fault the same
work is done again without one. The end must be the same as if nothing had happened.

A line of JSON is printed for each fault that was survived badly, and one with the counts at the
end. The process is started with the shim in LD_PRELOAD; see shim.c and start().
"""

import argparse
import ctypes
import errno
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dist_lm.errors import UserError
from tests.procs import ROOT, Process

HERE = Path(__file__).parent
LIMIT_SECONDS = 120  # for the work with one fault
DELAY_MICROSECONDS = 20_000


# --- the shim


def compile_shim(folder: Path) -> Path:
    """The shim as a library, unless it is there. Skips the test where there is no C compiler."""
    library = folder / "shim.so"
    if library.exists():
        return library
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc or gcc), for the shim that interrupts file operations")
    made = folder / f"shim-{os.getpid()}.so"
    options = ["-O1", "-shared", "-fPIC", "-o", str(made), str(HERE / "shim.c"), "-ldl"]
    subprocess.run([compiler, *options], check=True, timeout=60)
    made.rename(library)
    return library


def start(library: Path, *arguments: str) -> Process:
    """This module as a process in which the shim is loaded."""
    variables = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.faults.operations", *arguments]
    return Process(command, variables=variables, stderr=None)


@dataclass(frozen=True)
class Result:
    """What an enumeration found."""

    found: tuple[dict[str, Any], ...]
    counts: dict[str, int]

    def wrong(self, kind: str) -> list[str]:
        """What went wrong in this way, each with its fault."""
        lines = []
        for one in self.found:
            if one["wrong"].startswith(kind):
                lines.append(f"{one['fault']}: {one['wrong']}")
        return lines


def enumerate_faults(library: Path, *arguments: str) -> Result:
    """Run the command of this module to its end."""
    with start(library, *arguments) as process:
        printed, _ = process.communicate()
    assert process.returncode == 0, f"the enumeration itself failed: {printed}"
    *found, counts = [json.loads(line) for line in printed.splitlines()]
    return Result(tuple(found), counts)


# The numbers of the actions in shim.c.
ACTIONS = {
    "count": 0,
    "kill before": 1,
    "kill after": 2,
    "kill half-way": 3,
    "short write": 4,
    "fail once": 5,
    "fail from here on": 6,
    "delay": 7,
}


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th operation."""

    action: str
    nth: int
    error: str = ""

    def arm(self, folder: Path) -> None:
        error = getattr(errno, self.error) if self.error else 0
        number = ACTIONS[self.action]
        place = os.path.realpath(folder).encode()
        shim().fault_arm(place, self.nth, number, error, DELAY_MICROSECONDS)

    def __str__(self) -> str:
        return f"{self.action} {self.error}".strip() + f" at operation {self.nth}"


# What is tried at each operation.
KINDS = [
    ("kill before", ""),
    ("kill after", ""),
    ("kill half-way", ""),
    ("short write", ""),
    ("fail once", "EIO"),
    ("fail once", "ESTALE"),
    ("fail from here on", "ENOSPC"),
    ("fail from here on", "EROFS"),
    ("delay", ""),
]


def shim() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.fault_arm.argtypes = [ctypes.c_char_p] + [ctypes.c_long, ctypes.c_int] * 2
    library.fault_arm.argtypes[4] = ctypes.c_long
    library.fault_count.restype = ctypes.c_long
    library.fault_log.restype = ctypes.c_char_p
    return library


# --- the work

# What can be wrong after a fault: something is lost or mixed up, the work ended in a traceback
# instead of a line, a file stays that no later work deletes.
STATE, TRACEBACK, STRAY = WRONGS = ("state", "traceback", "stray")


@dataclass(frozen=True)
class Ended:
    """How a child that did the work ended."""

    how: str  # done, refused, killed, crashed or hung
    said: str = ""
    log: tuple[str, ...] = ()  # the operations that it made


class Scenario:
    """A piece of work that is interrupted. A new one says these four things."""

    name = ""
    below = "."  # the folder whose operations count

    def before(self, folder: Path) -> None:
        """What lies in the folder before the work begins. Once for all faults."""

    def work(self, folder: Path) -> None:
        """What is interrupted. It runs in a forked child, in a copy of the folder."""
        raise NotImplementedError

    def look(self, folder: Path) -> dict[str, Any]:
        """What must be the same in the end. By default: all files and their bytes."""
        return contents(folder)

    def check(self, folder: Path, fault: Fault, ended: Ended) -> None:
        """What must hold right after the fault, beside what holds for all work."""


def do(scenario: Scenario, folder: Path, fault: Fault) -> Ended:
    """Do the work in a forked child, with the fault."""
    printed = os.memfd_create("printed")
    report = os.memfd_create("report")
    pid = os.fork()
    if pid == 0:
        _work_in_child(scenario, folder, fault, printed, report)
    ended = _wait(pid)
    said = os.pread(printed, 10_000_000, 0).decode(errors="replace")[-2000:]
    result = os.pread(report, 10_000_000, 0)
    os.close(printed)
    os.close(report)
    if ended in ("hung", "killed"):
        return Ended(ended)
    if not result:
        return Ended("crashed", f"exit status {ended}: {said}")
    return Ended(**json.loads(result))


def _work_in_child(
    scenario: Scenario, folder: Path, fault: Fault, printed: int, report: int
) -> NoReturn:
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    fault.arm(folder / scenario.below)
    try:
        scenario.work(folder)
        ended = {"how": "done"}
    except UserError as error:
        ended = {"how": "refused", "said": str(error)}
    except SystemExit as error:
        ended = {"how": "done" if not error.code else "refused", "said": f"exit {error.code}"}
    except BaseException:
        ended = {"how": "crashed", "said": traceback.format_exc()[-2000:]}
    log = shim().fault_log().decode(errors="replace").splitlines()
    os.pwrite(report, json.dumps(ended | {"log": log}).encode(), 0)
    os._exit(0)


def _wait(pid: int) -> str:
    """Wait for a child, and kill it after a while."""
    deadline = time.monotonic() + LIMIT_SECONDS
    pause = 0.0005
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "killed" if os.WIFSIGNALED(status) else str(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hung"
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)


class Enumeration:
    """A scenario with a fault at each of its operations."""

    def __init__(self, scenario: Scenario, scratch: Path):
        self.scenario = scenario
        self.scratch = scratch
        self.template = scratch / "template"
        self.template.mkdir(parents=True)
        scenario.before(self.template)
        gc.freeze()  # so that children need not look through these objects, which copies them
        self.undisturbed = self.copy("undisturbed")
        ended = do(scenario, self.undisturbed, Fault("count", 0))
        assert ended.how == "done", ended
        scenario.check(self.undisturbed, Fault("count", 0), ended)
        self.log = ended.log
        self.expected = scenario.look(self.undisturbed)

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.template, self.scratch / name, symlinks=True))

    def faults(self) -> Iterator[Fault]:
        """A fault of each kind at each operation. A short write needs a write."""
        for nth, line in enumerate(self.log, 1):
            is_write = line.startswith("write ")
            for action, error in KINDS:
                if is_write or action not in ("kill half-way", "short write"):
                    yield Fault(action, nth, error)

    def attempt(self, fault: Fault) -> list[str]:
        """What went wrong with this fault: lines that begin with one of WRONGS."""
        folder = self.copy("try")
        try:
            ended = do(self.scenario, folder, fault)
            wrong = []
            if ended.how in ("crashed", "hung"):
                wrong.append(f"{TRACEBACK}: {ended.said or ended.how}")
            if fault.action in ("short write", "delay") and ended.how != "done":
                wrong.append(f"{STATE}: it did not end well but {ended.how}: {ended.said}")
            wrong += self._look_after(folder, fault, ended)
        finally:
            shutil.rmtree(folder)
        return wrong

    def _look_after(self, folder: Path, fault: Fault, ended: Ended) -> list[str]:
        """What is wrong in the folder, and after the same work is done again."""
        try:
            self.scenario.check(folder, fault, ended)
        except (AssertionError, UserError) as error:
            return [f"{STATE}: right after the fault ({ended.how}): {error}"]
        again = do(self.scenario, folder, Fault("count", 0))
        if again.how != "done":
            return [f"{STATE}: the same work again: {again.how}: {again.said}"]
        found = self.scenario.look(folder)
        if different(found, self.expected):
            return [f"{STATE}: in the end there was {different(found, self.expected)}"]
        strays = self.names(folder) - self.names(self.undisturbed)
        return [f"{STRAY}: {name} stays" for name in sorted(strays)]

    def names(self, folder: Path) -> set[str]:
        """All files below the folder, hidden ones too."""
        below = folder / self.scenario.below
        return {str(path.relative_to(below)) for path in below.rglob("*")}


def different(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Which entries are missing or have another value, or nothing. More of them may be there."""
    names = [name for name in expected if found.get(name) != expected[name]]
    return f"another {', '.join(names)}" if names else ""


def contents(folder: Path) -> dict[str, str]:
    """All files below a folder, with a hash of each."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hash_of(path) for path in files}


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# --- the command


def main(argv: Sequence[str]) -> None:
    from tests.faults import mutants, scenarios

    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", choices=sorted(scenarios.SCENARIOS))
    parser.add_argument("--mutant", choices=sorted(mutants.MUTANTS))
    parser.add_argument("--only", default="", help="only at operations that hold this text")
    parser.add_argument("--first", type=int, default=0, help="number of the first fault to try")
    parser.add_argument("--every", type=int, default=1, help="try every n-th fault")
    parser.add_argument("--most", type=int, default=10**9, help="try so many at most")
    parser.add_argument("--seconds", type=float, default=10**9, help="begin none after so long")
    chosen = parser.parse_args(argv)
    if chosen.mutant:
        mutants.MUTANTS[chosen.mutant]()
    began = time.monotonic()
    with scratch_folder() as scratch:
        enumeration = Enumeration(scenarios.SCENARIOS[chosen.scenario](), scratch)
        faults = []
        for fault in enumeration.faults():
            if chosen.only in enumeration.log[fault.nth - 1]:
                faults.append(fault)
        numbers = range(chosen.first, len(faults), chosen.every)[: chosen.most]
        tried = 0
        counts = dict.fromkeys(WRONGS, 0)
        for number in numbers:
            if time.monotonic() - began > chosen.seconds:
                break
            fault = faults[number]
            operation = enumeration.log[fault.nth - 1]
            tried += 1
            for wrong in enumeration.attempt(fault):
                counts[wrong.partition(":")[0]] += 1
                found = {"number": number, "fault": f"{fault} ({operation})", "wrong": wrong}
                print(json.dumps(found), flush=True)
    counts |= {"operations": len(enumeration.log), "faults": len(faults), "tried": tried}
    print(json.dumps(counts), flush=True)


class scratch_folder:
    """A folder in memory, if there is such a place: fsync costs nothing there."""

    def __enter__(self) -> Path:
        place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.path = tempfile.mkdtemp(prefix="dist_lm-faults-", dir=place)
        return Path(self.path)

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            shutil.rmtree(self.path)


if __name__ == "__main__":
    main(sys.argv[1:])
