"""Standard streams that are gone, and a storm of signals."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.faults.rows import linked, row
from tests.procs import PIPE, Process, start_ranks
from tests.test_train import tiny, wait_for_step


@row(
    "a run that prepares its text, and nobody reads what it prints",
    fault="standard output is a closed pipe or a full disk from the first line on",
    must="the run trains to its end",
)
@pytest.mark.parametrize("where", ["closed pipe", "full disk"])
def test_training_needs_no_standard_output(where: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a line of text\n" * 2000)
    out = PIPE
    if where == "full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    words = ["dist_lm/train.py", "--run.dir", str(tmp_path / "run")]
    words += tiny(tmp_path / "text.txt", "--run.steps", "2", "--data.tokenizer", "byte")
    process = Process([sys.executable, *words], stdout=out, stderr=PIPE)
    if process.stdout:
        process.stdout.close()
    _, errors = process.communicate(timeout=240)
    if where == "full disk":
        os.close(out)
    assert process.returncode == 0, errors
    assert (tmp_path / "run/step-00000002").is_dir()
    assert "Traceback" not in errors


@row(
    "a storm of signals",
    fault="SIGTERM every few milliseconds, from the third step to the end of the process",
    must="one checkpoint, and the exit code of a run that was told to stop",
)
def test_a_storm_of_signals(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = tiny(prepared, "--run.steps", "100000")
    (rank,) = start_ranks(1, "dist_lm/train.py", "--run.dir", str(run), *words)
    wait_for_step(run, 3, [rank])
    deadline = time.monotonic() + 120
    while rank.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            rank.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    rank.kill()
    printed, _ = rank.communicate()
    assert rank.returncode == 75, printed
    assert len(list(run.glob("step-*"))) == 1


linked(
    "standard output that goes away in a run",
    test="tests/test_metrics.py::test_training_outlives_its_standard_output",
    fault="a closed pipe, a full disk or a closed descriptor",
    must="training goes on, and a warning says so",
)
