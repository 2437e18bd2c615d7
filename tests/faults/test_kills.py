"""Kills: a rank or the launcher, in every phase from the imports to the exit.

The short form runs a few schedules, the campaign hundreds.
"""

from pathlib import Path

import pytest

from tests.faults import kills
from tests.faults.kills import Schedule, run_schedule
from tests.faults.rows import LOST, NOTICED, Record, linked, row

# Without torchrun, whose ranks take long to start: see the rows that are linked below.
SCHEDULES = [
    Schedule(-1, "single", 1, victim="0", phase="evaluation", signal="SIGKILL", delay=0.0),
    Schedule(-2, "ddp", 2, victim="0", phase="save", signal="SIGKILL", delay=0.0),
    Schedule(-3, "ddp", 2, victim="1", phase="step", signal="SIGTERM", delay=0.0),
]


@pytest.mark.slow
@row(
    "a signal to a rank",
    fault="SIGKILL or SIGTERM to one rank in a step, a save or an evaluation",
    must="all ranks end by themselves; the same command ends in the same batches, losses and bits,"
    " and leaves no file behind",
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_same_command_ends_in_the_same_bits(
    schedule: Schedule, tmp_path: Path, record_property: Record
) -> None:
    figures = run_schedule(schedule, tmp_path)
    assert figures.wrong == ""
    assert figures.seconds_until_all_ended < kills.PATIENCE
    # Saves come every 2 steps, and one may still be written when the next is due.
    assert figures.steps_lost <= 4
    record_property(NOTICED, figures.seconds_until_all_ended)
    record_property(LOST, figures.steps_lost)


def test_a_schedule_is_a_function_of_its_number() -> None:
    first = [kills.schedule(number) for number in range(200)]
    assert first == [kills.schedule(number) for number in range(200)]
    assert {one.phase for one in first} == set(kills.PHASES)
    assert {(one.strategy, one.world) for one in first} == set(kills.SPREADS)
    assert "launcher" in {one.victim for one in first}


linked(
    "a killed launcher",
    test="tests/test_train.py::test_ranks_end_when_their_launcher_is_killed",
    fault="SIGKILL to torchrun or accelerate while its ranks import, and while they train",
    must="all ranks are gone within 5 s",
)
linked(
    "kills one after another",
    test="tests/test_train.py::test_killed_anywhere_ends_with_the_same_bits",
    fault="SIGKILL to all ranks at random steps",
    must="the same bits in the end",
)
linked(
    "a signal in any phase",
    test="tests/test_outcome.py::test_a_signal_in_any_phase_leads_to_one_agreed_stop",
    fault="SIGTERM, SIGUSR1 or Ctrl-C to one rank, from the imports on",
    must="all ranks stop at one step, with a checkpoint",
)
linked(
    "a stopped rank",
    test="tests/test_outcome.py::test_a_stopped_rank_is_named_and_ends_the_others_in_time",
    fault="SIGSTOP to one of several ranks",
    must="the others name it and end",
)
linked(
    "a launcher that is gone before the first line",
    test="tests/test_launcher.py::test_a_rank_whose_launcher_ended_before_it_began",
    fault="the launcher ends before the rank's first line runs",
    must="the rank ends at once",
)
