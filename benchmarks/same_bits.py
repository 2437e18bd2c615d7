"""Proof that a change of the code changes nothing else: an older revision beside the working tree.

    python benchmarks/same_bits.py                      # all cases, a line each
    python benchmarks/same_bits.py --only zero3 --only generate
    python benchmarks/same_bits.py --list
    python benchmarks/same_bits.py --speed              # how long a step takes, side by side

The base is checked out into a temporary folder. Both sides run the same command lines on this
machine, in fresh processes, each with its own tree first on PYTHONPATH. Weights, moments, prepared
ids, generated texts, figures and exit codes must be equal to the last bit: exit code 1 if one is
not. Messages may be reworded; those that were are listed at the end, old beside new.

With --cache DIR the base's results stay in DIR, so that the next run starts the new side alone.
They hold for one base, one version of these scripts, of torch and Python, and one machine.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import same_bits_speed
from same_bits_cases import BaseFailed, Case, Result, all_cases, make_inputs
from same_bits_sides import ROOT, Side, check_out, full_revision
from tqdm import tqdm

BASE = "907367e"
# Settings that the working tree calls otherwise than the base: old name -> new name.
RENAMED: dict[str, str] = {}
CORES = len(os.sched_getaffinity(0))
IS_HASH = re.compile("[0-9a-f]{64}")
SHOWN = 160  # characters of a value that differs


@dataclass
class Outcome:
    """A side's result in a case, and the seconds it took; a result that was kept took none."""

    result: Result
    seconds: float | None


def read_arguments() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--base", default=BASE, metavar="REV", help=f"compare with it ({BASE})")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="cases with this in their names; repeatable",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep what the base gave in DIR")
    parser.add_argument("--jobs", type=int, default=CORES, help=f"cases side by side ({CORES})")
    parser.add_argument("--speed", action="store_true", help="compare the time of a step instead")
    parser.add_argument("--rounds", type=int, default=5, help="of --speed (5)")
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    cases = [case for case in all_cases() if is_chosen(case.name, arguments.only)]
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not cases:
        sys.exit(
            f"error: --only {' '.join(arguments.only)}: no case has this in its name; see --list"
        )
    revision = full_revision(arguments.base)
    with tempfile.TemporaryDirectory(prefix="same-bits-") as scratch:
        kept = arguments.cache.resolve() if arguments.cache else Path(scratch)
        kept = kept / f"{revision[:7]}-{key_of_the_machine()}"
        kept.mkdir(parents=True, exist_ok=True)
        inputs = kept / "inputs"
        # Cases share the cores, so threads that wait must not spin. A step that is timed has them
        # alone.
        variables = {} if arguments.speed else {"OMP_WAIT_POLICY": "passive"}
        base = Side("base", kept / "tree", Path(scratch, "base"), inputs, {}, variables)
        new = Side("new", ROOT, Path(scratch, "new"), inputs, RENAMED, variables)
        check_out(revision, base.root)
        for side in (base, new):
            print(f"{side.name}: dist_lm is {side.prove_tree()}", flush=True)
        if arguments.speed:
            same_bits_speed.compare(base, new, arguments.rounds)
            return 0
        try:
            make_ready(base)
            return compare(base, new, cases, kept / "results", arguments.jobs)
        except BaseFailed as error:
            sys.exit(f"error: the base itself fails: {error}")


def is_chosen(name: str, only: Sequence[str]) -> bool:
    return not only or any(part in name for part in only)


def key_of_the_machine() -> str:
    """A short hash of all that the base's results depend on besides its revision."""
    facts = [platform.platform(), sys.version, str(CORES)]
    facts += [metadata.version(name) for name in ("torch", "numpy", "deepspeed", "tokenizers")]
    cpu = Path("/proc/cpuinfo").read_text()
    facts += sorted({line for line in cpu.splitlines() if line.startswith(("model name", "flags"))})
    facts += [path.read_text() for path in sorted(Path(__file__).parent.glob("same_bits*.py"))]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def make_ready(base: Side) -> None:
    """Make the inputs, unless they were kept."""
    whole = base.inputs / "whole"
    if whole.exists():
        return
    shutil.rmtree(base.inputs, ignore_errors=True)
    began = time.monotonic()
    make_inputs(base, lambda text: print(f"inputs: {text}", flush=True))
    whole.touch()
    print(f"inputs: made in {time.monotonic() - began:.1f} s", flush=True)


# --- running both sides


