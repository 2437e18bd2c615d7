"""run.exact on real processes: one hash of all tensors, however a run is spread and interrupted."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from dist_lm.checkpoint.state import read_state
from tests.procs import train
from tests.test_train import losses, tensors, tiny

# 13 sequences are seven units, the last of which has one row to fill it up.
EXACT = ["--run.exact", "true", "--data.micro_batch", "2", "--data.global_batch", "13"]


def exact(prepared: Path, *more: str) -> list[str]:
    return tiny(prepared, *EXACT, *more)


def sha(step: Path) -> str:
    """One hash of all weights and moments."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors(step).items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def figures(run: Path) -> list[list[Any]]:
    keys = ("step", "loss", "grad_norm", "tokens", "grad_hash", "unit_hashes")
    return [[line[key] for key in keys] for line in losses(run)]


def weights_hash(step: Path) -> str:
    return str(read_state(step)["weights_hash"])


@pytest.mark.slow
def test_one_hash_on_any_number_of_processes(prepared: Path, tmp_path: Path) -> None:
    """Alone, and begun by three and ended by two; with dropout, an average and document masks."""
    words = ["--run.ema", "0.9", "--model.dropout", "0.1", "--data.document_mask", "true"]
    words += ["--run.eval_every", "6", "--run.eval_batches", "2", "--run.log_unit_hashes", "true"]
    words = exact(prepared, *words)
    train(tmp_path / "one", *words)
    train(tmp_path / "many", *words, "--run.stop_after", "6", "--data.workers", "0", world=3)
    train(tmp_path / "many", *words, "--data.workers", "3", world=2)
    step = "step-00000012"
    assert sha(tmp_path / "one" / step) == sha(tmp_path / "many" / step)
    assert figures(tmp_path / "one") == figures(tmp_path / "many")
    assert weights_hash(tmp_path / "one" / step) == weights_hash(tmp_path / "many" / step)
    last = losses(tmp_path / "one")[-1]
    assert len(last["unit_hashes"]) == 7
    total = sum(int(digits, 16) for digits in last["unit_hashes"])
    assert int(last["grad_hash"], 16) == total % 2**64


@pytest.mark.slow
def test_what_decides_bits_stays(prepared: Path, tmp_path: Path) -> None:
    """The unit, the kernels and the mode itself."""
    train(tmp_path / "run", *exact(prepared, "--run.stop_after", "1"))
    for name, value in (
        ("data.micro_batch", "1"),
        ("run.compile", "true"),
        ("run.exact", "false"),
    ):
        output = train(tmp_path / "run", *exact(prepared, f"--{name}", value), code=2)
        assert f"was started with other settings ({name}: " in output
