"""The watchdog on real processes: a rank that hangs and one that is slow are named, and a long
evaluation or save is neither.
"""

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist_lm import loop
from dist_lm.checkpoint.save import Saver
from dist_lm.errors import run_entry
from dist_lm.outcome import read
from dist_lm.runtime import watchdog
from dist_lm.train import main
from tests.procs import finish, start_ranks
from tests.test_train import tiny


def train_slowly() -> None:
    """As a rank: train.py, where rank 1 sleeps at some steps, in a phase or after a save."""
    phase, steps, seconds, beat = json.loads(sys.argv.pop(1))
    enter = loop.Runtime.enter
    begin = Saver.begin

    def linger(self: Saver, step: int, *arguments: Any) -> None:
        begin(self, step, *arguments)
        if phase == "save" and self.channel.rank == 1 and step in steps:
            time.sleep(seconds)

    def sleep(self: Any, step: int, entered: str) -> None:
        enter(self, step, entered)
        if self.rank == 1 and entered == phase != "save" and step in steps:
            time.sleep(seconds)

    loop.Runtime.enter = sleep  # type: ignore[method-assign]
    Saver.begin = linger  # type: ignore[method-assign]
    watchdog._SHORTEST_SLOWNESS = 0.3
    watchdog._LONGEST_BEAT = beat
    run_entry(main, prints_result=False)


def slowly(
    run: Path, phase: str, steps: list[int], seconds: float, *arguments: str, beat: float = 1.0
) -> tuple[list[int | None], str]:
    code = "from tests.runtime import test_watchdog; test_watchdog.train_slowly()"
    what = json.dumps([phase, steps, seconds, beat])
    ranks = start_ranks(2, "-c", code, what, "--run.dir", str(run), *arguments)
    _, output = finish(ranks, 200)
    return [rank.returncode for rank in ranks], output


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_the_stacks_of_all(prepared: Path, tmp_path: Path) -> None:
    arguments = tiny(prepared, "--run.timeout_seconds", "10")
    codes, output = slowly(tmp_path / "run", "forward", [4], 1000, *arguments)
    host = socket.gethostname()
    named = f"rank 1 on {host} lives but has not moved for 8 s (step 5, forward)"
    assert codes == [70, 70], output
    assert read(tmp_path / "run")["reason"] == named
    for rank in (0, 1):
        assert f"stacks of rank {rank} on {host}:" in output
    assert "in sleep\n" in output and "in add_gradients\n" in output, output


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["evaluation", "save"])
def test_a_long_evaluation_or_save_is_no_hang(prepared: Path, tmp_path: Path, phase: str) -> None:
    """It takes longer than a hang may, and less than the timeout."""
    every = {"evaluation": "--run.eval_every", "save": "--run.save_every"}[phase]
    arguments = tiny(prepared, "--run.timeout_seconds", "10", every, "6", "--run.steps", "8")
    codes, output = slowly(tmp_path / "run", phase, [6], 9, *arguments)
    assert codes == [0, 0], output
    assert "stacks of" not in output and "is slow" not in output


@pytest.mark.slow
def test_a_slow_rank_is_named_once(prepared: Path, tmp_path: Path) -> None:
    steps = list(range(1, 11))
    arguments = tiny(prepared, "--run.steps", "11")
    codes, output = slowly(tmp_path / "run", "forward", steps, 0.5, *arguments, beat=0.3)
    assert codes == [0, 0], output
    slow = f"warning: rank 1 on {socket.gethostname()} is slow: 0."
    assert output.count(slow) == 1 and output.count("is slow") == 1, output
