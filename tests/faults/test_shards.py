"""Token shards that were damaged, and files of text that are."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.faults.rows import linked, row
from tests.procs import finish, start_ranks, train
from tests.test_train import tiny


def overwrite(folder: Path, value: int) -> None:
    """Other tokens in a shard of the same size."""
    shard = folder / "train-00000.safetensors"
    data = bytearray(shard.read_bytes())
    middle = len(data) // 2 // 2 * 2
    data[middle : middle + 10_000] = np.full(5_000, value, "<u2").tobytes()
    shard.write_bytes(data)


@row(
    "damaged token shards",
    fault="10 kB of a shard are overwritten while the run is stopped: with other tokens, or with"
    " ids beyond the vocabulary",
    must="it is seen before they are trained on, and the run ends as `data`",
)
@pytest.mark.parametrize("value", [7, 60_000], ids=["other tokens", "beyond the vocabulary"])
def test_damaged_shards_are_not_trained_on(prepared: Path, tmp_path: Path, value: int) -> None:
    shards = shutil.copytree(prepared, tmp_path / "shards")
    words = tiny(shards, "--run.steps", "200", "--run.save_every", "2")
    train(tmp_path / "run", *words, "--run.stop_after", "2")
    overwrite(shards, value)
    command = ["dist_lm/train.py", "--run.dir", str(tmp_path / "run"), *words]
    code, printed = finish(start_ranks(1, *command))
    assert code == 65, printed


for fault, test in {
    "a manifest of a prepared folder that was edited": "test_a_manifest_that_was_edited",
    "a shard that was edited": "test_a_shard_that_was_edited",
}.items():
    linked(
        fault,
        test=f"tests/data/test_hostile.py::{test}",
        fault="names that lead out, numbers without end, other types, cut headers",
        must="it is refused in one line; only files of the folder are opened",
    )
linked(
    "a hostile prepared folder at a URL",
    test="tests/data/test_hostile.py::test_a_hostile_url_touches_nothing_outside_the_cache",
    fault="hashes and names that lead to files of the user, beside a tree of canaries",
    must="nothing outside of the cache is made, changed or deleted",
)
linked(
    "bad rows of a JSON array",
    test="tests/data/test_formats.py::test_documents_and_bad_rows_of_an_array_are_its_rows",
    fault="bad escapes, deep nesting and endless numbers, with bad_rows=skip",
    must="documents and counted rows together are all rows",
)
linked(
    "a packed file",
    test="tests/data/test_formats.py::test_bad_input_is_refused_by_file_and_row",
    fault="files that are cut, of another format or not UTF-8",
    must="file and row are named in one line",
)