def compare(base: Side, new: Side, cases: list[Case], kept: Path, jobs: int) -> int:
    """Run the cases side by side and print a line for each. The exit code: 1 if one differs."""
    kept.mkdir(exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        waiting: dict[Future[Outcome], tuple[Case, Side]] = {}
        for case in cases:
            for side in (base, new):
                waiting[pool.submit(run_case, case, side, kept)] = (case, side)
        try:
            different, messages = follow(waiting)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            base.end_all()
            new.end_all()
            raise
    print_messages(messages)
    count = f"{len(cases)} cases, {len(different)} different"
    print(f"{count}: {', '.join(different)}" if different else f"{count}; every bit is the same")
    return 1 if different else 0


def follow(
    waiting: dict[Future[Outcome], tuple[Case, Side]],
) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Print a case when both sides are there; names of those that differ, and new messages."""
    outcomes: dict[str, dict[str, Outcome]] = {}
    different: list[str] = []
    messages: list[tuple[str, str, str]] = []
    with tqdm(total=len(waiting), leave=False, disable=None) as bar:
        while waiting:
            done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                case, side = waiting.pop(future)
                try:
                    sides = outcomes.setdefault(case.name, {})
                    sides[side.name] = future.result()
                except BaseFailed as error:
                    raise BaseFailed(f"{case.name}: {error}") from error
                bar.update()
                if len(sides) < 2:
                    continue
                old, now = sides["base"], sides["new"]
                found = differences(old.result.bits, now.result.bits)
                different += [case.name] if found else []
                messages += reworded(old.result.messages, now.result.messages)
                tqdm.write(line_of(case.name, old, now, found))
                sys.stdout.flush()
            bar.refresh()  # so that its clock goes on
    return different, messages


def run_case(case: Case, side: Side, kept: Path) -> Outcome:
    """A side's result in a case: the base's may have been kept."""
    slug = case.name.replace(" ", "-").replace(":", "-")
    file = kept / f"{slug}.json"
    if side.name == "base" and file.exists():
        return Outcome(Result(**json.loads(file.read_text())), None)
    folder = side.work / slug
    folder.mkdir(parents=True)
    began = time.monotonic()
    result = case.run(side, folder)
    seconds = time.monotonic() - began
    if side.name == "base":
        aside = file.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(result)))
        aside.rename(file)
    shutil.rmtree(folder)
    return Outcome(result, seconds)


# --- saying what differs


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """A line for each fact that is not the same."""
    found = []
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in new:
            found.append(f"{name} is gone")
        elif name not in old:
            found.append(f"{name} is new")
        elif old[name] != new[name]:
            found.append(f"{name}: {first_difference(old[name], new[name])}")
    return found


def first_difference(old: str, new: str) -> str:
    """The values, or of long ones the first part that differs."""
    if IS_HASH.fullmatch(old) and IS_HASH.fullmatch(new):
        return "other bytes"
    try:
        before, after = json.loads(old), json.loads(new)
        if isinstance(before, list) and isinstance(after, list):  # a figure's [step, value]
            pairs = zip(before, after, strict=False)
            old, new = next((str(a), str(b)) for a, b in pairs if a != b)
            return f"first at [step, value] {old} -> {new}"
    except (ValueError, StopIteration):
        pass
    same = 0
    while same < min(len(old), len(new)) and old[same] == new[same]:
        same += 1
    start = max(0, same - 20) if max(len(old), len(new)) > SHOWN else 0
    return f"{old[start : start + SHOWN]!r} -> {new[start : start + SHOWN]!r}"


def line_of(name: str, old: Outcome, new: Outcome, found: list[str]) -> str:
    seconds = f"{new.seconds:.1f} s"
    before = "kept" if old.seconds is None else f"{old.seconds:.1f} s"
    line = f"{name:28} {before:>8} {seconds:>8}  "
    if not found:
        return f"{line}same, {len(new.result.bits)} facts"
    return f"{line}DIFFERENT\n" + "\n".join(f"    {text}" for text in found)


def reworded(old: dict[str, str], new: dict[str, str]) -> list[tuple[str, str, str]]:
    names = [*old, *(name for name in new if name not in old)]
    changed = [name for name in names if old.get(name) != new.get(name)]
    return [(name, old.get(name, "(nothing)"), new.get(name, "(nothing)")) for name in changed]


def print_messages(messages: list[tuple[str, str, str]]) -> None:
    if not messages:
        print("no message was reworded")
        return
    print(f"{len(messages)} messages were reworded:")
    for name, old, new in sorted(messages):
        print(f"  {name}\n    old: {old}\n    new: {new}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
