"""slurm/train.sh on a real Slurm of two nodes: the curve, preemption, time limits, signals, failures, refusals."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_lm.checkpoint import step_folders
from tests.machines import Slurm, kill, slurm, until
from tests.procs import train
from tests.test_train import assert_same_bits, assert_same_curve, losses, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
# Enough steps for something to happen in the middle; with a second process a step takes some milliseconds.
LONG = ["--run.steps", "400", "--run.save_every", "100", "--run.timeout_seconds", "15", "--optim.lr", "1e-3"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def long(prepared: Path, *more: str) -> list[str]:
    return tiny(prepared, *LONG, *more)


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, undisturbed, on as many processes."""
    run = tmp_path_factory.mktemp("whole")
    train(run, *long(prepared), world=2)
    return run


def outcome(run: Path) -> dict[str, Any]:
    file = run / "outcome.json"
    return json.loads(file.read_text()) if file.exists() else {}


def logs(run: Path) -> str:
    return "".join(file.read_text() for file in sorted((run / "logs").glob("*.log")))


def submit(cluster: Slurm, run: Path, *arguments: str, sbatch: tuple[str, ...] = ("--nodes=2",), **env: str) -> str:
    return cluster.submit(*sbatch, "slurm/train.sh", "--run.dir", str(run), *arguments, **env)


def reach(cluster: Slurm, run: Path, step: int, job: str) -> None:
    def there() -> bool:
        assert cluster.field(job, "JobState") in ("PENDING", "RUNNING"), cluster.said(job) + logs(run)
        return (run / "metrics.jsonl").exists() and bool(losses(run)) and losses(run)[-1]["step"] >= step

    until(there, 90, f"step {step} of {run}")


def assert_same_end(run: Path, other: Path) -> None:
    assert_same_bits(step_folders(run)[-1], step_folders(other)[-1])


@pytest.mark.parametrize("launch", ["ddp", "zero2"])
def test_two_nodes_have_the_losses_of_one_process(
    cluster: Slurm, prepared: Path, tmp_path: Path, launch: str
) -> None:
    train(tmp_path / "one", *tiny(prepared))
    job = submit(cluster, tmp_path / "run", *tiny(prepared), LAUNCH=launch)
    assert cluster.wait(job) == "COMPLETED", cluster.said(job) + logs(tmp_path / "run")
    assert f"{launch} on 2 process(es) of cpu" in logs(tmp_path / "run")
    assert_same_curve(tmp_path / "run", tmp_path / "one", 1e-5)
    assert outcome(tmp_path / "run") == {"class": "done", "step": 12, "reason": "", "attempt": 1, "failures": 0}
    assert {file.name for file in (tmp_path / "run/logs").iterdir()} == {"node0-rank0.log", "node1-rank1.log"}


def running_again(cluster: Slurm, job: str, attempt: int) -> bool:
    return cluster.field(job, "JobState") == "RUNNING" and f"attempt {attempt}," in cluster.said(job)


def test_one_run_preempted_signalled_and_killed_ends_with_the_same_bits(
    cluster: Slurm, prepared: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run, *long(prepared))
    reach(cluster, run, 50, job)
    other = cluster.submit("--nodes=2", "--partition=high", "--wrap=true")  # of higher priority
    cluster.wait(other)
    assert cluster.field(other, "JobState") == "COMPLETED"
    assert (outcome(run)["class"], outcome(run)["reason"]) == ("preempted", "SIGTERM")
    saved = outcome(run)["step"]
    assert saved >= 50

    reach(cluster, run, saved + 50, job)
    cluster.ask("scancel", "--signal=USR1", job)
    until(lambda: outcome(run)["attempt"] == 2, 40, "the signal's outcome")
    assert (outcome(run)["class"], outcome(run)["failures"]) == ("preempted", 0)
    saved = outcome(run)["step"]

    reach(cluster, run, saved + 20, job)
    (victim,) = cluster.net.nodes[1].pids(r"^\S*python\S* dist_lm/train.py")
    began = time.monotonic()
    kill(victim)
    until(lambda: outcome(run)["attempt"] == 3, 40, "the report on a killed rank")
    assert time.monotonic() - began < 30
    assert outcome(run)["class"] == "retryable" and "rank 1 on node1 is missing" in outcome(run)["reason"]

    assert cluster.wait(job) == "COMPLETED", cluster.said(job) + logs(run)
    assert outcome(run)["attempt"] == 4 and int(cluster.field(job, "Restarts")) == 3
    assert_same_end(run, whole)
    assert_same_curve(run, whole, 0.0)
    assert len(step_folders(run)) <= 3
    assert [host.pids("dist_lm") for host in cluster.net.nodes] == [[], []]
