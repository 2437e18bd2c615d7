"""run.exact on real processes: one hash of all tensors, however a run is spread and interrupted."""

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_lm.checkpoint.state import read_state
from dist_lm.cli import resolve
from dist_lm.config import Config
from dist_lm.errors import UserError
from dist_lm.resume import refuse_other_mathematics
from dist_lm.show import main as show
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


def figures(run: Path) -> list[list[str]]:
    keys = ("step", "loss", "grad_norm", "tokens", "grad_hash", "unit_hashes")
    return [[repr(line[key]) for key in keys] for line in losses(run)]  # NaN is not NaN


def weights_hash(step: Path) -> str:
    return str(read_state(step)["weights_hash"])


@pytest.mark.slow
def test_one_hash_on_any_number_of_processes(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    show([str(tmp_path / "one"), "--step", "1", "--world", "3"])
    ranks = re.findall(r"^place \d+, rank (\d)", capsys.readouterr().out, re.MULTILINE)
    assert "".join(ranks) == "0011220011220"


@pytest.mark.parametrize("name", ["data.micro_batch", "run.compile", "run.exact"])
def test_what_decides_bits_stays_when_a_run_goes_on(name: str) -> None:
    """The unit, the kernels and the mode itself. Other runs may change the first two."""
    settings = {"data.micro_batch": 2, "run.exact": True}
    config = resolve(("test", settings))
    refuse_other(config, resolve(("test", settings | {"data.workers": 3})))
    other = resolve(
        ("test", settings | {name: {"data.micro_batch": 4}.get(name, name == "run.compile")})
    )
    with pytest.raises(UserError, match=rf"started with other settings \({name}: "):
        refuse_other(config, other)
    plain = resolve(("test", {"data.micro_batch": 2}))
    if name == "run.exact":
        facts = {"config": {"run": {}}, "data": ""}  # of a version without that setting
        with pytest.raises(UserError, match=r"\(run.exact: False -> True\)"):
            refuse_other_mathematics(None, config, DATA, facts, [])  # type: ignore[arg-type]
    else:
        changed = resolve(
            ("test", {"data.micro_batch": 2} | {name: 1 if "micro" in name else True})
        )
        refuse_other(plain, changed)


DATA: Any = SimpleNamespace(identity="")


def refuse_other(before: Config, after: Config) -> None:
    facts = {"config": before.model_dump(mode="json"), "data": ""}
    refuse_other_mathematics(None, after, DATA, facts, [])  # type: ignore[arg-type] # says nothing
