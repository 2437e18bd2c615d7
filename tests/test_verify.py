"""Verify replays a run and finds planted faults: each in a rank of its own, at one step or from
there on.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_lm import loop, optim
from dist_lm.cli import load
from dist_lm.data.batches import Batch, Batches
from dist_lm.model.gpt import ACTIVATIONS
from dist_lm.outcome import TRAIN, Attempt
from dist_lm.replay import Step, differences
from dist_lm.runtime.exact import ExactEngine
from dist_lm.verify import main
from tests.procs import entry, finish, start_ranks, train
from tests.test_exact import exact

# Seven units: rank 0 has 0, 2, 4 and 6, and rank 1 has 1, 3 and 5.
HASHED = ["--run.log_unit_hashes", "true", "--run.keep_every", "4", "--run.save_every", "4"]


def folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path).encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


@pytest.mark.slow
def test_a_healthy_run_is_equal_on_another_number_of_processes(
    prepared: Path, tmp_path: Path
) -> None:
    """And nothing is written into its folder."""
    run = tmp_path / "run"
    train(run, *exact(prepared, *HASHED, "--model.dropout", "0.1"), world=2)
    before = folder_hash(run)
    output = entry("verify", str(run), "--step", "6", "--to", "12", "--units")
    assert f"equal: steps 6 to 12 are to the last bit what {run} recorded\n" in output
    assert "from step-00000004, on 1 process\n" in output
    assert folder_hash(run) == before


@pytest.mark.campaign
@pytest.mark.slow
def test_several_processes_replay_a_run_of_one(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, *exact(prepared))
    before = folder_hash(run)
    words = ("-m", "dist_lm.verify", str(run), "--step", "2")
    code, output = finish(start_ranks(3, *words))
    assert code == 0 and output.count("equal: step 2 is to the last bit") == 1, output
    assert "from the beginning, on 3 processes\n" in output
    assert folder_hash(run) == before


# --- planted faults


def flip(tensor: Tensor, bit: int = 20) -> None:
    with torch.no_grad():
        tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << bit)


def plant_in_gradient(step: int) -> None:
    take = ExactEngine._take

    def flipped(engine: ExactEngine, parameter: nn.Parameter) -> None:
        is_due = engine.steps_made == step - 1 and engine._unit == 3  # type: ignore[attr-defined]
        if is_due and parameter is engine._trainable[2]:
            assert parameter.grad is not None
            flip(parameter.grad)
        take(engine, parameter)

    ExactEngine._take = flipped  # type: ignore[assignment, method-assign]


def plant_in_weights(step: int) -> None:
    update = ExactEngine.update

    def flipped(engine: ExactEngine) -> Tensor:
        norm = update(engine)
        if engine.steps_made == step - 1:  # type: ignore[attr-defined]
            flip(engine._trainable[2])
        return norm

    ExactEngine.update = flipped  # type: ignore[method-assign]


def plant_in_sum(step: int) -> None:
    finish_exchange = ExactEngine._finish_exchange

    def flipped(engine: ExactEngine) -> None:
        finish_exchange(engine)
        if engine.steps_made == step - 1:  # type: ignore[attr-defined]
            engine.sums.sums_RC[0, 0] ^= 1 << 40

    ExactEngine._finish_exchange = flipped  # type: ignore[method-assign]


def plant_in_data(step: int) -> None:
    read = Batches.read

    def flipped(batches: Batches, number: int) -> Batch:
        batch = read(batches, number)
        if number == step - 1:
            batch.micros[1].tokens_BT[0, 5] ^= 1
        return batch

    Batches.read = flipped  # type: ignore[method-assign]


def plant_in_rate(step: int) -> None:
    set_lr = optim.set_lr

    def other(optimizer: torch.optim.Optimizer, lr: float) -> None:
        made = int(next(iter(optimizer.state.values()))["step"])
        set_lr(optimizer, lr * (1 + 1e-6 * (made == step - 1)))

    loop.set_lr = other


def plant_in_kernels(step: int) -> None:
    """As another version of a library would compute: right, but rounded otherwise."""

    def other(x: Tensor) -> Tensor:
        return (x.double() * torch.sigmoid(x.double())).float()

    ACTIVATIONS["swiglu"] = other


PLANTS: dict[str, Callable[[int], None]] = {
    "gradient": plant_in_gradient,
    "weights": plant_in_weights,
    "sum": plant_in_sum,
    "data": plant_in_data,
    "rate": plant_in_rate,
    "kernels": plant_in_kernels,
}


def train_with(fault: str, who: str, step: str, *words: str) -> None:
    """As a rank: train, with a fault in the ranks of these numbers."""
    config, _ = load(list(words), TRAIN)
    count_steps()
    attempt = Attempt(Path(config.run.dir))

    if os.environ["RANK"] in who.split():
        PLANTS[fault](int(step))
    loop.run_to_end(config, attempt)


def count_steps() -> None:
    """Give engines the number of updates made."""
    ExactEngine.steps_made = 0  # type: ignore[attr-defined]
    update = ExactEngine.update

    def counted(engine: ExactEngine) -> Tensor:
        norm = update(engine)
        engine.steps_made += 1  # type: ignore[attr-defined]
        return norm

    ExactEngine.update = counted  # type: ignore[method-assign]


def found_in(prepared: Path, run: Path, fault: str, who: str, step: int) -> list[str]:
    """What verify finds in a run of two ranks, in which some have a fault."""
    words = ["--run.dir", str(run), *exact(prepared, *HASHED)]
    listed = ", ".join(map(repr, (fault, who, str(step), *words)))
    code = f"from tests import test_verify; test_verify.train_with({listed})"
    got, output = finish(start_ranks(2, "-c", code))
    assert got == 0, output
    words = ["--step", "2", "--to", "12", "--units"]
    output = entry("verify", str(run), *words, code=1)
    return [line for line in output.splitlines() if not line.startswith("replaying")]


@pytest.mark.slow
def test_it_names_the_rank_with_a_flipped_bit_of_a_gradient(prepared: Path, tmp_path: Path) -> None:
    found = found_in(prepared, tmp_path / "run", "gradient", "1", 6)
    assert re.fullmatch(
        r"step 6 differs: the gradient had the hash \w{16}, and has \w{16}", found[0]
    )
    assert found[1:2] == ["step 6 differs: of 7 units, 3 do, which rank 1 of 2 computed"]
    assert re.match(r"step-00000008: \d+ of \d+ tensors differ, the first: embed.weight ", found[2])


@pytest.mark.campaign
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "who", "expected"),
    [
        ("weights", "1", "step 6 differs: of 7 units, 1, 3, 5 do, which rank 1 of 2 computed"),
        ("weights", "0", "step 6 differs: of 7 units, 0, 2, 4, 6 do, which rank 0 of 2 computed"),
        ("sum", "0", "step 6 differs: no unit differs, so the sum was wrong: the exchange"),
        ("data", "1", "step 6 differs: of 7 units, 3 do, which rank 1 of 2 computed"),
        ("rate", "0 1", "step 7 differs: all 7 units do: the weights did on all ranks"),
        ("kernels", "1", "step 1 differs: of 7 units, 1, 3, 5 do, which rank 1 of 2 computed"),
    ],
)
def test_it_finds_each_planted_fault(
    prepared: Path, tmp_path: Path, fault: str, who: str, expected: str
) -> None:
    found = found_in(prepared, tmp_path / "run", fault, who, 6)
    print(fault, who, found)
    assert found[1].startswith(expected), found


def test_it_says_what_differs() -> None:
    recorded = Step(lr=0.1, grad_hash="a", batch_hash="c", unit_hashes=["1", "2"], world_size=2)
    assert differences(3, recorded, recorded) == []
    assert differences(3, None, recorded) == []
    made = Step(lr=0.2, grad_hash="a", batch_hash="d")
    assert differences(3, recorded, made) == [
        "step 3 differs: the rate was 0.1, and is 0.2 here",
        "step 3 differs: the data was other: the hashes of its batch differ",
    ]
    made = Step(lr=0.1, grad_hash="b", unit_hashes=["1", "2"])
    assert "no unit differs, so the sum was wrong" in differences(3, recorded, made)[1]
    made = Step(lr=0.1, grad_hash="b", unit_hashes=["1"])
    assert "has no hashes of units" in differences(3, recorded, made)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--step=unset: rule: "),
        (["--step", "3", "--to", "2"], r"--to=2 must be at least --step=3; nearest: 3"),
        (["--step", "1"], "was trained with run.exact=false"),
        (["--step", "1", "--units"], "--units=true compares hashes of units"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    is_exact = "--units" in words
    settings: dict[str, Any] = {"run": {"exact": is_exact}, "data": {"micro_batch": 1}}
    (tmp_path / "config.yaml").write_text(str(settings))
    with pytest.raises(ValueError, match=message):
        main([str(tmp_path), *words])
