"""Whether a rank finds out that its launcher is gone, also before its own first line. With
torchrun: test_train.py.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_lm.launcher import is_orphaned
from tests.procs import ROOT, clean_env

RANK = """
import os
from dist_lm.launcher import die_with_launcher
die_with_launcher()
print("lives", os.getppid())
"""


def program(path: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([path, "60"])


def test_an_orphan_is_known_by_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(shutil.which("sleep") or "", tmp_path / "systemd")
    processes = [program(str(tmp_path / "systemd")), program("sleep")]
    try:
        systemd, wrapper = (process.pid for process in processes)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        until_runs(tmp_path / "systemd", systemd)
        assert is_orphaned(systemd)
        assert not is_orphaned(wrapper) and not is_orphaned(os.getpid())
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        assert not is_orphaned(systemd)  # nobody says that a launcher is there
    finally:
        for process in processes:
            process.kill()
            process.wait()


def until_runs(path: Path, pid: int) -> None:
    deadline = time.monotonic() + 10
    while (
        str(path).encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)


def test_process_1_is_the_launcher_if_it_is_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for command, expected in [
        (b"/usr/bin/python3.11\0/usr/bin/torchrun\0--nproc-per-node\x002\0", False),
        (b"/sbin/init\0splash\0", True),
        (b"tini\0--\0/run.sh\0", True),
    ]:
        monkeypatch.setattr(Path, "read_bytes", lambda path, command=command: command)
        assert is_orphaned(1) == expected, command


@pytest.mark.parametrize("env", [{}, {"TORCHELASTIC_RUN_ID": "x"}])
def test_a_rank_whose_launcher_ended_before_it_began(tmp_path: Path, env: dict[str, str]) -> None:
    """The shell ends at once, the rank begins later. Without a launcher's variable it is an
    ordinary program.
    """
    out = tmp_path / "out"
    out.touch()
    late = f"(sleep 0.5; exec '{sys.executable}' -c '{RANK}') >{out} 2>&1 &"
    subprocess.run(["sh", "-c", late], cwd=ROOT, env=clean_env(**env), check=True)
    deadline = time.monotonic() + 30
    while "\n" not in out.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    said = out.read_text()
    if (
        env
        and said.startswith("lives")
        and b"python" in Path(f"/proc/{said.split()[1]}/cmdline").read_bytes()
    ):
        pytest.skip("what adopts orphans here is Python")
    assert said.startswith("error: the launcher of this process ended before" if env else "lives")
