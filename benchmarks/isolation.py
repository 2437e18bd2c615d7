"""Processes of their own for claims and for the ranks of a claim.

They are forks: importing torch takes seconds, and here one process pays for it. No torch operation
may run before a fork, because threads do not survive one.
"""

import contextlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What ranks under DeepSpeed import, and late.
ZERO_MODULES = (
    "deepspeed",
    "transformers.integrations",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
_SECONDS = 300  # that ranks may take


class Fork:
    """A function that runs in a fork and answers in JSON."""

    def __init__(self, work: Callable[[], Any], log: Path, leads: bool = False):
        """`leads`: it has a session of its own, and all that it started ends with it."""
        self._leads = leads
        self._log = log
        self._answer, theirs = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._answer)
            _be_child(work, log, theirs, leads)
        os.close(theirs)

    def result(self, seconds: float) -> Any:
        """Its answer. Raises RuntimeError with the end of what it printed if it failed."""
        deadline = time.monotonic() + seconds
        data = b""
        os.set_blocking(self._answer, False)
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                part = os.read(self._answer, 2**16)
                if not part:
                    break
                data += part
                continue
            time.sleep(0.01)
        else:
            self.kill()
            raise RuntimeError(f"it took more than {seconds:.0f} s\n{self._end_of_log()}")
        self.kill()
        try:
            return json.loads(data)
        except ValueError:
            raise RuntimeError(self._end_of_log()) from None

    def kill(self) -> None:
        """End it, and all that it started if it leads. After its answer it has nothing to do."""
        with contextlib.suppress(ProcessLookupError):
            if self._leads:
                os.killpg(self.pid, signal.SIGKILL)
            else:
                os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _end_of_log(self) -> str:
        return self._log.read_text(errors="replace")[-4000:].strip()


def _be_child(work: Callable[[], Any], log: Path, answer: int, leads: bool) -> None:
    code = 1
    try:
        if leads:
            os.setsid()
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), line_buffering=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True)
        data = json.dumps(work()).encode()
        while data:
            data = data[os.write(answer, data) :]
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def world_of(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that a launcher sets for a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_ranks(world: int, work: Callable[[int], Any], scratch: Path) -> list[Any]:
    """What a function of the rank answers on each of several ranks, each on cores of its own."""
    port = free_port()
    cores = sorted(os.sched_getaffinity(0))

    def be_rank(rank: int) -> Any:
        os.environ.update(world_of(rank, world, port))
        if len(cores) >= world:
            os.sched_setaffinity(0, set(cores[rank::world]))
        return work(rank)

    forks = []
    for rank in range(world):
        forks.append(Fork(partial(be_rank, rank), scratch / f"rank-{rank}.log"))
    try:
        return [fork.result(_SECONDS) for fork in forks]
    finally:
        for fork in forks:
            fork.kill()


def run_processes(
    world: int, words: Sequence[str], *, is_forked: bool = False, **env: str
) -> list[str]:
    """What Python processes print that run a script, one a rank. They must succeed.

    They are fresh ones, or forks of this one where only the result matters.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(world)]
        processes: list[Fork | _Fresh] = []
        for rank, log in enumerate(logs):
            own = dict(env)
            if world > 1:
                own |= world_of(rank, world, port)
            if is_forked:
                processes.append(Fork(partial(_run_script, words, own), log))
            else:
                processes.append(_Fresh(words, own, log))
        try:
            for process in processes:
                process.result(_SECONDS)
        finally:
            for process in processes:
                process.kill()
        return [log.read_text(errors="replace") for log in logs]


class _Fresh:
    """A Python process that runs a script of this checkout."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], log: Path):
        self._log = log
        kept = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
        paths = [str(ROOT)]
        if os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        with open(log, "wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env={**kept, "PYTHONPATH": os.pathsep.join(paths), **env},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )

    def result(self, seconds: float) -> None:
        code = self._process.wait(seconds)
        if code:
            raise RuntimeError(f"exit code {code}:\n{self._log.read_text()[-4000:]}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _run_script(words: Sequence[str], env: Mapping[str, str]) -> None:
    """In a fork: as `python SCRIPT WORDS` would."""
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = list(words)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        assert not error.code, f"exit code {error.code}"
