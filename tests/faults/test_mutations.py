"""A damaged checkpoint: each kind of file, damaged in each way, read by each command.

The short form tries a sample, the campaign all cases.
"""

from collections.abc import Iterator

import pytest

from tests.faults import mutations
from tests.faults.mutations import COMMANDS, Bench, Case, all_cases, open_bench
from tests.faults.rows import linked, row

SAMPLE = 29  # every n-th case of a command is tried
for name in COMMANDS:
    linked(
        f"{name} on a damaged checkpoint",
        test=f"tests/faults/test_mutations.py::test_it_is_passed_over_or_refused[{name}]",
        fault="a file of the newest of two checkpoints is cut, flipped, missing, a link, a pipe,"
        " nested deeply, of another type, or any of this with a right signature",
        must="the older one is taken or one line refuses; the exit code is not that of a failed"
        " machine; a valid checkpoint is left",
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with open_bench(tmp_path_factory.mktemp("bench") / "bench") as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_passed_over_or_refused(command: str, bench: Bench) -> None:
    cases = [case for case in all_cases() if case.command == command][::SAMPLE]
    wrong = {str(case): bench.attempt(case) for case in cases}
    assert {case: what for case, what in wrong.items() if what} == {}
    assert len(cases) >= 5


@row(
    "a pipe in a run",
    fault="state.json of a checkpoint is a pipe, and show reads the run",
    must="it is passed over or refused; nothing waits for a writer",
)
def test_show_does_not_wait_for_a_pipe(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutations, "LIMIT_SECONDS", 10)
    assert bench.attempt(Case("show", "state.json", "a pipe")) == ""
