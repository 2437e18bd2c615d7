"""All checks of doctor in order, and the page of what they found.

Each check gives a text and whether it is a warning, or raises UserError, on all ranks alike, if it
fails. Rank 0 prints; when it may be the one that is gone, the others do.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from dist_lm.checks.command import DoctorFlags
from dist_lm.checks.folders import disk, run_folder, space
from dist_lm.checks.inputs import data, tokenizer
from dist_lm.checks.links import pairs, rendezvous, sums
from dist_lm.checks.machines import clocks, devices, memory, speed, threads, versions
from dist_lm.checks.ranks import Found, Ranks, run_within
from dist_lm.config import Config
from dist_lm.errors import DataError, RetryableError, UserError, in_a_line
from dist_lm.runtime.start import start
from dist_lm.runtime.world import Runtime


class Check(NamedTuple):
    """A check, and what to do if it is not ok."""

    name: str
    look: Callable[[Ranks], Found]
    remedy: str
    needs: str = "devices"  # the check without which this one makes no sense
    failure: type[UserError] = RetryableError  # whose exit code a failure has


CHECKS = (
    Check(
        "devices",
        devices,
        "look at that host; of several kinds all wait for the slowest in each step",
    ),
    Check("versions", versions, "install the same on every host"),
    Check("threads", threads, "fewer ranks there, or more cores for them"),
    Check("memory", memory, "python -m dist_lm.plan shows what would fit"),
    Check("clocks", clocks, "set the clocks by NTP: times in logs and metrics do not compare"),
    Check(
        "rendezvous",
        rendezvous,
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface between the hosts",
    ),
    Check("all-reduce", sums, ""),
    Check("pairs", pairs, "look at the link of the pair that is slower than the median"),
    Check(
        "speed",
        speed,
        "all wait for it in each step: look for other jobs, heat or a power limit there,"
        " or leave it out",
    ),
    Check(
        "run folder",
        run_folder,
        "a run.dir that all hosts share and may write to, by its absolute path",
    ),
    Check(
        "space",
        space,
        "another run.dir, a smaller run.keep_last, or free some;"
        " if unknown, prepare the text first",
        needs="run folder",
    ),
    Check("disk", disk, "another disk, or a larger run.save_every", needs="space"),
    Check(
        "data",
        data,
        "the same copy where every host sees it, by its absolute path",
        failure=DataError,
    ),
    Check(
        "tokenizer",
        tokenizer,
        "data, data.tokenizer and checkpoint that belong together",
        needs="data",
        failure=DataError,
    ),
)


@dataclass(frozen=True)
class Result:
    """A line of the page."""

    name: str
    grade: str  # ok, warn, fail
    text: str
    remedy: str = ""
    code: int = 0


def run(config: Config, flags: DoctorFlags) -> None:
    """Start as train.py would, examine, print, and exit with the code of the first failure."""
    seconds = float(flags.timeout_seconds)
    of_run = config.run.model_copy(update={"timeout_seconds": seconds})
    results: list[Result] = []
    runtime = None
    try:
        runtime = start(config.model_copy(update={"run": of_run}), flags.launch, examining=True)
        for result in examine(runtime, config, seconds):
            results.append(result)  # one by one: a peer's end leaves what was found before
    except UserError as error:
        results.append(failed_start(error))
    except RuntimeError as error:  # of torch.distributed
        results.append(missing_peer(error, results, seconds))
    code = next((result.code for result in results if result.grade == "fail"), 0)
    last = results[-1]
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        world = runtime.world_size if runtime else 0
        print(page(results, world, code, flags.as_json), flush=True)
    elif last.name == "peers":
        print(f"rank {rank} ({socket.gethostname()}): {last.text}", file=sys.stderr, flush=True)
    if runtime is None or last.name == "peers":
        os._exit(code)  # threads may wait for a dead peer forever
    runtime.close()
    sys.exit(code)


def failed_start(error: UserError) -> Result:
    is_settings_or_data = error.code in (UserError.code, DataError.code)
    code = error.code if is_settings_or_data else RetryableError.code
    return Result("start", "fail", str(error), "correct what it names", code)


def missing_peer(error: RuntimeError, results: Sequence[Result], seconds: float) -> Result:
    after = f"after the check of {results[-1].name}" if results else "at the start"
    address = os.environ.get("MASTER_ADDR", "localhost")
    port = os.environ.get("MASTER_PORT", "?")
    text = (
        f"a rank is missing, died or was silent for {seconds:g} s, {after}"
        f" (rendezvous {address}:{port}): {in_a_line(error)}"
    )
    remedy = (
        "look at the ranks that do not say this, and whether every host reaches MASTER_ADDR"
        " at MASTER_PORT"
    )
    return Result("peers", "fail", text, remedy, RetryableError.code)


def examine(runtime: Runtime, config: Config, seconds: float) -> Iterator[Result]:
    """The results of all checks, in order. All ranks."""
    ranks = Ranks(runtime, config, seconds)
    failed = set()  # checks that failed, or could not be made
    try:
        for check in CHECKS:
            if check.needs in failed:
                failed.add(check.name)
                continue
            try:
                text, is_warning = check.look(ranks)
            except UserError as error:
                failed.add(check.name)
                yield Result(check.name, "fail", str(error), check.remedy, check.failure.code)
                continue
            if is_warning:
                yield Result(check.name, "warn", text, check.remedy)
            else:
                yield Result(check.name, "ok", text)
    finally:
        if ranks.is_main:
            run_within(seconds / 4, ranks.clean)


def page(results: Sequence[Result], world: int, code: int, as_json: bool) -> str:
    """The page that rank 0 prints."""
    if as_json:
        checks = [asdict(result) for result in results]
        return json.dumps({"ranks": world, "code": code, "checks": checks}, indent=1)
    lines = []
    for result in results:
        lines.append(f"{result.grade:6}{result.name:12}{result.text}")
        if result.remedy:
            lines.append(f"{'':18}-> {result.remedy}")
    grades = [result.grade for result in results]
    warned = grades.count("warn")
    lines.append(f"{len(grades)} checks: {warned} warn, {grades.count('fail')} fail")
    return "\n".join(lines)
