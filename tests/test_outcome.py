"""outcome.json: classes, counting of failures, the launchers' questions; and a signal at any time
leads to one stop.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_lm.checkpoint.folder import step_folders, verify
from dist_lm.errors import CODES, DataError, UserError, kind
from dist_lm.outcome import Attempt, read
from dist_lm.stop import Stop
from tests.procs import clean_env, entry, finish, free_port, start_ranks, train
from tests.test_train import losses, tiny, wait_for_step


def saved(run: Path, step: int) -> None:
    (run / f"step-{step:08d}").mkdir(parents=True)
    (run / f"step-{step:08d}/manifest.json").touch()


def test_failures_are_counted_until_there_is_a_new_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    monkeypatch.setenv("DIST_LM_STOP_AT", "1")  # in a job that has an end
    for name, reason, new_step in [
        ("retryable", "gone", 0),
        ("retryable", "gone", 0),
        ("preempted", "SIGTERM", 0),
        ("retryable", "gone", 0),
        ("retryable", "gone", 10),
        ("preempted", "the time of the job ends", 0),
        ("preempted", "SIGUSR1", 20),
        ("done", "", 0),
    ]:
        if new_step:
            saved(tmp_path, new_step)
        counts.append(Attempt(tmp_path).record(name, reason)["failures"])
    assert counts == [1, 2, 2, 3, 1, 2, 0, 0]
    assert read(tmp_path) == {
        "class": "done",
        "step": 20,
        "reason": "",
        "attempt": 8,
        "failures": 0,
    }


def test_every_code_has_its_class() -> None:
    assert [kind(code) for code in CODES.values()] == list(CODES) and kind(1) == "retryable"


def test_an_ending_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise DataError("no such data")

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError):
        Attempt(tmp_path).run(refuse)
    assert read(tmp_path) == {
        "class": "data",
        "step": 0,
        "reason": "no such data",
        "attempt": 1,
        "failures": 0,
    }
    with pytest.raises(SystemExit) as stopped:
        Attempt(tmp_path).run(lambda: "SIGTERM")
    assert stopped.value.code == 75 and read(tmp_path)["class"] == "preempted"
    Attempt(tmp_path).run(lambda: "")
    assert read(tmp_path)["class"] == "done"
    (tmp_path / "file").touch()
    # What cannot be written is a warning, not an error.
    outcome = Attempt(tmp_path / "file" / "run").record("done", "")
    assert outcome["class"] == "done"
    (tmp_path / "outcome.json").write_text("{torn")
    assert read(tmp_path) == {} and Attempt(tmp_path).number == 1


@pytest.mark.slow
def test_a_rank_alone_with_its_refusal_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise UserError("not installed here")

    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError):
        Attempt(tmp_path).run(refuse)
    assert read(tmp_path)["reason"] == "not installed here"
    Attempt(tmp_path, 7).record("done", "")
    with pytest.raises(UserError):
        Attempt(tmp_path, 7).run(refuse)
    assert read(tmp_path)["class"] == "done"  # rank 0 spoke


def test_the_clock_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_LM_STOP_AT", str(time.time() + 100))
    assert not Stop().requested
    monkeypatch.setenv("DIST_LM_STOP_AT", str(time.time() - 1))
    stop = Stop()
    assert stop.requested and stop.reason == "the time of the job ends"
    monkeypatch.delenv("DIST_LM_STOP_AT")
    assert not Stop().requested


@pytest.mark.slow
def test_what_launchers_ask(tmp_path: Path) -> None:
    run = ["--run.dir", str(tmp_path)]
    assert "rule: before ARGUMENTS, or after NUMBER CODE ARGUMENTS" in entry(
        "outcome", "again", *run, code=2
    )
    assert entry("outcome", "before", *run) == f"1 {tmp_path}\n"
    assert "did you mean --run.steps?" in entry("outcome", "before", "--run.stepps", "3", code=2)
    said = entry("outcome", "after", "1", "137", *run, code=70)
    assert said == f"{tmp_path}: retryable at step 0, attempt 1: no rank said why (exit code 137)\n"
    assert entry("outcome", "before", *run) == f"2 {tmp_path}\n"
    record = {"class": "retryable", "step": 0, "reason": "gone", "attempt": 3, "failures": 3}
    (tmp_path / "outcome.json").write_text(json.dumps(record))
    said = entry("outcome", "after", "3", "1", *run, code=1)
    assert "failed 3 times without a new step; not started again" in said
    (tmp_path / "outcome.json").write_text(
        json.dumps({**record, "class": "diverged", "failures": 0})
    )
    entry("outcome", "after", "3", "1", *run, code=76)


def quiet(text: str) -> None:
    pass


@pytest.mark.slow
def test_only_who_holds_the_folder_writes_its_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused start tells its own launch script, whose number may be that of the run that lives
    there.
    """

    def refuse() -> str:
        raise UserError("in use by another run")

    monkeypatch.setenv("RANK", "0")
    run = ["--run.dir", str(tmp_path)]
    first = Attempt(tmp_path, 1)
    first.lock.take(quiet)
    for rank in ("0", "1"):  # each on a node of its own, with its own launch script
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("DIST_LM_START_ID", f"node{rank}-12/../3")
        began = time.monotonic()
        with pytest.raises(UserError):
            Attempt(tmp_path, 1).run(refuse)
        assert time.monotonic() - began < 2  # rank 1 waits for nobody
        assert {file.name for file in tmp_path.iterdir()} == {
            "run.lock",
            f".refused-node{rank}-12_.._3.json",
        }
        said = entry(
            "outcome", "after", "1", "1", *run, code=2, DIST_LM_START_ID=f"node{rank}-12/../3"
        )
        assert said == f"{tmp_path}: config at step 0, attempt 1: in use by another run\n"
    # Killed while it waited.
    said = entry("outcome", "after", "1", "137", *run, code=70, DIST_LM_START_ID="other")
    assert "no rank said why" in said
    assert {file.name for file in tmp_path.iterdir()} == {"run.lock"}

    monkeypatch.setenv("RANK", "0")
    first.run(lambda: "")
    assert read(tmp_path)["class"] == "done" and {file.name for file in tmp_path.iterdir()} == {
        "outcome.json"
    }


