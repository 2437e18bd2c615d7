"""Kubernetes and SkyPilot: their containers' commands, as plain processes in the environment that
those systems make. Whether their files fit the published schemas is a test of tests/peers.
"""

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dist_lm.checkpoint.folder import step_folders
from dist_lm.errors import CODES
from tests.machines import until
from tests.procs import ROOT, Process, clean_env, free_port, train
from tests.test_launch import reach
from tests.test_slurm import outcome
from tests.test_train import assert_same_bits, assert_same_curve, running, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
WORTH_A_START = ("done", "preempted", "retryable")
STEPS = ["--run.steps", "400", "--run.save_every", "40", "--run.timeout_seconds", "15"]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "launch" / name).read_text()))


def container_of_jobset() -> tuple[dict[str, Any], dict[str, str]]:
    """The container of a pod, and what its environment has before the pod's number."""
    (jobset,) = documents("kubernetes/jobset.yaml")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert spec["parallelism"] == spec["completions"] == int(variables["NODES"])
    assert int(variables["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert variables["HOST"] == f"{jobset['metadata']['name']}-{job['name']}-0-0.dist-lm"
    return container, {**variables, "GPUS": "1", "HOST": "127.0.0.1"}


def container_of_trainjob() -> tuple[dict[str, Any], dict[str, str]]:
    runtime, job = documents("kubernetes/trainjob.yaml")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    trainer = job["spec"]["trainer"]
    variables = {
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port()),
    }
    return container, variables


CONTAINERS = {
    "JOB_COMPLETION_INDEX": container_of_jobset,
    "PET_NODE_RANK": container_of_trainjob,
}


def with_our_command(**variables: str) -> dict[str, str]:
    """An environment in which `dist-lm` is this checkout's."""
    path = f"{Path(sys.executable).parent}:{clean_env()['PATH']}"
    return clean_env(**{**variables, "PATH": path})


@pytest.mark.parametrize(
    "number_in",
    ["JOB_COMPLETION_INDEX", pytest.param("PET_NODE_RANK", marks=pytest.mark.campaign)],
)
def test_a_pod_that_is_lost_and_started_again(
    prepared: Path, tmp_path: Path, number_in: str
) -> None:
    if not shutil.which("dist-lm", path=str(Path(sys.executable).parent)):
        pytest.skip("needs dist_lm installed as a package")
    run = tmp_path / "run"
    container, variables = CONTAINERS[number_in]()
    words = ["--run.dir", str(run), *tiny(prepared, *STEPS)]

    def start_pod(number: int) -> Process:
        env = with_our_command(**variables, **{number_in: str(number)})
        with (tmp_path / f"pod-{number}").open("a") as out:
            return Process([*container["command"], *words], env=env, stdout=out, stderr=out)

    def said() -> str:
        return "".join((tmp_path / f"pod-{number}").read_text() for number in (0, 1))

    pods = [start_pod(number) for number in (0, 1)]
    try:
        reach(run, 60)
        kill_tree(pods[1])  # as when a machine is lost
        until(lambda: outcome(run).get("attempt") == 1, 60, "the report of the other pod")
        pods[1] = start_pod(1)
        for pod in pods:
            assert pod.wait(200) == 0, said()
    finally:
        for pod in pods:
            kill_tree(pod)
    assert outcome(run)["class"] == "done" and outcome(run)["attempt"] > 1, said()
    train(tmp_path / "whole", *tiny(prepared, *STEPS), world=2)
    assert_same_bits(step_folders(run)[-1], step_folders(tmp_path / "whole")[-1])
    assert_same_curve(run, tmp_path / "whole", 0.0)


def test_exit_codes_that_end_a_job_are_those_that_nobody_starts_again() -> None:
    jobs = [
        documents("kubernetes/jobset.yaml")[0]["spec"]["replicatedJobs"][0],
        documents("kubernetes/trainjob.yaml")[0]["spec"]["template"]["spec"]["replicatedJobs"][0],
    ]
    for job in jobs:
        fail, stopped, _ = job["template"]["spec"]["podFailurePolicy"]["rules"]
        hopeless = {code for kind, code in CODES.items() if kind not in WORTH_A_START}
        assert set(fail["onExitCodes"]["values"]) == hopeless
        assert stopped["onExitCodes"]["values"] == [CODES["preempted"]]


def test_a_spot_machine_that_is_lost_goes_on_from_the_bucket(
    prepared: Path, tmp_path: Path
) -> None:
    (task,) = documents("skypilot/spot.yaml")
    run, bucket = tmp_path / "disk" / "run", tmp_path / "bucket"
    recipe = "--config configs/gpt2-124m.yaml --data.input /bucket/shards"
    command = task["run"].replace("--run.dir runs/gpt2-124m # change", f"--run.dir {run}")
    assert recipe in command
    command = command.replace(recipe, " ".join(tiny(prepared, *STEPS)))
    command = command.replace("runs/gpt2-124m", str(run)).replace("/bucket/gpt2", f"{bucket}/gpt2")
    env = clean_env(PYTHON=sys.executable, SKYPILOT_NUM_GPUS_PER_NODE="1", MIRROR_SECONDS="1")
    mirrored = bucket / "gpt2-124m"
    with (tmp_path / "said").open("w") as out:
        first = Process(["bash", "-c", command], env=env, stdout=out, stderr=out)
        until(lambda: len(step_folders(mirrored)) > 1, 90, "a mirrored checkpoint")
        kill_tree(first)
        shutil.rmtree(run.parent)  # another machine, with an empty disk
        (mirrored / "step-00000399").mkdir()  # half a copy, without a manifest
        second = Process(["bash", "-c", command], env=env, stdout=out, stderr=out)
        assert second.wait(200) == 0, (tmp_path / "said").read_text()
    assert running(run) == []
    assert "resuming step-" in (tmp_path / "said").read_text()
    train(tmp_path / "whole", *tiny(prepared, *STEPS))
    assert_same_bits(step_folders(mirrored)[-1], step_folders(tmp_path / "whole")[-1])
    assert [path.name for path in step_folders(mirrored)] == [
        path.name for path in step_folders(run)
    ]
    assert not (mirrored / "run.lock").exists()


def kill_tree(started: Process) -> None:
    """Kill a process and all below it at once."""
    if started.poll() is not None:
        return
    process = psutil.Process(started.pid)
    for one in (*process.children(recursive=True), process):
        with suppress(psutil.Error):
            one.kill()
    started.wait(10)
