"""File operations: a kill, an error, a short write or a delay at one of them.

The short form tries a sample of all faults, the campaign all of them.
"""

from pathlib import Path

import pytest

from tests.faults.operations import enumerate_faults
from tests.faults.rows import linked

# Every n-th fault is tried. 9 divides none of these numbers, so that all kinds come round.
SAMPLE = {"save": 11, "prepare": 17, "cache": 4, "lock": 7, "outcome": 7, "run": 1009}
WORKS = {
    "save": "writing a checkpoint and deleting an older one",
    "prepare": "preparing text into shards",
    "cache": "copying remote shards into a cache that has room for one",
    "lock": "taking and releasing a run folder",
    "outcome": "recording how a run ended",
    "run": "a whole run: lock, evaluation, samples, checkpoints, outcome, picture",
}
for name, work in WORKS.items():
    linked(
        f"file operations of {name}",
        test=f"tests/faults/test_file_operations.py::test_it_can_be_interrupted[{name}]",
        fault=f"a kill, EIO, ESTALE, ENOSPC, EROFS, a short write or a delay in {work}",
        must="nothing is lost; an error is one line; the same command again ends in the same bytes"
        " and leaves no file behind",
    )


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SAMPLE)
def test_it_can_be_interrupted(shim_library: Path, scenario: str) -> None:
    result = enumerate_faults(shim_library, scenario, "--every", str(SAMPLE[scenario]))
    assert result.counts["tried"] >= 3
    assert result.found == ()


linked(
    "a disk that is full in a save",
    test="tests/checkpoint/test_checkpoint.py::test_a_full_disk_leaves_the_older_checkpoint",
    fault="ENOSPC while tensors are written",
    must="the older checkpoint stays, the new one leaves nothing behind, one line says so",
)
linked(
    "one of several ranks cannot write",
    test="tests/checkpoint/test_checkpoint.py"
    "::test_one_rank_that_cannot_write_fails_all_and_the_next_save_is_whole",
    fault="an error on one rank while all write a checkpoint",
    must="all ranks get the same error, and the next checkpoint is whole",
)
