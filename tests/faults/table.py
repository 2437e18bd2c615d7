"""Makes docs/faults.md, the table of all faults that the tests put to the program.

    python -m tests.faults.table          writes the page from the rows and the last results
    python -m tests.faults.table --run    runs the tests of all rows first, and keeps their results
    python -m tests.faults.table --run --row "two starts in one folder"    runs one row again

The results stand in results.json beside this file. A row without a result says so.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.rows import LOST, NOTICED, OPEN, ROWS, Row
from tests.procs import ROOT

PAGE = ROOT / "docs" / "faults.md"
RESULTS = Path(__file__).with_name("results.json")
HEAD = """# Faults

`python -m tests.faults.table` writes this page; edit the rows in `tests/faults/`, not this file.
Each row is a test of the ordinary test command, except six of the mutants, which need
`-m campaign`. `held` means that what must happen did, in all cases of the test. *Seconds* is the
longest time until every process of the run had ended, on two shared CPU cores. *Lost* is the
largest number of steps that had to be made again. The long form of these tests is a campaign; its
figures stand in `benchmarks/results/2026-11-27-faults.md`.
`SECURITY.md` says what an attacker may control.
"""

TAIL = """
## What is not covered

- **All ranks of a node are stopped (SIGSTOP).** A rank that ends kills the stopped ones of its
  own node, and here none is left to do that. The ranks of the other nodes notice the silence and
  end in time, with a report that names the rank and its host. The stopped processes stay until
  somebody continues them, and then their watchdog ends them, or until somebody kills them. Slurm
  does, because the job step ends with its first failed task (`--kill-on-bad-exit`). The launch
  scripts for plain hosts do not.
- **A rank that waits inside the kernel**, on a dead network file system say, cannot be killed by
  anybody until the kernel gives up.
- **Hub datasets** are parsed by `datasets` inside the run: a file that crashes the parser ends
  the run.
"""


class Recorder:
    """A plugin of pytest that keeps what became of each test."""

    def __init__(self) -> None:
        self.cases: dict[str, list[dict[str, Any]]] = {}  # by node id, without group

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        is_call = report.when == "call"
        if not is_call and report.passed:
            return
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "open"
        case = {"outcome": outcome, **dict(report.user_properties)}
        if outcome == "open":
            case[OPEN] = report.wasxfail.removeprefix("reason: ")
        self.cases.setdefault(report.nodeid.partition("@")[0], []).append(case)

    def result(self, row: Row) -> dict[str, Any]:
        """What became of a row: the worst of its cases."""
        found: list[dict[str, Any]] = []
        for name, cases in self.cases.items():
            if name == row.test or name.startswith(f"{row.test}["):
                found += cases
        outcomes = {case["outcome"] for case in found}
        result: dict[str, Any] = {"cases": len(found), "result": _word(outcomes)}
        for key in (NOTICED, LOST):
            figures = [case[key] for case in found if key in case]
            if figures:
                result[key] = max(figures)
        reasons = sorted({case[OPEN] for case in found if OPEN in case})
        if reasons:
            result[OPEN] = "; ".join(reasons)
        return result


def _word(outcomes: set[str]) -> str:
    for outcome, word in (("failed", "FAILED"), ("open", "open"), ("passed", "held")):
        if outcome in outcomes:
            return word
    return "not run"


def import_rows() -> None:
    """Import all test files, because the rows are registered there."""
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"tests.faults.{file.stem}")


def read_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def page() -> str:
    """The text of docs/faults.md."""
    results = read_results()
    lines = [HEAD]
    lines += ["| row | what is done | what must happen | result | seconds | lost | test |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name in sorted(ROWS):
        lines.append(_line(ROWS[name], results.get(name, {})))
    return "\n".join(lines) + "\n" + TAIL


def _line(row: Row, result: dict[str, Any]) -> str:
    said = result.get("result", "not run")
    if result.get("cases", 0) > 1:
        said += f" ({result['cases']} cases)"
    if OPEN in result:
        said += f"; open: {result[OPEN]}"
    seconds = f"{result[NOTICED]:.1f}" if NOTICED in result else ""
    lost = str(result[LOST]) if LOST in result else ""
    file, _, test = row.test.partition("::")
    cells = [row.name, row.fault, row.must, said, seconds, lost, f"`{file}`: {test}"]
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str]) -> int:
    import_rows()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--row", action="append", choices=sorted(ROWS), help="only this row")
    parser.add_argument("words", nargs="*", help="more words for pytest, after --")
    chosen = parser.parse_args(argv)
    code = 0
    if chosen.run:
        recorder = Recorder()
        names = chosen.row or sorted(ROWS)
        tests = sorted({ROWS[name].test for name in names})
        code = int(pytest.main(["-q", *tests, *chosen.words], plugins=[recorder]))
        results = read_results() if chosen.row else {}
        results |= {name: recorder.result(ROWS[name]) for name in names}
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page())
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
