"""A forked command is what a command started from cold would be, and nothing outlives the tests."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import TINY
from tests.procs import PIPE, ROOT, STDOUT, Process, clean_env, run, start_ranks, train
from tests.test_train import assert_same_bits, losses

# What a process finds when it starts, as far as others can tell it apart.
STATE = """
import json, os, signal, sys
handlers = {str(number): str(signal.getsignal(number)) for number in signal.valid_signals()}
umask = os.umask(0o77)
files = [number for number in range(3, 100) if os.path.exists(f"/proc/self/fd/{number}")]
def describe(s):
    buffering = (type(s.buffer).__name__, s.line_buffering, s.write_through)
    return str(s), *buffering, s.errors, s.seekable(), s.closed, s.fileno()
sys.stdout.reconfigure(encoding="utf-8")  # not the null device of the server any more
print(json.dumps({
    "name": __name__,
    "file": globals().get("__file__"),
    "spec": __spec__ and __spec__.name,
    "builtins": str(__builtins__),
    "main": sys.modules["__main__"].__dict__ is globals(),
    "argv": sys.argv,
    "words": sys.orig_argv,
    "path": sys.path,
    "directory": os.getcwd(),
    "umask": umask,
    "handlers": handlers,
    "environment": dict(os.environ),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_SETMASK, ())),
    "session": os.getsid(0) == os.getpid(),
    "files": files,
    "streams": [describe(s) for s in (sys.stdin, sys.stdout, sys.stderr)],
    "stdin": sys.stdin is sys.__stdin__,
    "stdout": sys.stdout is sys.__stdout__,
    "stderr": sys.stderr is sys.__stderr__,
    "input": sys.stdin.read(),
}))
"""


def listen_again() -> None:
    """To the signals that a shell or nohup lets its background jobs ignore, as pytest may be."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("way", ["path", "module", "code"])
def test_a_fork_finds_what_a_cold_start_finds(tmp_path: Path, way: str) -> None:
    (tmp_path / "folder").mkdir()
    script = tmp_path / "folder/state.py"
    script.write_text(STATE)
    words = {"path": [str(script)], "module": ["-m", "folder.state"], "code": ["-c", STATE]}[way]
    command = [sys.executable, *words, "--a", "b c"]
    expected = subprocess.run(
        command,
        cwd=tmp_path,
        env=clean_env(),
        input="what is read\n",
        text=True,
        stdout=PIPE,
        stderr=STDOUT,
        check=True,
        umask=0o022,
        start_new_session=True,
        preexec_fn=listen_again,
    ).stdout
    wanted = without_imports(json.loads(expected))
    for cold in (False, True):
        process = Process(command, cwd=tmp_path, cold=cold, stdin=PIPE)
        assert bool(process.why_cold) == cold, process.why_cold
        found = json.loads(process.communicate("what is read\n", timeout=60)[0])
        assert process.returncode == 0
        assert without_imports(found) == wanted


