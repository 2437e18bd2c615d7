"""Damaged input to everything that reads what a stranger may have written.

The short form feeds a few hundred inputs to each target, the campaign goes on from there.
"""

import random
from pathlib import Path

import pytest

from tests.faults.fuzz import fuzz
from tests.faults.mutate import Gentle
from tests.faults.rows import OPEN, Record, linked
from tests.faults.targets import TARGETS

INPUTS = 250  # of each target
# What is not mended yet. Whoever mends it is told to take the line out.
NOT_MENDED: dict[str, str] = {}
for name in TARGETS:
    linked(
        f"fuzzed {name}",
        test=f"tests/faults/test_fuzz.py::test_it_is_read_or_refused[{name}]",
        fault=f"{TARGETS[name].__doc__} Parts are lost, replaced, nested or made huge.",
        must="it is read, or refused in one line, within 5 s and 4 GiB",
    )


@pytest.mark.parametrize("target", TARGETS)
def test_undamaged_input_is_read(target: str, tmp_path: Path) -> None:
    TARGETS[target](tmp_path).feed(Gentle(4))


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_read_or_refused(target: str, record_property: Record) -> None:
    report = fuzz(target, first=0, count=INPUTS)
    assert report.inputs == INPUTS
    assert report.slowest < 5
    if target in NOT_MENDED:
        record_property(OPEN, NOT_MENDED[target])
        assert report.findings, f"{target}: it is mended, so take it out of NOT_MENDED"
    else:
        assert report.findings == {}


def test_an_input_is_repeated_by_its_number() -> None:
    first = [random.Random(f"rows {number}").random() for number in range(5)]
    assert first == [random.Random(f"rows {number}").random() for number in range(5)]
    assert len(set(first)) == 5
