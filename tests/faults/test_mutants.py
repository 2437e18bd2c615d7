"""Mutants: faults of our own code, of which the harness must catch every one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fuzz import fuzz
from tests.faults.mutants import MUTANTS
from tests.faults.operations import STATE, STRAY, enumerate_faults
from tests.faults.rows import linked

# The work in which each is caught, as what, and which faults are tried.
CAUGHT = {
    "delete_in_place": ("save", STRAY, ["--only", "unlink /step-00000001", "--most", "3"]),
    "renamed_before_its_manifest": (
        "save",
        STATE,
        ["--only", "write /step-00000003/manifest.json", "--most", "2"],
    ),
    "left_overs_stay": ("save", STRAY, ["--every", "5", "--most", "9"]),
    "outcome_in_place": ("outcome", STATE, ["--every", "1", "--first", "50"]),
    "part_of_a_write": ("cache", STATE, ["--every", "1", "--first", "100"]),
    "prepare_starts_in_the_middle": (
        "prepare",
        STATE,
        ["--every", "9", "--first", "200", "--most", "20"],
    ),
    "a_step_is_left_out": ("run", STATE, ["--most", "1", "--first", "1600"]),
}
for name, mutant in MUTANTS.items():
    linked(
        f"mutant {name}",
        test=f"tests/faults/test_mutants.py::test_it_is_caught[{name}]",
        fault=str(mutant.__doc__),
        must="the harness finds it",
    )


def cases() -> Iterator[Any]:
    """Three kinds in the test command; the others take a minute and are a campaign."""
    for mutant in MUTANTS:
        is_quick = mutant in ("delete_in_place", "no_fsync", "names_lead_anywhere")
        yield pytest.param(mutant, marks=[] if is_quick else [pytest.mark.campaign])


@pytest.mark.slow
@pytest.mark.parametrize("mutant", list(cases()))
def test_it_is_caught(mutant: str, shim_library: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if mutant == "names_lead_anywhere":
        assert fuzz("checkpoint manifest", 0, 60, mutant).findings
        return
    if mutant == "no_fsync":  # the check of the undisturbed save finds it
        with pytest.raises(AssertionError, match="the enumeration itself failed"):
            enumerate_faults(shim_library, "save", "--mutant", mutant, "--most", "1")
        assert "assert not_synced(" in capfd.readouterr().err
        return
    scenario, kind, words = CAUGHT[mutant]
    result = enumerate_faults(shim_library, scenario, "--mutant", mutant, *words)
    assert result.wrong(kind)
