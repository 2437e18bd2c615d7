"""Starts processes: commands on a machine with a GPU, forks of this process in a dry run.

A dry run would spend most of its time on importing torch, so there one process imports it and
forks. A fork does the same as the command would. CUDA does not survive a fork, so with a GPU every
section and every rank is a command of its own.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Command:
    """A command, with all that it starts."""

    def __init__(self, words: Sequence[str], log: Path, env: Mapping[str, str], *, leads: bool):
        """`leads`: kill() also ends what it started, because it leads a session."""
        self._leads = leads
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=leads,
            )

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None and self._leads:
            _kill(self._process.pid, leads=True)  # what it started and left behind
        return code

    def kill(self) -> None:
        _kill(self._process.pid, self._leads)
        self._process.wait()


class Fork:
    """A function that runs in a fork of this process. Its exceptions are exit code 1."""

    def __init__(
        self, work: Callable[[], object], log: Path, env: Mapping[str, str], *, leads: bool
    ):
        self._leads = leads
        self._code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _be_child(work, log, env, leads)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
                if self._leads:
                    _kill(self._pid, leads=True)  # what it started and left behind
        return self._code

    def kill(self) -> None:
        if self.poll() is None:
            _kill(self._pid, self._leads)
            _, status = os.waitpid(self._pid, 0)
            self._code = os.waitstatus_to_exitcode(status)


def _be_child(work: Callable[[], object], log: Path, env: Mapping[str, str], leads: bool) -> None:
    """Work, and end the process without what the parent would do at its end."""
    code = 1
    try:
        if leads:
            os.setsid()
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.environ.clear()
        os.environ.update(env)
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback  # only needed here

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)


def _kill(pid: int, leads: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if leads:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that imports this checkout."""
    paths = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}