def without_imports(found: dict[str, Any]) -> dict[str, Any]:
    """All but what the import of torch writes into the environment, in a server and here."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK"):
        found["environment"].pop(name, None)
    return found


@pytest.mark.parametrize(
    ("code", "expected", "output"),
    [
        ("print('x'); raise SystemExit(7)", 7, "x\n"),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("import atexit; atexit.register(print, 'at exit'); print('x')", 0, "x\nat exit\n"),
        ("import ctypes; ctypes.CDLL(None).printf(b'in the buffer of C')", 0, "in the buffer of C"),
        ("import threading; threading.Timer(0.1, print, ['thread']).start()", 0, "thread\n"),
        ("import os; print('x'); os._exit(5)", 5, "x\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -2, None),
        ("class A:\n def __del__(self): print('freed')\na = A()", 0, "freed\n"),
        ("1 / 0", 1, None),
    ],
)
def test_a_fork_ends_as_a_cold_start_ends(code: str, expected: int, output: str | None) -> None:
    for cold in (False, True):
        process = Process([sys.executable, "-c", code], cold=cold)
        said = process.communicate(timeout=60)[0]
        assert (bool(process.why_cold), process.returncode) == (cold, expected), said
        assert said == output if output is not None else "Traceback" in said


def test_what_a_fork_cannot_stand_for_starts_cold() -> None:
    for more, why in (
        ({"OMP_NUM_THREADS": "3"}, "other OMP_NUM_THREADS"),  # read by a library as it is loaded
        ({"PYTHONHASHSEED": "3"}, "other PYTHONHASHSEED"),  # by Python
        ({"HF_HOME": "/tmp"}, "other HF_HOME"),  # by a module as it is imported
        ({"RANK": "0", "PYTEST_X": "1"}, ""),  # by our code
    ):
        with Process([sys.executable, "-c", ""], env=clean_env(**more)) as process:
            assert process.why_cold == why
    for words in ([sys.executable, "-u", "-c", ""], ["true"]):
        with Process(words) as process:
            assert process.why_cold == "not a plain command of Python"


def test_neighbours_order_their_sets_differently() -> None:
    ranks = start_ranks(2, "-c", "print([*map(str, {*'abcdefghij'})])")
    assert [rank.why_cold for rank in ranks] == ["", ""]
    first, second = (rank.communicate(timeout=60)[0] for rank in ranks)
    assert first != second and sorted(first) == sorted(second)


def test_waiting_signals_and_what_was_printed_before_a_timeout() -> None:
    process = Process([sys.executable, "-c", "import time; print('x'); time.sleep(600)"])
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=1)
    assert psutil.Process(process.pid).cmdline()[:2] == [
        sys.executable,
        "-c",
    ]  # in ps it is itself, not the server
    process.kill()
    assert process.wait(10) == -9
    process.kill()  # an ended one: nothing happens
    assert process.communicate()[0] == "x\n"
    assert not psutil.pid_exists(process.pid)  # nor a zombie


TESTS = """
import os, signal, sys, time
from tests.procs import Process, run
state = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
for cold in (False, True):
    print(run([sys.executable, "-c", state], cold=cold).stdout, end="")
child = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
waiting = Process([sys.executable, "-c", f"{child}; import time; time.sleep(600)"])
print(waiting.pid, waiting.stdout.readline().strip(), flush=True)
print(sys.stdin.readline(), end="", flush=True)
print(run([sys.executable, "-c", "print('still served')"]).stdout, end="", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_workers_share_a_server_and_nothing_outlives_them() -> None:
    """As `nohup pytest -n 2 &` would start them, where signals are ignored; killed one by one."""
    workers = []
    for _ in range(2):
        worker = subprocess.Popen(
            [sys.executable, "-c", TESTS],
            cwd=ROOT,
            env={**os.environ, "PYTEST_XDIST_TESTRUNUID": f"test-{os.getpid()}"},
            stdout=PIPE,
            stdin=PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        workers.append(worker)
    started = []
    for worker in workers:
        assert worker.stdout
        assert [worker.stdout.readline() for _ in range(2)] == ["True\n", "True\n"]
        pids = worker.stdout.readline().split()
        started.append([psutil.Process(int(pid)) for pid in pids])
    server, other = (processes[0].parent() for processes in started)
    assert server and server == other and server.pid != os.getpid()
    with workers[0] as first:
        first.kill()
    assert psutil.wait_procs(started[0], timeout=10)[1] == []
    with workers[1] as second:
        assert second.stdin and second.stdout
        second.stdin.write("go on\n")
        second.stdin.flush()
        assert [second.stdout.readline() for _ in range(2)] == ["go on\n", "still served\n"]
        assert all(process.is_running() for process in started[1])
        second.kill()
    assert psutil.wait_procs([*started[1], server], timeout=10)[1] == []


COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "dist_lm").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_starts_from_cold(command: str) -> None:
    """It says the same as a fork, so it needs nothing that another module's import left behind."""
    said = [run([sys.executable, "-m", command, "--help"], cold=cold) for cold in (True, False)]
    assert (said[0].returncode, said[0].stdout) == (said[1].returncode, said[1].stdout)
    assert "Traceback" not in said[0].stdout and len(said[0].stdout) > 20


@pytest.mark.slow
def test_cold_ranks_write_the_bits_of_forked_ones(prepared: Path, tmp_path: Path) -> None:
    common = ("--data.input", str(prepared), "--run.trackers", *TINY)
    train(tmp_path / "forked", *common, world=2)
    train(tmp_path / "cold", *common, world=2, cold=True)
    assert_same_bits(tmp_path / "cold/step-00000012", tmp_path / "forked/step-00000012")
    kept = ("loss", "grad_norm", "batch_hash")
    cold, forked = (
        [[step[key] for key in kept] for step in losses(tmp_path / name)]
        for name in ("cold", "forked")
    )
    assert cold == forked
