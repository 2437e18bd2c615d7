"""launch/torchrun.sh and accelerate.sh: what they find out, signals, restarts; two hosts and the
link between them.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_lm.checkpoint.folder import step_folders
from tests.machines import Host, Network, kill, network, until
from tests.procs import ROOT, Process, clean_env, free_port, run, train
from tests.test_slurm import assert_undisturbed, long, outcome
from tests.test_train import assert_same_curve, losses, running, tiny

SCRIPTS = sorted(
    [*(ROOT / "launch").glob("*.sh"), *(ROOT / "slurm").glob("*.sh"), ROOT / ".ci/run"]
)


def launch(script: str, *arguments: str, code: int = 0, **env: str) -> str:
    done = run([f"launch/{script}.sh", *arguments], env=clean_env(PYTHON=sys.executable, **env))
    assert done.returncode == code, f"exit code {done.returncode}, not {code}:\n{done.stdout}"
    return done.stdout


def test_scripts_are_clean() -> None:
    for script in SCRIPTS:
        assert subprocess.run(["bash", "-n", script]).returncode == 0
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck: apt-get install -y shellcheck")
    done = subprocess.run(
        ["shellcheck", "-x", *SCRIPTS], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert done.returncode == 0, done.stdout


def test_dry_run_prints_the_command_and_stops(tmp_path: Path) -> None:
    run = ["--run.dir", str(tmp_path / "run")]
    said = launch(
        "torchrun",
        "--nproc",
        "3",
        "--port=15999",
        "--launch",
        "zero2",
        "--dry-run",
        *run,
        CUDA_VISIBLE_DEVICES="",
    )
    assert (
        "--nnodes 1 --nproc-per-node 3 --node-rank 0 --master-addr 127.0.0.1 --master-port 15999"
        f" {ROOT}/dist_lm/train.py --launch zero2 --run.dir {tmp_path}/run\n" in said
    )
    # One process for each of its GPUs.
    said = launch("torchrun", "--dry-run", *run, CUDA_VISIBLE_DEVICES="4,7")
    assert "--nproc-per-node 2 " in said
    several = ("--nnodes", "2", "--host", "localhost", "--dry-run", *run)
    said = launch("accelerate", "--node-rank", "1", "--nproc", "2", "--interface", "lo", *several)
    assert (
        f"--config_file {ROOT}/launch/ddp.yaml --num_processes 4 --num_machines 2 --machine_rank 1"
        " --main_process_ip localhost --main_process_port 29400" in said
    )
    elastic = ("--nnodes", "1:2", "--host", "localhost", "--dry-run", *run)
    assert "--rdzv-backend c10d --rdzv-endpoint localhost:29400" in launch("torchrun", *elastic)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("--nproc two", "torchrun.sh: error: --nproc two must be a whole number"),
        ("--nnodes 2", "--nnodes 2 needs --host, the first node's name or address"),
        ("--nnodes 2 --host localhost", "--nnodes 2 needs --node-rank, from 0 on the first node"),
        (
            "--nnodes 2 --node-rank 0 --host no.such.host",
            "--host no.such.host is not a name that leads to an address",
        ),
        ("--launch zero4", "--launch zero4 must be one of: ddp single zero1"),
        ("--interface eth77", "--interface eth77 is not there; nearest: "),
        ("--data.lr 1e-3", "error: unknown flag --data.lr; did you mean --optim.lr?"),
        ("--nprocs 2", "unknown flag --nprocs; did you mean --nproc of launch/torchrun.sh?"),
        ("--batch-size 8", "unknown flag --batch_size; did you mean --data.global_batch?"),
    ],
)
def test_refusals_before_anything_starts(arguments: str, answer: str, tmp_path: Path) -> None:
    began = time.monotonic()
    said = launch("torchrun", *arguments.split(), "--run.dir", str(tmp_path / "run"), code=2)
    # One line of ours, and none of a launcher: at most a warning about the network comes first.
    *before, line = said.splitlines()
    assert answer in line and len(before) <= ("--nnodes" in arguments), said
    assert time.monotonic() - began < 30
    assert not (tmp_path / "run").exists()


def test_the_launchers_words_are_held_and_no_others(tmp_path: Path) -> None:
    of_a_rank = """Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "<frozen runpy>", line 88, in _run_code
  File "/x/dist_lm/train.py", line 41, in <module>
    run_entry(main)
