"""Records how a run ended, and says whether to start it again: RUN/outcome.json.

torchrun flattens every exit code to 1, so a launcher reads the file: `class`, the newest saved
`step`, the `reason`, the number of the `attempt`, and how many `failures` in a row there were
without a new step. Launch scripts ask `python -m dist_lm.outcome before|after ...`. Neither torch
nor numpy is imported here, so that signals are heard from before they are, and that a typing
mistake is answered at once.

The file belongs to the run that holds the folder's lock, which is released after the ending is
recorded. Then metrics.jsonl gets a line about the ending too, so that the history of a run has all
of its stops. A start that fails before it has the lock records too, unless another run lives in the
folder. A start that was refused because of that other run, or lost the folder to it, leaves the
file alone. Its ending goes to a file of its own, RUN/.refused-ID.json, where ID is the
DIST_LM_START_ID of its launch script. `after` of that script reads the file and deletes it.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field

from dist_lm import metrics
from dist_lm.cli import ALL_SETTINGS, Command, ConfigFlags, load
from dist_lm.console import count, dispensable, printable
from dist_lm.disk import open_own
from dist_lm.environment import environment_number, own_rank, rank_here
from dist_lm.errors import (
    CODES,
    CheckpointError,
    UserError,
    in_a_line,
    kind,
    one_line,
    run_entry,
)
from dist_lm.launcher import end_stopped_ranks, has_lost_a_rank
from dist_lm.lock import RunLock
from dist_lm.outside import CheckedModel, Count, Text, check, read_json
from dist_lm.stop import Stop

_LARGEST = 2**18  # bytes of outcome.json, whose reason is one line
# After a signal during start-up, how long the ranks may still take to meet: imports take seconds on
# a busy machine. Where a rank is lost, they will not meet.
SECONDS_TO_MEET = 15.0
SECONDS_TO_MEET_WITHOUT_ONE = 3.0
SECONDS_TO_EXPLAIN = 12.0  # the watchdog asks for four beats which rank is to blame
SECONDS_TO_RECORD = 3.0  # in a folder that may hang
PATIENCE = 3  # failures without a new step after which nothing is started again


class TrainFlags(ConfigFlags):
    """Train a GPT. The same command again goes on where the run folder stands."""

    allow_change: tuple[str, ...] = Field(
        (),
        description="Let FIELD differ from what the run was started with (repeatable).",
    )
    launch: str | None = Field(
        None,
        description="How the processes share the work, where torchrun started them:"
        " a file of launch/, e.g. zero3.",
    )


TRAIN = Command(
    "accelerate launch dist_lm/train.py [--config FILE] [--section.field VALUE ...]",
    TrainFlags,
    settings=ALL_SETTINGS,
    of_scripts=dict.fromkeys(
        ("nproc", "nnodes", "host", "node-rank", "port", "interface", "restarts", "dry-run"),
        "launch/torchrun.sh",
    ),
)


class Outcome(CheckedModel):
    """The content of outcome.json."""

    kind: Literal[tuple(CODES)] = Field(alias="class")  # type: ignore[valid-type]
    step: Count
    reason: Text
    attempt: Count
    failures: Count


def read(folder: Path, name: str = "outcome.json") -> dict[str, Any]:
    """The content of an outcome file; empty if there is no readable one."""
    try:
        content = read_json(folder / name, CheckpointError, _LARGEST)
        return check(content, Outcome, CheckpointError).model_dump(by_alias=True)
    except CheckpointError:
        return {}


class Attempt:
    """One start of a run.

    A launcher gives its number; without one it is the number of the last attempt plus one.
    """

    def __init__(self, folder: Path, number: int | None = None):
        self.folder = folder
        self.began = time.time()  # seconds since 1970
        self.before = read(folder)  # how the last attempt ended
        self.stop = Stop()
        self.has_met = threading.Event()  # all ranks are there
        self.lock = RunLock(folder)  # taken once they are
        start_id = os.environ.get("DIST_LM_START_ID", "")
        self.refusal = ""  # name of the file for our launch script, if one started us
        if start_id:
            printable_id = re.sub(r"[^A-Za-z0-9._-]", "_", start_id[:100])
            self.refusal = f".refused-{printable_id}.json"
        number = number or environment_number("DIST_LM_ATTEMPT", 0)
        self.number = number or self.before.get("attempt", 0) + 1

    def listen(self) -> None:
        """From here on signals are heard, also while torch waits for a rank that never comes."""
        self.stop.listen()
        threading.Thread(target=self._leave_when_told, daemon=True, name="leave-when-told").start()

    def _leave_when_told(self) -> None:
        """After a signal, end this process if it cannot stop in the usual way.

        That needs all ranks. Launchers send a signal also when a rank has ended.
        """
        while True:
            name = self.stop.wait_for_signal()
            has_lost_one = has_lost_a_rank()
            self.has_met.wait(SECONDS_TO_MEET_WITHOUT_ONE if has_lost_one else SECONDS_TO_MEET)
            if not self.has_met.is_set():
                break
            if has_lost_one:
                time.sleep(SECONDS_TO_EXPLAIN)  # the usual way names the rank, and ends before
                break
        if has_lost_one:
            self._leave("retryable", "another rank of this node ended")
        self._leave("preempted", f"stopped during start-up: {name}")

    def _leave(self, kind: str, reason: str) -> NoReturn:
        """Record why, and end the process: nothing that waits for other ranks may be called."""

        def record() -> None:
            time.sleep(min(own_rank(), 1))  # rank 0 comes first
            if own_rank() == 0 or not self.is_recorded:
                self.record(kind, reason)

        recorder = threading.Thread(target=record, daemon=True)
        recorder.start()
        recorder.join(SECONDS_TO_RECORD)
        end_stopped_ranks()
        os._exit(CODES[kind])

    @property
    def is_recorded(self) -> bool:
        return bool(self.read_refusal()) or int(read(self.folder).get("attempt", 0)) >= self.number

    def read_refusal(self) -> dict[str, Any]:
        """The outcome of this start, where another run has the folder."""
        if not self.refusal:
            return {}
        return read(self.folder, self.refusal)

    def forget_refusal(self) -> None:
        """Delete the file, and the folder if it was made for that file alone."""
        with contextlib.suppress(OSError):
            (self.folder / self.refusal).unlink()
            self.folder.rmdir()

    def record(self, kind: str, reason: str) -> dict[str, Any]:
        """Write the ending. If another run has the folder, write it only for our launch script.

        One process at a time may do so; a later one of the same attempt replaces it.
        """
        step = self._newest_step()
        outcome = {
            "class": kind,
            "step": step,
            "reason": reason,
            "attempt": self.number,
            "failures": self._count_failures(kind, reason, step),
        }
        name = "outcome.json"
        with dispensable(self.folder / name):  # a full disk must not change how a run ends
            if self.lock.is_anothers():
                name = self.refusal
            if name:
                self._write(name, json.dumps(outcome) + "\n")
            if name == "outcome.json":
                self._add_to_history(outcome)
        return outcome

    def _add_to_history(self, outcome: dict[str, Any]) -> None:
        """Write the stop into metrics.jsonl. A run that has not begun has no history."""
        path = self.folder / metrics.FILE
        if path.is_file():
            history = metrics.MetricsFile(path)
            history.write({"event": "stop", "time": time.time(), **outcome})
            history.close()

    def _newest_step(self) -> int:
        """The newest step that was saved, or 0."""
        manifests = self.folder.glob("step-" + "[0-9]" * 8 + "/manifest.json")
        steps = [int(manifest.parent.name.removeprefix("step-")) for manifest in manifests]
        return max(steps, default=0)

    def _count_failures(self, kind: str, reason: str, step: int) -> int:
        """Failures in a row without a new step, this attempt included.

        Being preempted is no failure. A job that is too short for one new step is one.
        """
        step_before = self.before.get("step", 0)
        failures: int = self.before.get("failures", 0)
        if step != step_before:
            failures = 0
        ended_by_clock = (
            kind == "preempted" and "SIGTERM" not in reason and os.environ.get("DIST_LM_STOP_AT")
        )
        if kind == "retryable" or (ended_by_clock and step == step_before):
            failures += 1
        return failures

    def _write(self, name: str, text: str) -> None:
        """Write aside and rename, so that nobody reads half a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".outcome.json.{socket.gethostname()}.{os.getpid()}"
        with open_own(aside, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(aside, self.folder / name)
        if self.lock.text:
            # Files of attempts that were killed while they wrote one.
            for left_over in self.folder.glob(".outcome.json.*"):
                left_over.unlink(missing_ok=True)

    def run(self, work: Callable[[], str]) -> None:
        """Do the work, record how it ended, and exit accordingly.

        The work returns why it stopped early, or "".
        """
        try:
            reason = work()
            if own_rank() == 0:
                self.record("preempted" if reason else "done", reason)
        except UserError as error:
            self._record_refusal(error)
            raise
        except KeyboardInterrupt:
            self.record("preempted", "stopped at once")
            self.lock.release()
            os._exit(130)  # at once: nothing waits for peers
        except Exception as error:
            traceback.print_exc()
            if own_rank() == 0 or not self.is_recorded:
                where = rank_here(own_rank())
                self.record("retryable", f"{where}: {in_a_line(error)}")
            self.lock.release()
            sys.stdout.flush()
            sys.stderr.flush()
            # Not through destructors, which may wait for a peer that is gone.
            os._exit(CODES["retryable"])
        finally:
            self.lock.release()
            self.stop.ignore()
        if reason:
            sys.exit(CODES["preempted"])

    def _record_refusal(self, error: UserError) -> None:
        """Record a UserError. Rank 0 speaks for all, unless this rank is alone with its error.

        Where another run has the folder, each rank tells the launch script of its own node.
        """
        rank = own_rank()
        if rank:
            self._wait_for_record(seconds=5)
        if rank == 0 or not self.is_recorded:
            self.record(kind(error.code), one_line(error))
            if rank and not self.lock.is_anothers():
                text = f"{rank_here(rank)}: {one_line(error)}"
                print(f"error: {text}", file=sys.stderr)

    def _wait_for_record(self, seconds: float) -> None:
        """Give rank 0 time to record the ending, unless another run has the folder."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.is_recorded or self.lock.is_anothers():
                return
            time.sleep(0.1)


def main(argv: list[str]) -> None:
    """Answer a launch script.

    before ARGUMENTS: refuse what train.py would, and print the number of the next attempt and the
    run folder. after NUMBER CODE ARGUMENTS: print how it ended, and exit with the code of its
    class; 70 and 75 may be started again.
    """
    match argv:
        case ["before", *words]:
            config, _ = load(words, TRAIN)
            folder = Path(config.run.dir)
            print(read(folder).get("attempt", 0) + 1, folder.absolute())
        case ["after", number, code, *words] if number.isdecimal():
            config, _ = load(words, TRAIN)
            sys.exit(answer_after(Path(config.run.dir), int(number), code))
        case _:
            raise UserError("rule: before ARGUMENTS, or after NUMBER CODE ARGUMENTS")


def answer_after(folder: Path, number: int, code: str) -> int:
    """Print how an attempt ended whose launcher exited with `code`; the code to exit with."""
    attempt = Attempt(folder, number)
    deadline = time.monotonic() + 10
    while code != "0" and not attempt.is_recorded and time.monotonic() < deadline:
        time.sleep(0.5)  # a rank on another node may be about to write it
    outcome = attempt.read_refusal() or read(folder)
    if not attempt.is_recorded:  # no rank was left to write it
        ending = "done" if code == "0" else "retryable"
        outcome = attempt.record(ending, f"no rank said why (exit code {code})")
    if attempt.read_refusal():
        attempt.forget_refusal()
    ending = outcome["class"]
    line = f"{folder}: {ending} at step {outcome['step']}, attempt {outcome['attempt']}"
    if outcome["reason"]:
        line += f": {printable(str(outcome['reason']))}"
    print(line, file=sys.stderr)
    failures = outcome["failures"]
    if failures >= PATIENCE and ending in ("retryable", "preempted"):
        print(
            f"{folder}: failed {count(failures, 'time')} without a new step; not started again",
            file=sys.stderr,
        )
        return 1
    return CODES[ending]


if __name__ == "__main__":
    run_entry(main)
