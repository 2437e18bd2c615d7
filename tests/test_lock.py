"""The lock of a run folder: who gets it, who is refused, and how a run that lost it finds out."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_lm import lock
from dist_lm.errors import UserError
from dist_lm.lock import Holder, RunLock
from tests.procs import ROOT, clean_env


def quiet(text: str) -> None:
    pass


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[RunLock]:
    mine = RunLock(folder)
    mine.take(quiet)
    try:
        yield mine
    finally:
        mine.release()


@contextlib.contextmanager
def another_process(
    folder: Path, before: str = "", host: str = ""
) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lock until it is told to go on; then it says why it lost it, or
    nothing.
    """
    code = f"""
import socket, sys
from pathlib import Path
from dist_lm import lock
lock.STALE_SECONDS = 1.0
{before}
socket.gethostname = lambda: {host or socket.gethostname()!r}
mine = lock.RunLock(Path({str(folder)!r}))
mine.take(print)
print("taken", flush=True)
sys.stdin.readline()
print(mine.lost)
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=clean_env(), text=True, stdin=pipe, stdout=pipe
    )
    try:
        assert process.stdout and process.stdout.readline() == "taken\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        RunLock(folder).take(quiet)
    assert error.value.code == 2
    return str(error.value)


def test_it_is_held_and_released(tmp_path: Path) -> None:
    with held(tmp_path / "run") as mine:
        path = tmp_path / "run/run.lock"
        place = json.loads(path.read_text())
        assert (place["host"], place["pid"]) == (socket.gethostname(), os.getpid())
        assert (
            Holder(path).look() == "alive"
            and mine.look() == mine.lost == ""
            and not mine.is_anothers()
        )
        before = path.stat().st_mtime_ns
        time.sleep(0.5)
        assert path.stat().st_mtime_ns > before
    assert list((tmp_path / "run").iterdir()) == []
    mine.release()


@pytest.mark.slow
def test_a_live_run_is_left_alone_and_a_dead_one_s_lock_taken_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    with another_process(tmp_path) as first:
        with pytest.raises(
            UserError, match=r"is in use by another run \(.*\); rule: one run a folder"
        ):
            RunLock(tmp_path).take(said.append)
        assert len(said) == 1 and said[0].startswith(
            f"waiting for the run that holds {tmp_path}/run.lock ("
        )
        assert RunLock(tmp_path).is_anothers()
        first.kill()
        first.wait()
        began = time.monotonic()
        assert not RunLock(tmp_path).is_anothers()
        with held(tmp_path):
            assert time.monotonic() - began < 0.9


@pytest.mark.parametrize("text", ["", json.dumps({"host": "elsewhere", "pid": 1}), "{torn"])
def test_what_nobody_touches_is_taken(tmp_path: Path, text: str) -> None:
    """An empty file, left by a full disk, at once; one that names another host after a while."""
    (tmp_path / "run.lock").write_text(text)
    (tmp_path / ".run.lock.0123").touch()  # of a start that was killed
    began = time.monotonic()
    assert not RunLock(tmp_path).is_anothers()
    assert (time.monotonic() - began > 1.0) == bool(text)
    began = time.monotonic()
    with held(tmp_path):
        assert (1.0 if text else 0.0) < time.monotonic() - began < (5.0 if text else 0.9)
        assert [file.name for file in tmp_path.iterdir()] == ["run.lock"]


@pytest.mark.slow
def test_another_host_that_touches_its_lock_is_seen_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with another_process(tmp_path, host="elsewhere"):
        assert RunLock(tmp_path).is_anothers()
        assert "is in use by another run (" in refused(tmp_path)


@pytest.mark.slow
def test_a_stopped_process_keeps_its_folder(tmp_path: Path) -> None:
    with another_process(tmp_path) as first:
        first.send_signal(signal.SIGSTOP)
        said = refused(tmp_path)
        place = f'{{"host": "{socket.gethostname()}", "pid": {first.pid},'
        what = "is in use by another run whose process is stopped or unreachable"
        assert f"{what} ({place}" in said
        assert f"end that process, or delete {tmp_path}/run.lock if it is lost" in said
        assert RunLock(tmp_path).is_anothers()
        first.send_signal(signal.SIGCONT)
        assert first.communicate("\n", timeout=20)[0] == "\n"  # it lost nothing


@pytest.mark.slow
def test_a_host_that_is_lost_may_have_its_flock_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an NFS server sees it: nothing is touched, and the flock goes later."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 60.0)
    with another_process(tmp_path, host="elsewhere") as first:
        first.send_signal(signal.SIGSTOP)
        # After 6 s a start on the same host would have been refused.
        killer = threading.Timer(8.0, first.kill)
        killer.start()
        began = time.monotonic()
        with held(tmp_path):
            assert 8.0 < time.monotonic() - began < 20
        killer.join()


def test_where_flock_is_granted_to_everybody_a_stopped_process_loses_its_folder_and_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with another_process(tmp_path, "lock.fcntl.flock = lambda *_: None") as first:
        first.send_signal(signal.SIGSTOP)
        with held(tmp_path) as second:
            first.send_signal(signal.SIGCONT)
            assert (
                first.communicate("\n", timeout=20)[0]
                == f"{tmp_path}/run.lock is now held by {second.text}\n"
            )
            assert second.look() == ""


def replaced(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()


@pytest.mark.parametrize(
    ("take_away", "why"),
    [
        (lambda folder: (folder / "run.lock").unlink(), "was deleted"),
        (lambda folder: (folder / "run.lock").write_text("other"), "is now held by other"),
        (shutil.rmtree, "was deleted"),
        (replaced, "was deleted"),
    ],
)
def test_a_lost_folder_is_noticed_by_the_thread_and_nothing_is_done_there(
    tmp_path: Path, take_away: Callable[[Path], None], why: str
) -> None:
    folder = tmp_path / "run"
    with held(folder) as mine:
        take_away(folder)
        before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
        time.sleep(0.5)  # a touch takes place each 0.2 s
        assert mine._why_lost == mine.lost == mine.look() == f"{folder}/run.lock {why}"
        assert mine.is_anothers()
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == before


def test_a_step_looks_itself_when_the_thread_has_not_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of a process that was stopped may come before the thread's next look."""
    monkeypatch.setattr(RunLock, "_beat", lambda *_: None)
    with held(tmp_path) as mine:
        (tmp_path / "run.lock").unlink()
        assert mine.lost == ""
        time.sleep(0.6)
        assert mine.lost == f"{tmp_path}/run.lock was deleted"


