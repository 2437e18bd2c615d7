"""Start dist_lm in processes of its own: plain commands, or one process a rank with gloo between.

Every call has a timeout, after which all its processes are killed and their output is part of the
failure. forkserver.py says how this is fast, and in what state the processes start.
"""

import atexit
import hashlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.forkserver import START

ROOT = Path(__file__).parents[1]
# What ranks under DeepSpeed import besides, and late.
ZERO_MODULES = "deepspeed transformers.integrations deepspeed.runtime.zero.muon.muon_optimizer"
PIPE, DEVNULL, STDOUT = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def clean_env(**more: str) -> dict[str, str]:
    """This environment without what a launcher would set, so that tests behave alike everywhere.

    Nor has it what torch sets in the tests' own process when that compiles a model. Threads that
    wait for work sleep: by default they spin, which starves the other ranks on a small machine.
    """
    left_out = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "ACCELERATE_",
        "TORCHELASTIC_",
        "TORCHINDUCTOR_CACHE_DIR",
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    return {**kept, "PYTHONUNBUFFERED": "1", "COLUMNS": "120", "OMP_WAIT_POLICY": "passive", **more}


class Connection:
    """To a fork server, which the workers of `pytest -n` share: to start one takes seconds."""

    def __init__(self, seed: int, modules: str, variables: frozenset[tuple[str, str]]):
        self.door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.server: subprocess.Popen[bytes] | None = None  # None if another worker started it
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed with the connection
        atexit.register(self.close)
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or f"{os.getpid()}-{id(self)}"
        kind = hashlib.sha256(repr((seed, modules, sorted(variables))).encode()).hexdigest()[:16]
        env = clean_env(**{**START, "PYTHONHASHSEED": str(seed), **dict(variables)})
        # What a test has set for its own processes is not the server's.
        env = {name: value for name, value in env.items() if not name.startswith("DIST_LM_")}
        while not self.connected(f"\0dist_lm-{run}-{kind}"):
            self.start(f"\0dist_lm-{run}-{kind}", modules, env)

    def connected(self, place: str) -> bool:
        """Whether a server listens there; waits until it has imported all."""
        try:
            self.door.connect(place)
            if self.door.recv(100):
                return True
        except ConnectionError:
            pass
        if self.server:
            self.server.wait()
            self.errors.seek(0)
            raise RuntimeError(f"the fork server ended:\n{self.errors.read()}")
        self.door.close()  # nobody listens, or a server that ends with its last worker
        self.door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return False

    def start(self, place: str, modules: str, env: dict[str, str]) -> None:
        """Start the server, if no other worker does that right now."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            try:
                listener.bind(place)
            except OSError:
                time.sleep(0.01)  # until the other worker's listens
                return
            listener.listen(100)
            file = listener.fileno()
            words = [str(ROOT / "tests/forkserver.py"), str(file), modules, "-" * 20_000]
            self.server = subprocess.Popen(
                [sys.executable, *words],
                env=env,
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=self.errors,
                pass_fds=[file],
                start_new_session=True,
            )

    def ask(self, request: dict[str, Any], files: list[int]) -> None:
        socket.send_fds(self.door, [json.dumps(request).encode()], files)

    def close(self) -> None:
        """What this process started ends; with the last worker's connection, the server too."""
        self.door.close()
        if self.server:
            self.server.wait()
        self.errors.close()


def late_modules(command: Sequence[str]) -> str:
    """Which modules a server for this command imports besides dist_lm's."""
    return ZERO_MODULES if any(word.startswith("zero") for word in command) else ""


@cache
def connection(
    seed: int, modules: str, variables: frozenset[tuple[str, str]] = frozenset()
) -> Connection:
    return Connection(seed, modules, variables)


