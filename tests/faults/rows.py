"""The rows of docs/faults.md: what is done to the program, and what must happen.

A test becomes a row by the decorator, and stays an ordinary test:

    @row("a cut manifest", fault="the newest manifest.json is cut", must="the step before is taken")
    def test_a_cut_manifest(...): ...

A test that lies elsewhere becomes one by an entry of LINKED. A row holds if all cases of its test
pass. A fault that is still open is marked `xfail(strict=True)`, with the reason in plain words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., object])

# Names of properties that a test records for the table: record_property(NOTICED, 3.5).
NOTICED = "seconds until all had ended"
LOST = "steps lost"
OPEN = "what is not mended yet"
Record = Callable[[str, object], None]  # pytest's fixture record_property


@dataclass(frozen=True)
class Row:
    name: str
    fault: str
    must: str
    test: str  # as pytest names it: tests/faults/test_x.py::test_y


ROWS: dict[str, Row] = {}


def row(name: str, fault: str, must: str) -> Callable[[Test], Test]:
    """Make the test below a row of the table."""

    def add(test: Test) -> Test:
        file = test.__module__.replace(".", "/") + ".py"
        _add(Row(name, fault, must, f"{file}::{test.__name__}"))
        return test

    return add


def linked(name: str, test: str, fault: str, must: str) -> None:
    """Make a test that lies elsewhere a row of the table."""
    _add(Row(name, fault, must, test))


def _add(new: Row) -> None:
    assert ROWS.get(new.name, new) == new, f"two rows have the name {new.name!r}"
    ROWS[new.name] = new