def test_the_lock_is_held_until_the_ending_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    attempt = Attempt(tmp_path)
    record = attempt.record

    def refuse() -> str:
        attempt.lock.take(quiet)
        raise DataError("no such data")

    def record_while_held(kind: str, reason: str) -> dict[str, object]:
        assert (tmp_path / "run.lock").exists()
        return record(kind, reason)

    monkeypatch.setattr(attempt, "record", record_while_held)
    with pytest.raises(UserError, match="no such data"):
        attempt.run(refuse)
    assert read(tmp_path)["class"] == "data" and not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("taken", [True, False])
def test_a_run_that_lost_its_folder_records_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """Deleted or another's; all ranks know it, and the launch script does not start it again."""
    monkeypatch.setenv("DIST_LM_START_ID", "first")
    folder = tmp_path / "run"
    attempts = [Attempt(folder, 1) for _ in range(2)]
    text = attempts[0].lock.take(quiet)
    attempts[1].lock.see(text)
    if taken:
        (folder / "run.lock").write_text("another's")
    else:
        shutil.rmtree(folder)

    def end() -> str:
        raise UserError("no longer this run's")

    for rank, attempt in enumerate(attempts):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(UserError):
            attempt.run(end)
        assert not (folder / "outcome.json").exists()
    entry("outcome", "after", "1", "1", "--run.dir", str(folder), code=2, DIST_LM_START_ID="first")
    assert folder.exists() == taken and not (folder / "outcome.json").exists()


@pytest.mark.slow
def test_a_dead_run_s_lock_stops_nobody_from_recording(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "run.lock").write_text(json.dumps({"host": socket.gethostname(), "pid": ended.pid}))
    entry(
        "outcome",
        "after",
        "1",
        "137",
        "--run.dir",
        str(tmp_path),
        code=70,
        DIST_LM_START_ID="first",
    )
    assert (read(tmp_path)["class"], read(tmp_path)["attempt"]) == ("retryable", 1)


def handles(pid: int, number: signal.Signals) -> bool:
    caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["start", "evaluation", "save"])
