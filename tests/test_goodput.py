"""Where the time of a run and its restarts went: by lines written by hand, and of a run that is
killed.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from dist_lm.goodput import PARTS, goodput
from dist_lm.report import main
from tests.procs import start_ranks, train
from tests.test_train import tiny, wait_for_step


def start(at: float, step: int, attempt: int, tokens: int) -> dict[str, Any]:
    """A process that began at `at` and trains 5 s later."""
    return {
        "event": "start",
        "began": at,
        "time": at + 5,
        "step": step,
        "attempt": attempt,
        "tokens": tokens,
    }


def step(number: int) -> dict[str, Any]:
    """A step of 10 s, of which one was spent waiting for data."""
    return {
        "step": number,
        "loss": 1.0,
        "tokens": 1000 * number,
        "tokens_per_second": 100.0,
        "data_wait": 0.1,
    }


def stop(at: float, attempt: int, kind: str, reason: str = "") -> dict[str, Any]:
    return {"event": "stop", "time": at, "attempt": attempt, "class": kind, "reason": reason}


LINES = [
    start(100, step=0, attempt=1, tokens=0),  # trains from 105
    step(1),  # to 115
    step(2),
    {"event": "evaluation", "step": 2, "seconds": 4.0},  # to 129
    {"event": "save", "step": 2, "seconds": 1.0},  # to 130
    step(3),  # to 140, and the process is killed
    start(170, step=2, attempt=1, tokens=2000),  # trains from 175
    step(3),
    {"event": "save", "step": 3, "seconds": 2.0},
    stop(190, 1, "preempted", "SIGTERM"),  # 3 s after its last line
    stop(200, 2, "retryable", "the others are gone"),  # before it trained
    start(210, step=3, attempt=3, tokens=3000),
    step(4),
    stop(225, 3, "done"),
]


def test_every_second_is_in_one_part() -> None:
    told = goodput(LINES)
    assert told is not None
    assert told["seconds"] == {
        "steps": 4 * 9.0,
        "data": 4 * 1.0,
        "evaluation": 4.0,
        "saves": 3.0,
        "lost work": 10.0,  # step 3 of the first start, with its data
        "start-up": 15.0,
        "down": 30.0 + 20.0,
        "other": 3.0,
    }
    assert sum(told["seconds"].values()) == 225 - 100
    assert told["starts"] == 4
    assert told["stops"] == {
        "no rank said why": 1,
        "preempted: SIGTERM": 1,
        "done": 1,
        "retryable: the others are gone": 1,
    }


def test_work_is_lost_once_however_often_the_run_goes_back() -> None:
    """The second restart goes back behind the first one."""
    lines = [start(0, step=0, attempt=1, tokens=0), step(1), step(2), step(3)]
    lines += [start(50, step=2, attempt=2, tokens=2000), step(3)]
    lines += [start(80, step=1, attempt=3, tokens=1000), step(2)]
    told = goodput(lines)
    assert told is not None
    assert told["seconds"]["lost work"] == 30.0  # step 2, and step 3 twice
    assert told["seconds"]["steps"] == 18.0


def test_what_a_run_goes_back_from_is_lost() -> None:
    spike = {"event": "spike", "step": 3, "back": 1, "tokens": 1000, "reason": "up", "done": "back"}
    warning = {"event": "spike", "step": 2, "reason": "high", "done": "the run goes on"}
    lines = [start(0, step=0, attempt=1, tokens=0), step(1), step(2), spike, step(2), warning]
    told = goodput(lines)
    assert told is not None
    assert told["seconds"]["lost work"] == 10.0 and told["seconds"]["steps"] == 18.0
    assert told["starts"] == 1
    assert told["spikes"] == ["at step 3: up; back", "at step 2: high; the run goes on"]


def test_a_run_of_an_older_version_has_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1)) + "\n")
    main([str(tmp_path), "--json"])
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["goodput"] is None


@pytest.mark.slow
def test_a_run_that_is_killed_and_stopped(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    arguments = tiny(prepared, "--run.steps", "100000", "--run.save_every", "10")
    began = time.time()
    (rank,) = start_ranks(1, "dist_lm/train.py", "--run.dir", str(run), *arguments)
    wait_for_step(run, 15, [rank])
    rank.kill()
    rank.communicate()
    (rank,) = start_ranks(1, "dist_lm/train.py", "--run.dir", str(run), *arguments)
    wait_for_step(run, 40, [rank])
    rank.terminate()
    rank.communicate()
    train(run, *arguments, "--run.stop_after", "60")
    took = time.time() - began

    main([str(run), "--output", str(tmp_path / "x.png"), "--json"])
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    told = found["goodput"]
    assert told["starts"] == 3
    assert told["stops"] == {"no rank said why": 1, "preempted: SIGTERM": 1, "done": 1}
    seconds = told["seconds"]
    assert 0 < sum(seconds.values()) < took
    for part in ("steps", "saves", "lost work", "start-up", "down"):
        assert seconds[part] > 0, (part, seconds)
    assert list(seconds) == list(PARTS)
    main([str(run), "--output", str(tmp_path / "x.png")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[3].split()[:3] == ["run", "starts", "time"]
    assert "run stopped 1 x preempted: SIGTERM" in printed
