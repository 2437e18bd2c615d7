"""doctor.py: what it says of machines that are fit, and of faults that are provoked for real."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import fsspec
import pytest
import torch

from dist_lm.checks.command import DOCTOR
from dist_lm.checks.examination import CHECKS, Result, page
from dist_lm.checks.inputs import look_at_data
from dist_lm.checks.links import rendezvous
from dist_lm.checks.machines import clocks
from dist_lm.checks.ranks import run_within
from dist_lm.cli import load
from dist_lm.config import Config, DataConfig, RunConfig
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.errors import DataError, UserError
from tests.conftest import TINY, text_of
from tests.procs import DEVNULL, ROOT, Process, clean_env, entry, finish, free_port, run, train

SETTINGS = [word for word in TINY if word not in ("--run.log_batch_hash", "true")]


def ranks(
    *arguments: str,
    where: Sequence[Path] = (ROOT, ROOT),
    code: Sequence[Path] = (ROOT, ROOT),
    before: Sequence[Sequence[str]] = ((), ()),
) -> list[Process]:
    """Doctor on two ranks, each in its own working directory, with its own copy of the code,
    `before` what starts it.
    """
    port, started = str(free_port()), []
    for rank in range(2):
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        if code[rank] != ROOT:
            own["PYTHONPATH"] = str(code[rank])
        command = [
            *before[rank],
            sys.executable,
            str(code[rank] / "dist_lm/doctor.py"),
            *SETTINGS,
            *arguments,
        ]
        started.append(Process(command, cwd=where[rank], env=clean_env(**own)))
    return started


def doctor(*arguments: str, expect: int = 0, **how: object) -> str:
    code, output = finish(ranks(*arguments, **how))  # type: ignore[arg-type]
    assert code == expect, output
    return output


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory; skips where it cannot be had."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# --- what it is for


def test_alone_and_fit(prepared: Path, tmp_path: Path) -> None:
    data = ("--data.input", str(prepared), "--data.tokenizer", "byte")
    page = entry("doctor", *SETTINGS, *data, "--run.dir", str(tmp_path / "a/b"))
    names = [line[6:18].strip() for line in page.splitlines()[:-1]]
    assert names == [check.name for check in CHECKS]
    assert page.endswith("14 checks: 0 warn, 0 fail\n")
    assert list(tmp_path.iterdir()) == []  # nothing stays, not even the folder


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_under_each_launcher(prepared: Path, tmp_path: Path) -> None:
    data = ("--data.input", str(prepared), "--data.tokenizer", "byte")
    common = (*SETTINGS, *data, "--run.dir", str(tmp_path / "run"), "--json")
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "dist_lm.doctor",
        "--launch",
        "zero2",
    ]
    accelerate = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "launch/ddp.yaml",
        "--num_processes",
        "2",
        "--main_process_port",
        str(free_port()),
        "dist_lm/doctor.py",
    ]
    for launcher, strategy in ((torchrun, "zero2"), (accelerate, "ddp")):
        done = run([sys.executable, *launcher, *common], stderr=DEVNULL)
        found = json.loads(done.stdout[done.stdout.index("{") :])
        assert (done.returncode, found["code"], found["ranks"]) == (0, 0, 2)
        checks = {check["name"]: check for check in found["checks"]}
        assert "fail" not in {check["grade"] for check in checks.values()}
        assert checks["devices"]["text"].endswith(strategy)
        assert (
            "same node" in checks["pairs"]["text"]
            and " GB/s on the bus" in checks["all-reduce"]["text"]
        )
        assert "need " in checks["space"]["text"]


# --- faults, each provoked


@pytest.mark.slow
def test_another_version_on_one_rank(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "dist_lm", tmp_path / "other/dist_lm")
    shutil.copytree(ROOT / "launch", tmp_path / "other/launch")
    init = tmp_path / "other/dist_lm/__init__.py"
    init.write_text(init.read_text().replace('"0.', '"9.'))
    arguments = ("--data.input", str(prepared), "--run.dir", str(tmp_path / "run"))
    page = doctor(*arguments, code=(ROOT, tmp_path / "other"), expect=70)
    assert "fail  versions    rank 1 (" in page and "): dist_lm 9." in page and ", not 0." in page
    assert "-> install the same on every host" in page


@pytest.mark.slow
def test_a_run_folder_that_one_rank_does_not_see(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    arguments = ("--data.input", str(prepared), "--run.dir", "runs/x", "--timeout_seconds", "16")
    page = doctor(*arguments, where=(tmp_path / "here", tmp_path / "there"), expect=70)
    assert (
        "fail  run folder  rank 1 (" in page
        and f"No such file or directory: '{tmp_path}/there/runs/x/" in page
    )
    assert "-> a run.dir that all hosts share and may write to, by its absolute path" in page
    (tmp_path / "there/runs/x").mkdir(parents=True)
    page = doctor(*arguments, where=(tmp_path / "here", tmp_path / "there"), expect=70)
    assert (
        "fail  run folder  rank 1 (" in page and list((tmp_path / "there/runs/x").iterdir()) == []
    )
    shutil.rmtree(tmp_path / "there/runs")
    assert not (tmp_path / "here/runs").exists() and not (tmp_path / "there/runs").exists()


@pytest.mark.slow
def test_data_that_one_rank_does_not_see_or_sees_otherwise(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    (here / "a.txt").write_text(text_of(5))
    arguments = (
        "--data.input",
        "*.txt",
        "--run.dir",
        str(tmp_path / "run"),
        "--data.tokenizer",
        "byte",
    )
    page = doctor(*arguments, where=(here, there), expect=65)
    assert "fail  data        rank 1 (" in page and "data.input='*.txt': no file matches" in page
    assert "-> the same copy where every host sees it, by its absolute path" in page
    (there / "a.txt").write_text(text_of(6))
    page = doctor(*arguments, where=(here, there), expect=65)
    assert "fail  data        data.input=*.txt: other content than on rank 0: rank 1 (" in page
    assert "-> the same copy where every host sees it, by its absolute path" in page


def test_a_read_only_folder(prepared: Path, tmp_path: Path) -> None:
    def check(folder: Path, why: str) -> None:
        page = entry(
            "doctor",
            *SETTINGS,
            "--data.input",
            str(prepared),
            "--run.dir",
            str(folder / "run"),
            code=70,
        )
        assert "fail  run folder  rank 0 (" in page and f"{why}: '{folder}/run'" in page
        assert "-> a run.dir that all hosts share and may write to, by its absolute path" in page

    if os.getuid():
        (tmp_path / "mine").mkdir(mode=0o555)
        check(tmp_path / "mine", "Permission denied")
    else:
        with mounted(tmp_path / "mine", "ro,size=1m") as folder:
            check(folder, "Read-only file system")


def test_too_little_disk(prepared: Path, tmp_path: Path) -> None:
    saving = list(SETTINGS)
    for name in ("--run.save_every", "--run.eval_every"):
        saving[saving.index(name) + 1] = "1"
    with mounted(tmp_path / "small", "size=1m") as folder:
        page = entry(
            "doctor",
            *saving,
            "--data.input",
            str(prepared),
            "--run.dir",
            str(folder / "run"),
            code=70,
        )
    assert re.search(r"fail  space       0\.0010\d GB free, 4 checkpoints of 0\.00", page)
    assert "-> another run.dir, a smaller run.keep_last, or free some" in page


def test_too_little_memory(tmp_path: Path) -> None:
    huge = "--model.width 65536 --model.layers 2000 --data.tokenizer byte --run.dir".split()
    page = entry("doctor", *huge, str(tmp_path / "run"), code=70)
    assert "fail  memory      " in page and "-> python -m dist_lm.plan shows what would fit" in page


@pytest.mark.slow
def test_damaged_data(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    (tmp_path / "text.txt").write_text(text_of(50))
    data = DataConfig(input=str(tmp_path / "text.txt"), separator="\n\n", tokenizer="byte")
    prepare_dataset(data, folder, 1, say=lambda text: None)
    arguments = (*SETTINGS, "--data.input", str(folder), "--run.dir", str(tmp_path / "run"))
    page = entry("doctor", *arguments)
    assert (
        "warn  tokenizer   257 tokens; prepared with data.tokenizer=byte, which stands, not"
        " bpe:2048" in page
    )
    assert "-> data, data.tokenizer and checkpoint that belong together" in page
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole.replace('"!"', '"?!"', 1))
    page = entry("doctor", *arguments, code=65)
    said = f"{folder}/tokenizer.json is not the one that the folder was prepared with"
    assert said in page  # as train says
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")  # opening it would wait for ever
    page = entry("doctor", *arguments, "--timeout_seconds", "6", code=65)
    assert f"{folder}/tokenizer.json: not a usable tokenizer (cannot be read" in page
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(whole)
    shard = next(folder.glob("train*.safetensors"))
    shard.unlink()
    assert "missing where dataset.json has" in entry("doctor", *arguments, code=65)


@pytest.mark.slow
def test_what_train_refuses_doctor_refuses_with_its_words(tmp_path: Path) -> None:
    """A forgotten prepare, and a text that is gone while the run folder still has its shards."""
    (tmp_path / "text.txt").write_text(text_of(50))
    data = DataConfig(input=str(tmp_path / "text.txt"), separator="\n\n", tokenizer="byte")
    prepare_dataset(data, tmp_path / "run/data", 1, say=lambda text: None)
    gone = ("--data.input", str(tmp_path / "gone.txt"), "--run.dir", str(tmp_path / "run"))
    forgotten = ("--data.input", "shards/corpus", "--run.dir", str(tmp_path / "new"))
    for arguments in (forgotten, gone, ("--data.stream", "true", *gone)):
        words = (*SETTINGS, "--data.tokenizer", "byte", *arguments)
        refused = entry("train", *words, code=65, HF_HUB_OFFLINE="1")
        page = entry("doctor", *words, code=65, HF_HUB_OFFLINE="1")
        rule = refused.strip().splitlines()[-1].removeprefix("error: ")
        assert f"fail  data        rank 0 ({socket.gethostname()}): {rule}\n" in page


def test_an_edited_text_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text\n" * 500)
    data = DataConfig(input=str(tmp_path / "text.txt"), tokenizer="byte", seq_len=16)
    prepare_dataset(data, tmp_path / "run/data", 1, say=lambda text: None)
    config = Config(data=data, run=RunConfig(dir=str(tmp_path / "run")))
    assert not look_at_data(config)[2]
    (tmp_path / "text.txt").write_text("some other text\n" * 500)
    text, _, is_warning = look_at_data(config)
    assert is_warning and f"; warning: {tmp_path}/text.txt is not as it was when " in text


def test_text_at_a_url_is_listed_and_not_read(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/doctor/text.txt", b"some text")
    config = Config(data=DataConfig(input="memory://doctor"), run=RunConfig(dir=str(tmp_path)))
    text, _, is_warning = look_at_data(config)
    assert (text, is_warning) == (
        "memory:///doctor/text.txt: 1 file, 9e-09 GB; listed, not read",
        True,
    )


@pytest.mark.slow
def test_a_checkpoint_of_another_tokenizer(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text_of(300))
    data = DataConfig(
        input=str(tmp_path / "text.txt"), separator="\n\n", tokenizer="char", val_fraction=0.1
    )
    prepare_dataset(data, tmp_path / "chars", 1, say=lambda text: None)
    train(tmp_path / "run", *SETTINGS, "--data.input", str(prepared))
    arguments = (*SETTINGS, "--run.dir", str(tmp_path / "run"), "--data.input")
    assert f"257 tokens, as {tmp_path}/run/step-00000012" in entry(
        "doctor", *arguments, str(prepared)
    )
    page = entry("doctor", *arguments, str(tmp_path / "chars"), code=65)
    assert (
        f"step-00000012 was trained with another tokenizer than data.input={tmp_path}/chars has"
        in page
    )
    assert "-> data, data.tokenizer and checkpoint that belong together" in page


@pytest.mark.campaign
def test_ranks_on_one_core(prepared: Path, tmp_path: Path) -> None:
    arguments = ("--data.input", str(prepared), "--run.dir", str(tmp_path / "run"))
    page = doctor(*arguments, before=[["taskset", "-c", "0"]] * 2)
    assert ": 2 threads of 2 ranks share 1 core(s)" in page
    assert "-> fewer ranks there, or more cores for them" in page


@pytest.mark.slow
def test_two_hosts(prepared: Path, tmp_path: Path) -> None:
    """Two host names on one machine, which know themselves by a loopback address alone."""
    named = ["env", "GLOO_SOCKET_IFNAME=lo", "unshare", "-u", "sh", "-c"]
    if subprocess.run(["unshare", "-u", "true"], capture_output=True).returncode:
        pytest.skip("another host name for one process needs root")
    before = [[*named, f'hostname {host} && exec "$@"', "sh"] for host in ("node-a", "node-b")]
    page = doctor("--data.input", str(prepared), "--run.dir", str(tmp_path / "run"), before=before)
    assert "2 ranks on 2 hosts" in page
    assert "pairs       between nodes: " in page and "(rank 0 (node-a) and rank 1 (node-b))" in page
    assert (
        "warn  rendezvous  127.0.0.1:" in page
        and "node-a 127.0.0.1 by lo, node-b 127.0.0.1 by lo" in page
    )
    assert (
        "-> GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface between the hosts" in page
    )


@contextlib.contextmanager
def slow_cores(share: float) -> Iterator[list[str]]:
    """What to put before a command so that it gets only this share of a core.

    Skips where control groups cannot.
    """
    for folder, files in (
        (
            Path("/sys/fs/cgroup/cpu"),
            {"cpu.cfs_period_us": "10000", "cpu.cfs_quota_us": str(int(10000 * share))},
        ),
        (Path("/sys/fs/cgroup"), {"cpu.max": f"{int(10000 * share)} 10000"}),
    ):
        group = folder / f"dist_lm-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                for name, value in files.items():
                    (group / name).write_text(value)
                yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
                return
            finally:
                group.rmdir()
    pytest.skip("making a processor slow needs root and control groups with a cpu controller")


@pytest.mark.campaign
def test_a_slow_rank_is_named(prepared: Path, tmp_path: Path) -> None:
    with slow_cores(0.2) as slow:
        page = doctor(
            "--data.input", str(prepared), "--run.dir", str(tmp_path / "run"), before=([], slow)
        )
    assert "warn  speed " in page and "; slow: rank 1 (" in page and "; slow: rank 0" not in page
    assert (
        "-> all wait for it in each step: look for other jobs, heat or a power limit there, or"
        " leave it out" in page
    )


@pytest.mark.slow
def test_a_rank_that_never_comes(prepared: Path, tmp_path: Path) -> None:
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    port, began = str(free_port()), time.monotonic()
    page = entry(
        "doctor",
        *SETTINGS,
        "--run.dir",
        str(tmp_path / "run"),
        "--timeout_seconds",
        "3",
        code=70,
        timeout=90,
        MASTER_PORT=port,
        **alone,
    )
    assert time.monotonic() - began < 60
    assert (
        f"fail  start       only 1 of 2 processes met at 127.0.0.1:{port} within 3 s; is every"
        " node up" in page
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_falls_silent(
    prepared: Path, tmp_path: Path, how: signal.Signals
) -> None:
    run = tmp_path / "run"
    both = ranks("--data.input", str(prepared), "--run.dir", str(run), "--timeout_seconds", "8")
    try:
        while not any(run.glob(".doctor-*")):
            assert all(rank.poll() is None for rank in both)
        both[1].send_signal(how)
        page = both[0].communicate(timeout=60)[0]
    finally:
        both[1].kill()
        both[1].communicate()
        both[0].kill()
    assert both[0].returncode == 70
    assert (
        "fail  peers       a rank is missing, died or was silent for 8 s, after the check of "
        in page
    )
    assert not any(run.glob(".doctor-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--timeout_seconds", "soon"],
            "--timeout_seconds=soon must be a whole number of 1 or more; nearest: 60",
        ),
        (
            ["--timeout_seconds", "0"],
            "--timeout_seconds=0 must be a whole number of 1 or more; nearest: 60",
        ),
        (["--jason"], "unknown flag --jason; did you mean --json?"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        load(arguments, DOCTOR)
    assert (str(refused.value), refused.value.code) == (message, 2)


def test_what_start_refuses_is_on_the_page() -> None:
    found = json.loads(entry("doctor", *SETTINGS, "--launch", "zero2", "--json", code=2))
    assert [(c["name"], c["grade"], c["code"]) for c in found["checks"]] == [("start", "fail", 2)]
    assert found["checks"][0]["text"].startswith(
        "--launch zero2 needs ranks that a launcher started"
    )


# --- judgements


def said(check: Callable[[Any], tuple[str, bool]], **known: Any) -> tuple[str, bool]:
    """What a check says where the ranks are known to be so."""
    return check(SimpleNamespace(names=["rank 0 (a)", "rank 1 (b)"], **known))


@pytest.mark.parametrize(
    ("late", "apart", "warns"), [([0.2, -0.001], "0.001", False), ([-7.5, -7.25], "7.25", True)]
)
def test_clocks_that_differ(late: list[float], apart: str, warns: bool) -> None:
    """Five looks at two clocks, most of them late."""
    looks = iter([[100.0, 100.0 + seconds] for seconds in [late[0]] * 4 + [late[1]]])
    found = said(clocks, gather=lambda own: next(looks), runtime=Mock())
    assert found == (f"at most {apart} s apart (rank 1 (b) from rank 0)", warns)


def test_hosts_that_only_know_themselves() -> None:
    facts = [{"host": host, "address": "127.0.1.1"} for host in "ab"]
    assert [
        said(rendezvous, facts=facts[:hosts], device=torch.device("cpu"))[1] for hosts in (1, 2)
    ] == [False, True]


def test_work_that_fails_or_hangs_is_said() -> None:
    def refuse() -> None:
        raise DataError("no")

    def fail() -> None:
        raise OSError(5, "Input/output error")

    assert run_within(5, lambda: 1) == {"found": 1}
    assert run_within(5, refuse) == {"error": "no"}
    assert run_within(5, fail) == {"error": "OSError: [Errno 5] Input/output error"}
    assert run_within(0.1, lambda: time.sleep(1)) == {"error": "no answer within 0.1 s"}


def test_the_page() -> None:
    results = [Result("a", "ok", "fine"), Result("b", "fail", "broken", "mend it", 70)]
    assert page(results, 2, 70, as_json=False).splitlines() == [
        "ok    a           fine",
        "fail  b           broken",
        " " * 18 + "-> mend it",
        "2 checks: 0 warn, 1 fail",
    ]
    assert json.loads(page(results, 2, 70, as_json=True))["checks"][1]["remedy"] == "mend it"