def test_a_signal_in_any_phase_leads_to_one_agreed_stop(
    prepared: Path, tmp_path: Path, phase: str
) -> None:
    """Each phase fills nearly all of the time; one rank alone is told."""
    run = tmp_path / "run"
    often = {
        "start": (),
        "evaluation": ("--run.eval_every", "1"),
        "save": ("--run.save_every", "1"),
    }[phase]
    arguments = tiny(prepared, "--run.steps", "100000", *often)
    ranks = start_ranks(2, "dist_lm/train.py", "--run.dir", str(run), *arguments)
    deadline = time.monotonic() + 90
    while not (
        handles(ranks[1].pid, signal.SIGUSR1)
        if phase == "start"
        else (run / "metrics.jsonl").exists()
    ):
        if time.monotonic() > deadline:
            ranks[0].kill()
            ranks[1].kill()
        assert [rank.poll() for rank in ranks] == [None, None]
        time.sleep(0.001)
    ranks[1].send_signal(signal.SIGUSR1)
    code, output = finish(ranks, 90)
    assert code == 75, output
    ended = read(run)
    assert ended["class"] == "preempted" and "another rank was told to stop" in ended["reason"]
    if phase == "start":
        assert step_folders(run) == [] and ended["step"] == 0
    else:
        last = step_folders(run)[-1]
        verify(last)
        assert int(last.name[5:]) == ended["step"] == losses(run)[-1]["step"]


@pytest.mark.slow
def test_a_diverged_run_and_a_finished_one_say_so(prepared: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", *tiny(prepared, "--optim.lr", "1e30", "--optim.clip", "0"), code=76)
    assert (
        read(tmp_path / "run")["class"] == "diverged"
        and "diverged at step" in read(tmp_path / "run")["reason"]
    )
    train(tmp_path / "other", *tiny(prepared))
    train(tmp_path / "other", *tiny(prepared))
    assert read(tmp_path / "other") == {
        "class": "done",
        "step": 12,
        "reason": "",
        "attempt": 2,
        "failures": 0,
    }


@pytest.mark.slow
@pytest.mark.parametrize("taken", [True, False])
def test_ranks_that_cannot_meet_say_why(prepared: Path, tmp_path: Path, taken: bool) -> None:
    """Rank 0 of two alone, its port taken or not."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1] if taken else free_port()
        place = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
        }
        arguments = tiny(prepared, "--run.timeout_seconds", "3")
        output = train(tmp_path / "run", *arguments, code=70, **place, MASTER_PORT=str(port))
    if taken:
        assert (
            f"error: port 127.0.0.1:{port} is in use by another process; rule: a free one" in output
        )
    else:
        assert (
            f"error: only 1 of 2 processes met at 127.0.0.1:{port} within 3 s; is every node up"
            in output
        )
    assert (
        read(tmp_path / "run")["class"] == "retryable"
        and "127.0.0.1" in read(tmp_path / "run")["reason"]
    )


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_ends_the_others_in_time(
    prepared: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = tiny(prepared, "--run.steps", "100000", "--run.timeout_seconds", "10")
    ranks = start_ranks(2, "dist_lm/train.py", "--run.dir", str(run), *arguments)
    try:
        wait_for_step(run, 3, ranks)
        ranks[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        code = ranks[0].wait(40)
        assert code == 70 and time.monotonic() - began < 20
    finally:
        ranks[1].kill()
        ranks[0].kill()
    output = "".join(rank.communicate()[0] for rank in ranks)
    named = f"nothing heard for 8 s of rank 1 on {socket.gethostname()}"
    assert f"error: rank 0 on {socket.gethostname()} ends: {named}" in output
    assert (read(run)["class"], read(run)["reason"]) == ("retryable", named)


LATE = """
import sys, time
from pathlib import Path
from dist_lm.outcome import Attempt

class Late:
    def __del__(self):
        print("leaving", flush=True)
        time.sleep(2)

attempt = Attempt(Path(sys.argv[1]))
attempt.listen()
late = Late()  # is deleted when Python has put back its own handlers
attempt.run(lambda: sys.argv[2])
"""


@pytest.mark.parametrize(("reason", "code"), [("", 0), ("SIGUSR1", 75)])
def test_a_signal_at_the_very_end_does_not_change_the_code(
    tmp_path: Path, reason: str, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LATE, str(tmp_path), reason],
        cwd=Path(__file__).parents[1],
        env=clean_env(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "leaving\n"
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == code