class Process:
    """A process that a fork server started. It has what the tests use of subprocess.Popen.

    `variables` are in its environment and in that of its server, for what is read by libraries.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | str = ROOT,
        env: dict[str, str] | None = None,
        text: bool = True,
        stdin: Any = DEVNULL,
        stdout: Any = PIPE,
        stderr: Any = STDOUT,
        cold: bool = False,
        seed: int = 0,
        variables: Mapping[str, str] | None = None,
    ):
        self.args, self.text = list(map(str, command)), text
        self.returncode: int | None = None
        self.stdin, self.stdout, self.stderr = None, None, None
        theirs, to_close = [], []
        for number, (name, where) in enumerate(
            (("stdin", stdin), ("stdout", stdout), ("stderr", stderr))
        ):
            file = number if where is None else where
            if where == PIPE:
                read, write = os.pipe()
                file, ours = (read, write) if number == 0 else (write, read)
                to_close.append(file)
                setattr(
                    self,
                    name,
                    os.fdopen(ours, ("w" if number == 0 else "r") + ("" if text else "b")),
                )
            elif where == DEVNULL:
                file = os.open(os.devnull, os.O_RDWR)
                to_close.append(file)
            elif where == STDOUT:
                file = theirs[1]
            theirs.append(file if isinstance(file, int) else file.fileno())
        self.line, their_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        variables = variables or {}
        server = connection(seed, late_modules(self.args), frozenset(variables.items()))
        request = {
            "words": self.args,
            "cwd": str(cwd),
            "env": (clean_env() if env is None else env) | dict(variables),
            "cold": "the caller wants it" if cold else "",
        }
        with their_end:
            server.ask(request, [*theirs, their_end.fileno()])
        for file in to_close:
            os.close(file)
        started = json.loads(self.line.recv(1000))
        self.pid: int = started["pid"]
        self.why_cold: str = started["cold"]

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        """Its exit code, negative for a signal; None if it has not ended after so many seconds."""
        if self.returncode is None:
            self.line.settimeout(timeout)
            try:
                answer = self.line.recv(1000)
            except (BlockingIOError, TimeoutError):
                return None
            if not answer:
                raise RuntimeError("the fork server ended before its process")
            self.returncode = json.loads(answer)["code"]
            self.line.shutdown(socket.SHUT_WR)  # we know it: now the server may forget the process
            self.line.settimeout(None)
            self.line.recv(1)  # it has
            self.line.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the process, if it has not ended.

        Until we know that it has, its pid cannot be another's.
        """
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        """As Popen's, also in that what was read before a timeout is part of the next answer."""
        if not hasattr(self, "_read"):
            self._read: dict[Any, bytearray] = {
                file: bytearray() for file in (self.stdout, self.stderr) if file
            }
            self._unsent = input.encode() if isinstance(input, str) else input or b""
        deadline = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for file in self._read:
                if not file.closed:
                    selector.register(file, selectors.EVENT_READ)
            if self.stdin and not self.stdin.closed:
                if self._unsent:
                    selector.register(self.stdin, selectors.EVENT_WRITE)
                else:
                    self.stdin.close()
            while selector.get_map():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left < 0:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                for key, _ in selector.select(left):
                    self._exchange(selector, key.fileobj, key.fd)
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        found: list[Any] = [
            bytes(self._read[file]) if file else None for file in (self.stdout, self.stderr)
        ]
        if self.text:
            found = [
                data if data is None else data.decode().replace("\r\n", "\n") for data in found
            ]
        return found[0], found[1]

    def _exchange(self, selector: selectors.BaseSelector, file: Any, number: int) -> None:
        """Read or write what is possible now."""
        if file is self.stdin:
            try:
                self._unsent = self._unsent[os.write(number, self._unsent[:4096]) :]
            except BrokenPipeError:
                self._unsent = b""
            if self._unsent:
                return
        elif data := os.read(number, 2**16):
            self._read[file] += data
            return
        selector.unregister(file)
        file.close()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.stdin, self.stdout, self.stderr):
            if file:
                file.close()
        self.wait()


def run(
    command: Sequence[str],
    *,
    timeout: float = 240,
    input: Any = None,
    check: bool = False,
    **more: Any,
) -> subprocess.CompletedProcess[Any]:
    """As subprocess.run, in the state that forkserver.py describes."""
    process = Process(command, **{"stdin": DEVNULL if input is None else PIPE, **more})
    try:
        output, errors = process.communicate(input, timeout)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    done = subprocess.CompletedProcess(process.args, process.returncode or 0, output, errors)
    if check:
        done.check_returncode()
    return done


def start_ranks(world: int, *command: str, cold: bool = False, **env: str) -> list[Process]:
    """One process a rank, as torchrun would start them.

    Neighbours differ in the order of their sets.
    """
    for seed in range(
        min(world, 2)
    ):  # first of all: a server takes seconds to start, which a rank should not wait
        connection(seed, late_modules(command))
    port = str(free_port())
    ranks = []
    for rank in range(world):
        own = (
            {}
            if world == 1
            else {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        )
        ranks.append(
            Process(
                [sys.executable, *command], env=clean_env(**own, **env), cold=cold, seed=rank % 2
            )
        )
    return ranks


def finish(ranks: Sequence[Process], timeout: float = 240) -> tuple[int, str]:
    """Wait for all; the first exit code that is not 0, and all they printed."""
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    except subprocess.TimeoutExpired:
        for rank in ranks:
            rank.kill()
        raise AssertionError(
            "timed out; printed:\n" + "\n".join(rank.communicate()[0] for rank in ranks)
        ) from None
    return next((rank.returncode for rank in ranks if rank.returncode), 0), "\n".join(outputs)


def train(
    run_dir: Path, *arguments: str, world: int = 1, code: int = 0, cold: bool = False, **env: str
) -> str:
    """Run train.py to its end on `world` processes; what it printed.

    Fails unless it exits with `code`.
    """
    words = ("dist_lm/train.py", "--run.dir", str(run_dir), *arguments)
    got, output = finish(start_ranks(world, *words, cold=cold, **env))
    assert got == code, f"exit code {got}, not {code}:\n{output}"
    return output


def entry(
    module: str,
    *arguments: str,
    code: int = 0,
    stdin: str | None = None,
    timeout: float = 240,
    **env: str,
) -> str:
    """Run `python -m dist_lm.MODULE`; what it printed on both channels.

    Fails unless it exits with `code`.
    """
    command = [sys.executable, "-m", f"dist_lm.{module}", *arguments]
    done = run(command, env=clean_env(**env), input=stdin, timeout=timeout)
    assert done.returncode == code, f"exit code {done.returncode}, not {code}:\n{done.stdout}"
    return done.stdout
