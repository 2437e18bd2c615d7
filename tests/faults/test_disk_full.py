"""A disk that is full: a real one, in memory, with room for so many checkpoints."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_lm.checkpoint.folder import newest_valid
from tests.faults.operations import STATE, TRACEBACK, enumerate_faults
from tests.faults.rows import row
from tests.procs import finish, start_ranks
from tests.test_train import tiny

CHECKPOINT_BYTES = 520_000  # of the model of these tests, rounded up


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for two checkpoints and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={5 * CHECKPOINT_BYTES // 2}"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@row(
    "a disk with room for the checkpoints that stay, and not for one more",
    fault="the disk has room for two checkpoints and a half, and two are to be kept",
    must="the run goes on with fewer old ones, never below one that is valid",
)
def test_saving_goes_on_with_fewer_old_ones(prepared: Path, small_disk: Path) -> None:
    flags = ["--run.save_every", "2", "--run.keep_last", "2", "--run.steps", "8"]
    run = small_disk / "run"
    code, printed = finish(
        start_ranks(1, "dist_lm/train.py", "--run.dir", str(run), *tiny(prepared, *flags))
    )
    newest, _ = newest_valid(run)
    assert code == 0, printed
    assert newest is not None and newest.name == "step-00000008"


@pytest.mark.slow
@row(
    "a disk that is full at an evaluation",
    fault="samples.md cannot be opened or written: EIO, ESTALE, ENOSPC, EROFS",
    must="the run does not end in a traceback",
)
def test_samples_that_cannot_be_written(shim_library: Path) -> None:
    words = ["--only", "samples.md", "--first", "2", "--every", "2", "--most", "2"]
    result = enumerate_faults(shim_library, "run", *words)
    assert result.counts["tried"] == 2
    assert result.wrong(STATE) == []
    assert result.wrong(TRACEBACK) == []
