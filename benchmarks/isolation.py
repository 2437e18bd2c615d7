"""Processes of their own for claims and for the ranks of a claim.

They are forks: importing torch takes seconds, and here one process pays for it. No torch operation
may run before a fork, because threads do not survive one.
"""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
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
        forks.append(Fork(lambda rank=rank: be_rank(rank), scratch / f"rank-{rank}.log"))
    try:
        return [fork.result(_SECONDS) for fork in forks]
    finally:
        for fork in forks:
            fork.kill()


def clean_environment(**more: str) -> dict[str, str]:
    """This environment for a fresh command that imports this checkout."""
    kept = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **more}


def run_command(words: Sequence[str], **env: str) -> str:
    """What a fresh Python process prints. It must succeed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=clean_environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
    )
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout[-3000:]}"
    return done.stdout


def run_commands(world: int, words: Sequence[str]) -> list[str]:
    """What fresh processes print, one a rank."""
    port = free_port()
    processes = []
    for rank in range(world):
        processes.append(
            subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=clean_environment(**world_of(rank, world, port)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, f"exit code {process.returncode}:\n{output[-3000:]}"
    return outputs
