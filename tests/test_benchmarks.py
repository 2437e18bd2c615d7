"""The claims of benchmarks/: each works, both sides agree, and the tables are the results'."""

import importlib
import json
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import benchmarks.claims
from benchmarks import results, running, table
from benchmarks.claim import (
    COST,
    FASTER,
    Claim,
    Context,
    Measured,
    Target,
    must_be_near,
    must_equal,
    summarize,
    take_turns,
)
from benchmarks.listing import CLAIMS
from tests.procs import ROOT, run


def a_claim(measure: object = None, **more: object) -> Claim:
    values = {"name": "a", "sentence": "a against b", "figure": FASTER, "target": Target(least=2)}
    return Claim(**{**values, "measure": measure, **more})  # type: ignore[arg-type]


def test_the_tables_are_made_of_the_newest_results() -> None:
    for path, text in table.pages(CLAIMS, results.newest()).items():
        is_equal = path.read_text(encoding="utf-8") == text
        assert is_equal, f"{path.name}: write it again with python -m benchmarks --table"


def test_every_file_of_claims_is_listed_and_every_name_is_its_own() -> None:
    found: list[str] = []
    for module in pkgutil.iter_modules(benchmarks.claims.__path__):
        found += [
            c.name for c in importlib.import_module(f"benchmarks.claims.{module.name}").CLAIMS
        ]
    assert sorted(found) == sorted(claim.name for claim in CLAIMS)
    assert len(set(found)) == len(found)


@pytest.mark.slow
def test_every_claim_works_and_its_sides_agree() -> None:
    done = run([sys.executable, "-m", "benchmarks", "--quick"], timeout=240)
    assert done.returncode == 0, done.stdout
    lines = dict(re.findall(r"^([\w-]+): (works; equal|skipped: .*)", done.stdout, re.MULTILINE))
    assert list(lines) == [claim.name for claim in CLAIMS], done.stdout
    absent = re.compile("nanoGPT")
    skipped = [line for line in lines.values() if line.startswith("skipped")]
    assert [line for line in skipped if not absent.search(line)] == []


def test_a_figure_says_which_side_is_better() -> None:
    measured = Measured(ours=[1.0, 2.0, 1.0], other=[2.0, 2.0, 3.0], equal="")
    assert summarize(FASTER, measured) == {"figure": 2.0, "least": 1.0, "most": 3.0}
    assert summarize(COST, measured)["figure"] == 0.5
    assert Target(least=2).is_met(2.0) and not Target(least=2).is_met(1.9)
    assert Target(most=1).is_met(1.0) and not Target(most=1).is_met(1.1)
    assert Target(least=0.9, most=1.1).words() == "≥ 0.9, ≤ 1.1"


def test_sides_take_turns_and_the_order_changes(tmp_path: Path) -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    ctx = Context(scratch=tmp_path, is_quick=False, rounds=2)
    measured = take_turns(ctx, lambda: side("ours"), lambda: side("other"), "equal")
    assert order == ["ours", "other", "other", "ours"]
    assert (measured.ours, measured.other) == ([1.0, 4.0], [2.0, 3.0])


def test_sides_that_differ_are_refused() -> None:
    with pytest.raises(AssertionError, match="the sides differ in tokens"):
        must_equal([1, 2], [1, 3], "tokens")
    with pytest.raises(AssertionError, match="the sides differ in losses"):
        must_be_near(1.0, 1.1, "losses", within=0.01)
    assert must_be_near(1.0, 1.0001, "losses", within=0.01) == "equal losses within 0.01"


def test_a_claim_that_fails_says_why_and_has_no_entry(capfd: pytest.CaptureFixture[str]) -> None:
    def differ(ctx: Context) -> Measured:
        must_equal(1, 2, "tokens")
        return Measured([1.0], [1.0], "")

    fails = a_claim(differ)
    works = a_claim(lambda ctx: Measured([1.0], [3.0], "equal tokens"), name="b")
    outcomes = running.Runner(is_quick=True, nanogpt=None).run_all([fails, works])
    assert outcomes[0].entry is None and "differ in tokens: 1 and 2" in outcomes[0].failed
    assert outcomes[1].entry and outcomes[1].entry["figure"] == 3.0
    assert "b: works; equal tokens" in capfd.readouterr().out


def test_a_claim_is_skipped_where_its_peer_is_not_installed() -> None:
    why = running.why_skipped(a_claim(peers=("no-such-package",)), None)
    assert why == "no-such-package is not installed; nearest: pip install -e '.[peers]'"
    assert "nearest: --nanogpt DIR" in running.why_skipped(a_claim(needs_nanogpt=True), None)


def test_results_of_a_date_are_kept_and_the_newest_counts(tmp_path: Path) -> None:
    (tmp_path / "2026-01-01.json").write_text('{"a": {"name": "a", "figure": 1}}')
    (tmp_path / "2026-01-01-notes.md").write_text("")
    results.write({"name": "b", "figure": 2}, tmp_path)
    results.write({"name": "a", "figure": 3}, tmp_path)
    (today,) = set(tmp_path.glob("*.json")) - {tmp_path / "2026-01-01.json"}
    assert sorted(json.loads(today.read_text())) == ["a", "b"]
    assert results.newest(tmp_path)["a"]["figure"] == 3


def test_result_files_name_no_host_and_no_folder() -> None:
    for path in results.FOLDER.glob("*.json"):
        text = path.read_text()
        assert not re.search(r'"[^"]*(?:/home/|/root/|/tmp/|/work/)', text), path.name


def test_a_missed_target_stays_in_the_table_and_says_so() -> None:
    entry = {
        "name": "a",
        "figure": 1.5,
        "least": 1.25,
        "most": 1.75,
        "unit": "x as fast",
        "equal": "equal tokens",
        "probe": {"copy GB/s": 9.0},
        "notes": {"clock": "cpu"},
        "threads": 1,
        "date": "2026-01-01 10:00 UTC",
        "commit": "abc",
    }
    claim = a_claim(tried="two things")
    assert table.short_table([claim], {"a": entry}).splitlines()[2] == (
        "| a against b | 1.50 x as fast (1.25 to 1.75) | ≥ 2, missed | `python -m benchmarks a` |"
    )
    assert "two things" in table.long_table([claim], {"a": entry})
    assert "not measured yet" in table.long_table([claim], {})


def test_names_are_checked() -> None:
    done = run([sys.executable, "-m", "benchmarks", "loader-windws"], cwd=ROOT)
    assert done.returncode != 0
    assert (
        "loader-windws is no claim" in done.stdout and "did you mean loader-windows?" in done.stdout
    )