ValueError: of a rank"""
    of_torchrun = """W1127 17:00:00.0 1 torch/distributed/elastic/multiprocessing/api.py:900] Send
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "<frozen runpy>", line 88, in _run_code
  File "/x/torch/distributed/run.py", line 900, in <module>
    main()
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
 <no hostname> exitcode  : 75 (pid: 1)"""
    common = (ROOT / "launch/common.sh").read_text()
    function = common[common.index("hold_launcher() {") : common.index("run_command() {")]
    done = subprocess.run(
        ["bash", "-c", f"nnodes=1\n{function}hold_launcher held"],
        input=f"warning: x\n{of_a_rank}\nlater\n{of_torchrun}",
        text=True,
        capture_output=True,
        cwd=tmp_path,
    )
    assert done.stderr == f"warning: x\n{of_a_rank}\nlater\n"
    assert (tmp_path / "held").read_text() == f"{of_torchrun}\n"


def slurm_script(name: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in clean_env(**env).items() if not name.startswith("SLURM_")}
    command = ["bash", f"slurm/{name}.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=own | env, text=True, capture_output=True)


@pytest.mark.parametrize("name", ["train", "prepare", "generate"])
def test_a_slurm_script_outside_of_a_job_says_how_to_submit_it(name: str) -> None:
    done = slurm_script(name, "--config", "configs/debug.yaml")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        f"slurm/{name}.sh: error: this is no job; submit it with sbatch: sbatch "
    )
    assert len(done.stderr.splitlines()) == 1


def test_the_srun_line_of_a_pretended_allocation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--config", "configs/debug.yaml", "--run.dir", str(run), "--dry-run")
    done = slurm_script("train", *words, PYTHON=sys.executable)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --overcommit ")
    assert done.stdout.endswith(
        f" --open-mode=append slurm/rank.sh {sys.executable} dist_lm/train.py"
        f" --config configs/debug.yaml --run.dir {run} --launch ddp\n"
    )
    done = slurm_script("train", *words, PYTHON=sys.executable, SLURM_JOB_NUM_NODES="3")
    assert done.stdout.startswith("srun --nodes=3 --ntasks=24 ")
    assert not run.exists()


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = launch("torchrun", "--port", port, "--run.dir", str(tmp_path / "run"), code=2)
    refusal = f"--port {port}: port {port} is in use on this host; choose another"
    assert said == f"torchrun.sh: error: {refusal}\n"


@pytest.mark.slow
def test_a_refusal_of_the_data_is_told_without_the_launchers_words(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    run = tmp_path / "run"
    said = launch("torchrun", "--run.dir", str(run), "--data.input", str(empty), code=65)
    assert "no document with text in 1 file" in said and outcome(run)["class"] == "data"
    assert "Traceback" not in said and "FAILED" not in said, said


@pytest.mark.slow
@pytest.mark.parametrize("script", ["torchrun", "accelerate"])
@pytest.mark.long
def test_a_killed_rank_leads_to_a_restart_and_a_signal_to_a_checkpoint(
    prepared: Path, tmp_path: Path, script: str
) -> None:
    run = tmp_path / "run"
    command = [f"launch/{script}.sh", "--nproc", "2", "--run.dir", str(run), *long(prepared)]
    with open(tmp_path / "out", "w") as out:
        launcher = Process(command, env=clean_env(PYTHON=sys.executable), stdout=out, stderr=out)
    try:
        reach(run, 20)
        if script == "torchrun":
            commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in running(run)}
            kill(
                next(
                    pid
                    for pid, words in commands.items()
                    if "train.py" in words and "distributed.run" not in words
                )
            )
            until(lambda: outcome(run).get("attempt") == 1, 30, "the report")
            assert (
                "is missing; RuntimeError" in outcome(run)["reason"]
                and outcome(run)["class"] == "retryable"
            )
            restarted = losses(run)[-1]["step"]
            reach(run, restarted + 5)
        launcher.send_signal(signal.SIGUSR1 if script == "torchrun" else signal.SIGINT)
        said = (tmp_path / "out").read_text
        assert launcher.wait(60) == 75, said()
        attempts = 2 if script == "torchrun" else 1
        assert (outcome(run)["class"], outcome(run)["attempt"]) == ("preempted", attempts), said()
        assert (
            int(step_folders(run)[-1].name[5:]) == losses(run)[-1]["step"] == outcome(run)["step"]
        )
        # The launcher's traceback comes after a failure, and not after a stop that has saved.
        assert ("ChildFailedError" in said()) == (script == "torchrun")
        ending = said()[said().rindex("stopping at the next step") :]
        assert "Traceback" not in ending and "torch/distributed" not in ending, ending
        assert "is saved; stopped: SIG" in ending
        # Each signal is answered once.
        assert said().count(": stopping at the next step") - said().count("SIGTERM: stopping") == 1
        assert running(run) == []
    finally:
        for pid in (launcher.pid, *running(run)):
            kill(pid)
        launcher.wait()


@pytest.mark.slow
@pytest.mark.long
def test_a_second_start_is_refused_and_the_first_is_started_again_all_the_same(
    prepared: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["launch/torchrun.sh", "--nproc", "2", "--run.dir", str(run), *long(prepared)]
    with open(tmp_path / "out", "w") as out:
        first = subprocess.Popen(
            command, cwd=ROOT, env=clean_env(PYTHON=sys.executable), stdout=out, stderr=out
        )
    try:
        reach(run, 20)
        said = launch("torchrun", "--nproc", "2", "--run.dir", str(run), *long(prepared), code=2)
        assert f"error: run.dir={run} is in use by another run (" in said and "restart" not in said
        assert f"{run}: config at step " in said
        assert outcome(run) == {} and not list(run.glob(".refused*"))
        kill(json.loads((run / "run.lock").read_text())["pid"])
        until(lambda: outcome(run).get("attempt") == 1, 40, "the report")
        assert outcome(run)["class"] == "retryable"
        reach(run, losses(run)[-1]["step"] + 5)
        assert "restart 1 of at most 3" in (tmp_path / "out").read_text()
    finally:
        for pid in (first.pid, *running(run)):
            kill(pid)
        first.wait()


def reach(run: Path, step: int) -> None:
    def there() -> bool:
        return (
            (run / "metrics.jsonl").exists()
            and bool(losses(run))
            and losses(run)[-1]["step"] >= step
        )

    until(there, 90, f"step {step} of {run}")


# --- two hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with network(tmp_path_factory.mktemp("network")) as net:
        yield net


Launchers = list[tuple[Process, Path]]


def on_both(hosts: Network, *arguments: str, home: Path = ROOT, **env: str) -> Launchers:
    script, port = str(home / "launch/torchrun.sh"), str(free_port())
    flags = ("--nnodes", "2", "--host", "node0", "--port", port)
    return [
        host.start(
            script,
            *flags,
            "--node-rank",
            str(host.number),
            *arguments,
            PYTHON=sys.executable,
            **env,
        )
        for host in hosts.nodes
    ]


def ends(launchers: Launchers, timeout: float = 120) -> tuple[list[int], list[str]]:
    """Exit codes, and what was printed."""
    deadline = time.monotonic() + timeout
    try:
        codes = [launcher.wait(max(deadline - time.monotonic(), 1)) for launcher, _ in launchers]
    except subprocess.TimeoutExpired:
        for launcher, _ in launchers:
            launcher.kill()
        raise AssertionError("\n".join(said.read_text() for _, said in launchers)) from None
    return codes, [said.read_text() for _, said in launchers]


def ranks(host: Host) -> list[int]:
    return host.pids(r"^\S*python\S* -u \S*dist_lm/train.py")


@pytest.mark.slow
def test_a_link_cut_for_five_seconds_and_for_good(
    hosts: Network, prepared: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launchers = on_both(hosts, "--run.dir", str(run), *long(prepared))
    try:
        reach(run, 20)
        hosts.nodes[1].cut()
        time.sleep(5)
        hosts.nodes[1].mend()
        reach(run, losses(run)[-1]["step"] + 10)
        assert outcome(run) == {}  # nobody ended

        hosts.nodes[1].cut()
        began = time.monotonic()
        first = [ranks(host) for host in hosts.nodes]
        until(
            lambda: not set(first[0]) & set(ranks(hosts.nodes[0])), 25, "rank 0 ends after the cut"
        )
        until(
            lambda: not set(first[1]) & set(ranks(hosts.nodes[1])), 25, "rank 1 ends after the cut"
        )
        assert time.monotonic() - began < 25
        until(lambda: outcome(run), 10, "the report")
        assert (
            outcome(run)["class"] == "retryable" and "rank 1 on node1" in outcome(run)["reason"]
        ), outcome(run)
    finally:
        hosts.nodes[1].mend()
    reach(run, losses(run)[-1]["step"] + 10)
    assert "restart 1 of at most 3" in launchers[0][1].read_text()
    launchers[1][0].send_signal(signal.SIGTERM)  # one of them is enough
    codes, said = ends(launchers)
    assert codes == [75, 75] and outcome(run)["class"] == "preempted", "\n".join(said)
    assert_undisturbed(run, prepared, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["data", "version", pytest.param("folder", marks=pytest.mark.campaign)]
)
def test_a_node_that_differs_is_refused(
    hosts: Network, prepared: Path, tmp_path: Path, case: str
) -> None:
    """Each node has a folder of its own at the same path."""
    arguments, private, run, home, env = (
        tiny(prepared),
        hosts.private / case,
        tmp_path / "run",
        ROOT,
        {},
    )
    if case == "data":
        hosts.nodes[0].run("cp", "-r", str(prepared), str(private))
        arguments[1], code = str(private), 65
        answer = f"rank 1 on node1 has data.input={private} (absent), rank 0 on node0 has "
    elif case == "version":
        for host in hosts.nodes:
            host.run("mkdir", str(private))
            host.run(
                "cp", "-r", *(str(ROOT / name) for name in ("dist_lm", "launch")), str(private)
            )
        hosts.nodes[1].run(
            "sed",
            "-i",
            "s/^__version__.*/__version__ = '9.9.9'/",
            str(private / "dist_lm/__init__.py"),
        )
        home, env, code, answer = (
            private,
            {"PYTHONPATH": str(private)},
            2,
            "rank 1 on node1 has dist_lm 9.9.9 (",
        )
    else:
        run, code = private / "run", 2
        answer = f"run.dir={run} on node1 is not the folder that rank 0 sees"
    began = time.monotonic()
    codes, said = ends(
        on_both(hosts, "--restarts", "0", "--run.dir", str(run), *arguments, home=home, **env)
    )
    assert codes == [code, code] and answer in said[0], said[0]
    assert time.monotonic() - began < 60  # 30 on a machine of its own
    if case != "folder":
        assert outcome(run)["class"] == ("data" if case == "data" else "config")


@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_elastic_goes_on_with_the_nodes_that_are_left(
    hosts: Network, prepared: Path, tmp_path: Path
) -> None:
    run, port = tmp_path / "run", str(free_port())
    flags = (
        "--nnodes",
        "1:2",
        "--host",
        "node0",
        "--port",
        port,
        "--run.dir",
        str(run),
        *long(prepared),
    )
    launchers = [
        host.start(
            str(ROOT / "launch/torchrun.sh"),
            *flags,
            PYTHON=sys.executable,
            TORCH_ELASTIC_SHUTDOWN_TIMEOUT="10",
        )
        for host in hosts.nodes
    ]
    reach(run, 60)
    began = time.monotonic()
    hosts.nodes[1].lose()
    until(lambda: outcome(run), 60, "the report")
    print(f"\nreport after {time.monotonic() - began:.0f} s: {outcome(run)}")
    until(
        lambda: (
            "ddp on 1 process" in launchers[0][1].read_text()
            or "single on 1 process" in launchers[0][1].read_text()
        ),
        180,
        "one node goes on",
    )
    reach(run, losses(run)[-1]["step"] + 10)
    print(f"training on one node after {time.monotonic() - began:.0f} s")
    launchers[0][0].send_signal(signal.SIGTERM)
    codes, said = ends(launchers, 60)
    assert codes[0] == 75 and outcome(run)["class"] == "preempted", said[0]
    train(tmp_path / "one", *long(prepared, "--run.stop_after", str(outcome(run)["step"])))
    assert_same_curve(run, tmp_path / "one", 1e-5)
