"""slurm/train.sh on a real Slurm of two nodes: the curve, preemption, time limits, signals,
failures, refusals.
"""

import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_lm.checkpoint.folder import step_folders
from tests.conftest import text_of
from tests.machines import Slurm, admin_env, kill, slurm, until
from tests.procs import ROOT, train
from tests.test_train import assert_same_bits, assert_same_curve, losses, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
# Never at its end by itself: what takes minutes on a busy machine takes seconds on a quiet one.
RANK = r"^\S*python\S* dist_lm/train.py"
LONG = ["--run.steps", "100000", "--run.save_every", "50", "--run.timeout_seconds", "15"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def long(prepared: Path, *more: str) -> list[str]:
    return tiny(prepared, *LONG, *more)


def outcome(run: Path) -> dict[str, Any]:
    file = run / "outcome.json"
    return json.loads(file.read_text()) if file.exists() else {}


def logs(run: Path) -> str:
    return "".join(file.read_text() for file in sorted((run / "logs").glob("*.log")))


def submit(
    cluster: Slurm, run: Path, *arguments: str, sbatch: tuple[str, ...] = ("--nodes=2",), **env: str
) -> str:
    return cluster.submit(*sbatch, "slurm/train.sh", "--run.dir", str(run), *arguments, **env)


def reach(cluster: Slurm, run: Path, step: int, job: str) -> None:
    def there() -> bool:
        assert cluster.field(job, "JobState") not in ("COMPLETED", "FAILED", "CANCELLED"), (
            cluster.said(job) + logs(run)
        )
        return (
            (run / "metrics.jsonl").exists()
            and bool(losses(run))
            and losses(run)[-1]["step"] >= step
        )

    until(there, 90, f"step {step} of {run}")


def assert_undisturbed(
    run: Path, prepared: Path, tmp_path: Path, *more: str, world: int = 2
) -> None:
    """The last checkpoint has the bits of a run that got there in one go, and the figures are one
    curve.
    """
    last = step_folders(run)[-1]
    train(
        tmp_path / "whole",
        *long(prepared, "--run.stop_after", str(int(last.name[5:])), *more),
        world=world,
    )
    assert_same_bits(last, step_folders(tmp_path / "whole")[-1])
    assert_same_curve(run, tmp_path / "whole", 0.0)


@pytest.mark.parametrize("launch", ["ddp", "zero2"])
def test_two_nodes_have_the_losses_of_one_process(
    cluster: Slurm, prepared: Path, tmp_path: Path, launch: str
) -> None:
    train(tmp_path / "one", *tiny(prepared))
    job = submit(
        cluster, tmp_path / "run", *tiny(prepared), LAUNCH=launch, DOCTOR=str(int(launch == "ddp"))
    )
    assert cluster.wait(job) == "COMPLETED", cluster.said(job) + logs(tmp_path / "run")
    assert (", 0 fail" in cluster.said(job)) == (launch == "ddp")  # the doctor's page
    assert f"{launch} on 2 processes of cpu" in logs(tmp_path / "run")
    assert_same_curve(tmp_path / "run", tmp_path / "one", 1e-5)
    assert outcome(tmp_path / "run") == {
        "class": "done",
        "step": 12,
        "reason": "",
        "attempt": 1,
        "failures": 0,
    }
    assert {file.name for file in (tmp_path / "run/logs").iterdir()} == {
        "node0-rank0.log",
        "node1-rank1.log",
    }


def test_one_run_preempted_signalled_and_killed_has_the_bits_of_an_undisturbed_one(
    cluster: Slurm, prepared: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run, *long(prepared))
    reach(cluster, run, 20, job)
    other = cluster.submit("--nodes=2", "--partition=high", "--wrap=true")  # of higher priority
    assert cluster.wait(other) == "COMPLETED"
    assert (outcome(run)["class"], outcome(run)["reason"]) == ("preempted", "SIGTERM")

    reach(cluster, run, outcome(run)["step"] + 10, job)
    cluster.ask("scancel", "--signal=USR1", job)
    until(lambda: outcome(run)["attempt"] == 2, 40, "the signal's outcome")
    assert (outcome(run)["class"], outcome(run)["failures"]) == ("preempted", 0)

    reach(cluster, run, outcome(run)["step"] + 10, job)
    (victim,) = cluster.net.nodes[1].pids(RANK)
    began = time.monotonic()
    kill(victim)
    until(lambda: outcome(run)["attempt"] == 3, 40, "the report on a killed rank")
    assert time.monotonic() - began < 30
    assert (
        outcome(run)["class"] == "retryable"
        and "rank 1 on node1 is missing" in outcome(run)["reason"]
    )

    reach(cluster, run, losses(run)[-1]["step"] + 1, job)
    cluster.ask("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    until(lambda: outcome(run)["attempt"] == 4, 40, "the last outcome")
    assert outcome(run)["class"] == "preempted" and int(cluster.field(job, "Restarts")) == 3
    until(
        lambda: cluster.field(job, "JobState") == "CANCELLED" and cluster.idle(),
        60,
        "what was cancelled stays so",
    )
    assert_undisturbed(run, prepared, tmp_path)
    assert [host.pids("dist_lm") for host in cluster.net.nodes] == [[], []]


def test_a_job_ends_in_time_by_its_own_clock_and_is_requeued(
    cluster: Slurm, prepared: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sbatch = (
        "--nodes=2",
        "--time=1",
        "--signal=CONT@1",
    )  # instead of USR1, which Slurm may send up to a minute early
    job = submit(cluster, run, *long(prepared), sbatch=sbatch, STOP_BEFORE="15")
    reach(cluster, run, 1, job)
    until(lambda: outcome(run), 75, "the end of the job's time")
    assert (outcome(run)["class"], outcome(run)["reason"]) == (
        "preempted",
        "the time of the job ends",
    )
    until(lambda: cluster.field(job, "Restarts") == "1", 30, "the requeueing")
    cluster.ask("scancel", job)
    cluster.wait(job)


def test_what_cannot_work_is_refused_at_once_and_not_requeued(
    cluster: Slurm, prepared: Path, tmp_path: Path
) -> None:
    began = time.monotonic()
    job = submit(cluster, tmp_path / "run", "--optim.rate", "1e-3")
    assert cluster.wait(job) == "FAILED" and time.monotonic() - began < 30
    assert "error: unknown flag --optim.rate; did you mean " in cluster.said(job)
    job = submit(cluster, tmp_path / "run", *tiny(prepared, "--data.seq_len", "1000000"))
    assert cluster.wait(job) == "FAILED" and cluster.field(job, "Restarts") == "0"
    assert "data at step 0, attempt 1: data.seq_len=1000000 needs 1000001 tokens" in cluster.said(
        job
    )


def test_the_same_failure_three_times_without_a_step_ends_the_requeueing(
    cluster: Slurm, prepared: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "outcome.json").write_text(
        json.dumps(
            {"class": "retryable", "step": 0, "reason": "twice before", "attempt": 2, "failures": 2}
        )
    )
    job = submit(cluster, run, *long(prepared, "--run.save_every", "0"))
    reach(cluster, run, 2, job)
    kill(cluster.net.nodes[0].pids(RANK)[0])
    assert cluster.wait(job) == "FAILED"
    assert "failed 3 times without a new step; not started again" in cluster.said(job)
    assert "rank 0 on node0 is missing" in outcome(run)["reason"]


def test_prepare_as_an_array_and_generate(cluster: Slurm, tmp_path: Path) -> None:
    for n in range(5):
        (tmp_path / f"{n}.txt").write_text(text_of(20, seed=n))
    inputs = ("--input", f"{tmp_path}/*.txt", "--output", f"{tmp_path}/shards")
    job = cluster.submit("--array=0-1", "slurm/prepare.sh", *inputs, "--tokenizer", "byte")
    until(lambda: sorted(tmp_path.glob("shards/part-*/dataset.json"))[1:], 60, "both parts")
    listed = [
        json.loads((tmp_path / f"shards/part-0000{n}/dataset.json").read_text())["sources"]
        for n in (0, 1)
    ]
    assert [[source["name"][9:] for source in part] for part in listed] == [
        ["0.txt", "2.txt", "4.txt"],
        ["1.txt", "3.txt"],
    ]
    cluster.wait(job)
    train(tmp_path / "run", *tiny(tmp_path / "shards/part-00000", "--run.steps", "1"))
    job = cluster.submit(
        "slurm/generate.sh",
        "--ckpt",
        f"{tmp_path}/run",
        "--prompt",
        "the cat",
        "--max_new_tokens",
        "3",
    )
    assert cluster.wait(job) == "COMPLETED" and "the cat" in cluster.said(job)


# --- campaigns


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_twenty_preemptions(cluster: Slurm, prepared: Path, tmp_path: Path) -> None:
    """By a job of higher priority, or by USR1; half of them at a random time after the start, so
    also during start-up.
    """
    run, rng = tmp_path / "run", random.Random(20)
    job = submit(cluster, run, *long(prepared, "--model.dropout", "0.1", "--run.eval_every", "50"))
    until(lambda: ": attempt " in cluster.said(job), 60, "the first start")
    began, found = time.monotonic(), []
    for number in range(1, 21):
        if number % 4 < 2:
            reach(
                cluster,
                run,
                (losses(run)[-1]["step"] if (run / "metrics.jsonl").exists() else 0)
                + rng.randint(1, 30),
                job,
            )
        else:
            time.sleep(rng.uniform(0.5, 12))
        if number % 2:
            assert (
                cluster.wait(cluster.submit("--nodes=2", "--partition=high", "--wrap=true"))
                == "COMPLETED"
            )
        else:
            cluster.ask("scancel", "--signal=USR1", job)
        until(lambda n=number: cluster.said(job).count(": attempt ") > n, 90, f"start {number + 1}")  # type: ignore[misc]
        found.append(outcome(run)["class"])
        print(f"{number:2d} {time.monotonic() - began:5.0f} s  {outcome(run)}", flush=True)
    reach(cluster, run, losses(run)[-1]["step"] + 5, job)
    cluster.ask("scancel", job)
    cluster.wait(job)
    until(lambda: outcome(run)["step"] == losses(run)[-1]["step"], 60, "the last ending")
    assert set(found) <= {"preempted", "retryable"}
    assert_undisturbed(run, prepared, tmp_path, "--model.dropout", "0.1", "--run.eval_every", "50")


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_a_node_is_lost(cluster: Slurm, prepared: Path, tmp_path: Path) -> None:
    """slurmd, its steps and all else on a node are killed: with the node back, the same bits;
    without, the same curve.
    """
    run, node = tmp_path / "run", cluster.net.nodes[1]
    job = submit(cluster, run, *long(prepared), sbatch=("--nodes=1-2",))
    reach(cluster, run, 60, job)
    began = time.monotonic()
    cluster.lose(node)
    until(lambda: outcome(run), 60, "the report")
    print(f"\nreport after {time.monotonic() - began:.0f} s: {outcome(run)}")
    assert "rank 1 on node1 is missing" in outcome(run)["reason"]
    cluster.start_node(node)
    reach(cluster, run, losses(run)[-1]["step"] + 10, job)
    print(f"training on two nodes again after {time.monotonic() - began:.0f} s")
    cluster.ask("scancel", "--signal=USR1", job)
    until(
        lambda: outcome(run)["attempt"] == 2 and outcome(run)["class"] == "preempted",
        60,
        "the stop",
    )
    shutil.copytree(run, tmp_path / "copy")  # the job goes on
    reach(cluster, run, losses(run)[-1]["step"] + 1, job)
    began = time.monotonic()
    cluster.lose(node)  # for good
    until(lambda: "1 processes on node0" in cluster.said(job), 240, "one node goes on")
    enough = losses(run)[-1]["step"] + 10
    reach(cluster, run, enough, job)
    print(f"training on one node after {time.monotonic() - began:.0f} s")
    cluster.ask("scancel", job)
    cluster.wait(job)
    assert_undisturbed(tmp_path / "copy", prepared, tmp_path)
    train(tmp_path / "one", *long(prepared, "--run.stop_after", str(enough)))
    run_losses = [step["loss"] for step in losses(run)[:enough]]
    assert run_losses == pytest.approx(
        [step["loss"] for step in losses(tmp_path / "one")], rel=1e-5
    )
    cluster.start_node(node)
    until(cluster.idle, 60, "the node is back")


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_two_nodes_are_as_fast_as_one(cluster: Slurm, prepared: Path, tmp_path: Path) -> None:
    """Tokens a second of `sbatch slurm/train.sh` on two nodes, against two processes on one.

    It prints the ratio of each round. Each node is a network namespace with one core.
    """
    flags = ["--data.input", str(prepared), "--run.steps", "30", "--run.eval_every", "0"]
    flags += ["--run.save_every", "0", "--run.trackers"]
    ratios = []
    for number in range(3):
        one, two = tmp_path / f"one{number}", tmp_path / f"two{number}"
        command = [f"{ROOT}/launch/torchrun.sh", "--nproc", "2", "--run.dir", str(one), *flags]
        env = admin_env(PYTHON=sys.executable)
        subprocess.run(command, check=True, env=env, capture_output=True, timeout=300)
        job = cluster.submit("--nodes=2", "slurm/train.sh", "--run.dir", str(two), *flags)
        assert cluster.wait(job, 300) == "COMPLETED", cluster.said(job)
        rates = [tokens_per_second(folder) for folder in (one, two)]
        ratios.append(rates[1] / rates[0])
        print(f"one node {rates[0]:,.0f} tokens/s, two nodes {rates[1]:,.0f}: {ratios[-1]:.3f}")
    assert statistics.median(ratios) > 0.9


def tokens_per_second(run: Path) -> float:
    steps = [line for line in losses(run) if "tokens_per_second" in line]
    return statistics.median(step["tokens_per_second"] for step in steps[5:])
