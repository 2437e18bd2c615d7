"""The runtime: agreements of several real processes, the lock of a run folder, and refusing silent degradation."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dist_lm.config import Config, RunConfig, UserError
from dist_lm.runtime import RunLock, Runtime, refuse_silent_single, start
from tests.procs import finish, start_ranks


def in_ranks(world: int, function: str, *arguments: str) -> str:
    """Run a function of this file in fresh processes with gloo between them; what they printed."""
    code = f"from tests import test_runtime; test_runtime.{function}({', '.join(map(repr, arguments))})"
    got, output = finish(start_ranks(world, "-c", code))
    assert got == 0, output
    return output


def started(folder: str) -> Runtime:
    return start(Config(run=RunConfig(dir=folder, trackers=())))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_agreements(tmp_path: Path, world: int) -> None:
    output = in_ranks(world, "agreements", str(tmp_path))
    assert output.count("all agreed") == world


def agreements(folder: str) -> None:
    """Every agreement once, with sizes and refusals that differ between ranks."""
    runtime = started(folder)
    rank, world = runtime.rank, runtime.world_size
    assert runtime.sum(torch.tensor([1.0 + rank])).item() == world * (world + 1) / 2
    assert runtime.channel.gather({"rank": rank, "text": "é" * rank}) == [
        {"rank": other, "text": "é" * other} for other in range(world)
    ]
    assert runtime.on_main(lambda: {"who": rank}) == {"who": 0}
    assert runtime.on_main(lambda: time.sleep(2.5)) is None  # longer than one look at it

    def refuse() -> None:
        raise UserError("not like this", 65)

    for ask in (runtime.on_main, runtime.together):
        with pytest.raises(UserError, match=r"not like this") as error:
            ask(refuse)
        assert error.value.code == 65
    if world > 1:
        with pytest.raises(UserError, match=r"^rank 1: not like this$"):
            runtime.together(lambda: refuse() if rank == 1 else None)
    assert runtime.together(lambda: rank) == rank
    runtime.close()
    print("all agreed")


def test_one_process_instead_of_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(
        UserError, match="accelerate started one process although more were asked for .* use: accelerate"
    ):
        refuse_silent_single()
    monkeypatch.delenv("MASTER_ADDR")
    refuse_silent_single()


class Alone:
    """As much of a runtime as a lock needs."""

    is_main = True

    def __init__(self) -> None:
        self.said: list[str] = []

    def on_main(self, work):  # type: ignore[no-untyped-def]
        return work()

    together = on_main

    def say(self, text: str) -> None:
        self.said.append(text)


def test_the_lock_is_held_and_released(tmp_path: Path) -> None:
    runtime = Alone()
    with RunLock(tmp_path, runtime):  # type: ignore[arg-type]
        held = json.loads((tmp_path / "run.lock").read_text())
        assert (held["host"], held["pid"]) == (socket.gethostname(), os.getpid())
    assert not (tmp_path / "run.lock").exists()


def test_a_live_lock_is_refused_and_a_dead_one_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunLock, "STALE_SECONDS", 1.0)
    with RunLock(tmp_path, Alone()):  # type: ignore[arg-type]
        second = Alone()
        with pytest.raises(UserError, match=r"is in use by another run \(.*\); rule: one run a folder"):
            RunLock(tmp_path, second).__enter__()  # type: ignore[arg-type]
        assert any("waiting for the run that holds" in said for said in second.said)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "run.lock").write_text(json.dumps({"host": socket.gethostname(), "pid": ended.pid}))
    began = time.monotonic()
    with RunLock(tmp_path, Alone()):  # type: ignore[arg-type]
        assert time.monotonic() - began < 0.9  # at once: the process is gone


def test_a_lock_of_another_host_is_taken_over_when_nobody_touches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunLock, "STALE_SECONDS", 1.0)
    (tmp_path / "run.lock").write_text(json.dumps({"host": "elsewhere", "pid": os.getpid()}))
    began = time.monotonic()
    with RunLock(tmp_path, Alone()):  # type: ignore[arg-type]
        assert 1.0 < time.monotonic() - began < 5.0