def test_a_folder_replaced_by_a_copy_is_lost(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ours = RunLock(run)
    ours.take(lambda text: None)
    run.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", run)
    assert ours.look() == f"{run} was replaced by a copy"
    ours.release()
    assert (run / "run.lock").exists()


def test_a_deleted_lock_frees_the_folder(tmp_path: Path) -> None:
    with held(tmp_path) as first:
        (tmp_path / "run.lock").unlink()
        with held(tmp_path) as second:
            assert first.look() == f"{tmp_path}/run.lock is now held by {second.text}"
            first.release()
            assert second.look() == ""


@pytest.mark.parametrize("left_over", [None, "", '{"host": "elsewhere", "pid": 1}'])
def test_of_many_starts_at_once_one_has_the_folder(tmp_path: Path, left_over: str | None) -> None:
    if left_over is not None:
        (tmp_path / "run.lock").write_text(left_over)
    inside: list[int] = []
    most: list[int] = []
    lost: list[str] = []

    def work(number: int) -> None:
        with held(tmp_path) as mine:
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)
            lost.append(mine.look())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5 and lost == [""] * 5


@pytest.mark.parametrize("when", ["before", "while"])
def test_the_lock_of_a_quicker_start_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """It took the dead run's lock and made its own, before we open the file or while we do."""
    path = tmp_path / "run.lock"
    path.touch()
    holder, quicker = Holder(path), RunLock(tmp_path)
    assert holder.look() == "dead"
    flock = lock._flock

    def take_first(descriptor: int) -> None:
        monkeypatch.setattr(lock, "_flock", flock)
        path.unlink()
        quicker.take(quiet)
        flock(descriptor)

    if when == "while":
        monkeypatch.setattr(lock, "_flock", take_first)
    else:
        path.unlink()
        quicker.take(quiet)
    holder.remove()
    assert quicker.look() == ""
    quicker.release()


@pytest.mark.slow
def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with held(tmp_path) as mine:
        assert [file.name for file in tmp_path.iterdir()] == ["run.lock"] and mine.look() == ""
        assert "is in use by another run" in refused(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(
        UserError, match=r"run\.dir=.*No space left on device; rule: a folder"
    ) as error:
        RunLock(tmp_path).take(quiet)
    assert error.value.code == 70 and list(tmp_path.iterdir()) == []


def test_a_write_of_a_part_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.write
    monkeypatch.setattr(os, "write", lambda file, data: really(file, data[:10]))
    with held(tmp_path) as mine:
        assert (tmp_path / "run.lock").read_text() == mine.text and len(mine.text) > 10


def test_another_node_with_another_folder_is_refused(tmp_path: Path) -> None:
    with held(tmp_path / "one") as mine:
        (tmp_path / "two").mkdir()
        with pytest.raises(
            UserError, match=r"is not the folder that rank 0 sees; rule: one that all nodes share"
        ):
            RunLock(tmp_path / "two").see(mine.text)
        RunLock(tmp_path / "one").see(mine.text)
