"""Long measurements, run by hand; their figures are under benchmarks/results/.

pytest -m campaign -s tests/test_campaign.py
"""

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.procs import finish, start_ranks, train
from tests.runtime.test_zero import spread
from tests.test_train import losses, tensors, tiny, wait_for_step

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600)]


def worst(run: Path, other: Path, first_step: int = 1) -> tuple[float, float]:
    """Largest relative difference of loss and of gradient norm; the batches must be the same."""
    a, b = ([s for s in losses(r) if s["step"] >= first_step] for r in (run, other))
    assert [s["batch_hash"] for s in a] == [s["batch_hash"] for s in b] != []
    return tuple(
        max(abs(x[k] - y[k]) / abs(y[k]) for x, y in zip(a, b, strict=True))
        for k in ("loss", "grad_norm")
    )  # type: ignore[return-value]


def report(what: str, figures: tuple[float, float]) -> None:
    print(f"| {what} | {figures[0]:.1e} | {figures[1]:.1e} |", flush=True)
    assert max(figures) < 1e-5


@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
def test_parity_table(prepared: Path, tmp_path: Path, dropout: str) -> None:
    print(f"\n50 steps, fp32, AdamW at a peak of 1e-3, dropout {dropout}, against one process:")
    common = tiny(prepared, "--run.steps", "50", "--model.dropout", dropout)
    train(tmp_path / "one", *common)
    for world in (1, 2, 3, 4):
        for micro in (8, 4, 2):
            if micro * world > 8 or (world, micro) == (1, 8):
                continue
            name = f"{world} processes, micro-batch {micro}"
            train(tmp_path / name, *common, "--data.micro_batch", str(micro), world=world)
            report(name, worst(tmp_path / name, tmp_path / "one"))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 3), (3, 1), (4, 1), (2, 3)])
def test_resumed_on_another_number(prepared: Path, tmp_path: Path, before: int, after: int) -> None:
    common = tiny(prepared, "--run.steps", "100", "--model.dropout", "0.1")
    train(tmp_path / "whole", *common, world=before)
    train(tmp_path / "moved", *common, "--run.stop_after", "50", world=before)
    train(tmp_path / "moved", *common, world=after)
    report(
        f"resumed on {after} instead of {before}, next 50 steps",
        worst(tmp_path / "moved", tmp_path / "whole", 51),
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_killed_at_random_steps(prepared: Path, tmp_path: Path, world: int) -> None:
    common = tiny(prepared, "--run.steps", "60", "--run.save_every", "5", "--model.dropout", "0.1")
    train(tmp_path / "whole", *common, world=world)
    rng, kills = random.Random(world), []
    for _ in range(4):  # kills of one run, one after another
        step = rng.randint(max(kills, default=0) + 1, 50)
        ranks = start_ranks(
            world, "dist_lm/train.py", "--run.dir", str(tmp_path / "killed"), *common
        )
        wait_for_step(tmp_path / "killed", step, ranks)
        ranks[rng.randrange(world)].send_signal(signal.SIGKILL)
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
        finish(ranks)
        kills.append(losses(tmp_path / "killed")[-1]["step"])
        if kills[-1] >= 48:
            break
    train(tmp_path / "killed", *common, world=world)
    a, b = (tensors(tmp_path / run / "step-00000060") for run in ("killed", "whole"))
    different = [name for name in a if not torch.equal(a[name], b[name])]
    figures = f"{len(a)} tensors | {len(different)} differ"
    print(f"| {world} processes, SIGKILL after steps {kills} | {figures} |", flush=True)
    assert different == []


STRATEGIES = [
    ("ddp", 2),
    ("ddp", 4),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3", 3),
    ("zero3", 4),
    ("zero2-offload", 2),
]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "sgd"])
@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
def test_strategies_table(prepared: Path, tmp_path: Path, dropout: str, optimizer: str) -> None:
    print(
        f"\n50 steps, fp32, {optimizer} at a peak of 1e-3, dropout {dropout}, against one process:"
    )
    common = tiny(
        prepared, "--run.steps", "50", "--model.dropout", dropout, "--optim.name", optimizer
    )
    train(tmp_path / "one", *common)
    for strategy, world in STRATEGIES:
        if optimizer == "adamw" or "offload" not in strategy:
            spread(tmp_path / f"{strategy}-{world}", strategy, world, *common)
            report(
                f"{strategy} x {world}", worst(tmp_path / f"{strategy}-{world}", tmp_path / "one")
            )


def test_strategies_in_bf16(prepared: Path, tmp_path: Path) -> None:
    print(
        "\n50 steps, bf16, AdamW at a peak of 1e-3, dropout 0.1, against one process in bf16"
        " (loss alone is held):"
    )
    common = tiny(
        prepared, "--run.steps", "50", "--model.dropout", "0.1", "--run.precision", "bf16"
    )
    train(tmp_path / "one", *common)
    for strategy, world in STRATEGIES:
        spread(tmp_path / f"{strategy}-{world}", strategy, world, *common)
        loss, norm = worst(tmp_path / f"{strategy}-{world}", tmp_path / "one")
        print(f"| {strategy} x {world} | {loss:.1e} | {norm:.1e} |", flush=True)
        assert loss < 1e-3


def test_chain_with_adamw(prepared: Path, tmp_path: Path) -> None:
    common = tiny(prepared, "--run.steps", "50", "--model.dropout", "0.1")
    train(tmp_path / "one", *common)
    for part, (strategy, world) in enumerate(
        [("single", 1), ("zero3", 4), ("zero1", 2), ("ddp", 2), ("zero2", 4)], 1
    ):
        spread(tmp_path / "chain", strategy, world, *common, "--run.stop_after", str(10 * part))
    report(
        "single, zero3 x 4, zero1 x 2, ddp x 2, zero2 x 4",
        worst(tmp_path / "chain", tmp_path / "one"),
    )


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "strategy", ["ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"]
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_in_place(
    prepared: Path, tmp_path: Path, strategy: str, world: int, optimizer: str
) -> None:
    if "offload" in strategy and optimizer != "adamw":
        pytest.skip("refused by name")
    common = tiny(
        prepared,
        "--model.dropout",
        "0.1",
        "--optim.name",
        optimizer,
        "--run.save_every",
        "5",
        "--run.keep_last",
        "3",
    )
    spread(tmp_path / "whole", strategy, world, *common)
    shutil.copytree(tmp_path / "whole/step-00000005", tmp_path / "again/step-00000005")
    spread(tmp_path / "again", strategy, world, *common)
    a, b = (tensors(tmp_path / run / "step-00000012") for run in ("again", "whole"))
    different = [name for name in a if not torch.equal(a[name], b[name])]
    print(
        f"| {strategy} x {world}, {optimizer} | {len(a)} tensors | {len(different)} differ |",
        flush=True,
    )
    assert different == []
