"""Too little memory on a device is one line, which names the flags that fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lm import loop
from dist_lm.cli import load
from dist_lm.errors import run_entry
from dist_lm.outcome import TRAIN, read
from dist_lm.planning import shortage
from dist_lm.planning.memory import memory
from dist_lm.runtime.strategy import choose_strategy
from dist_lm.train import main
from tests.procs import finish, start_ranks
from tests.test_train import tiny

CPU = torch.device("cpu")


def bytes_of(micro_batch: int, *argv: str) -> float:
    """What plan says that a process of two takes at a micro-batch, on a CPU."""
    config, _ = load([*argv, "--data.micro_batch", str(micro_batch)], TRAIN)
    figures = memory(config, choose_strategy("ddp"), 2, vocab_size=257, on_gpu=False)
    return figures.peak + figures.host + figures.saving


def explain(monkeypatch: pytest.MonkeyPatch, room: float, *argv: str) -> str:
    monkeypatch.setattr(shortage.ThisCluster, "room", property(lambda self: room))
    config, _ = load([*argv], TRAIN)
    return shortage.explain_shortage(config, choose_strategy("ddp"), 257, world=2, device=CPU)


LARGE = "--model.layers 2 --model.width 32 --model.heads 2 --data.seq_len 256".split()


def test_the_micro_batch_that_fits_is_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*LARGE, "--data.global_batch", "64"]
    room = (bytes_of(5, *argv) + bytes_of(6, *argv)) / 2
    said = explain(monkeypatch, room, *argv)
    assert said.startswith("data.micro_batch=32 did not fit into the memory of cpu; by plan ddp")
    assert said.endswith("nearest: the same command with --data.micro_batch 5")
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        assert f"{part} " in said


def test_a_micro_batch_that_plan_wrongly_thinks_to_fit_is_halved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = explain(monkeypatch, 1e12, *LARGE, "--data.global_batch", "64")
    assert said.endswith("--data.micro_batch 16")


def test_where_not_one_sequence_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*LARGE, "--data.global_batch", "2"]
    spared = bytes_of(1, *argv, "--run.activation_checkpointing", "true")
    room = (bytes_of(1, *argv) + spared) / 2
    said = explain(monkeypatch, room, *argv)
    assert said.endswith("--run.activation_checkpointing true --data.micro_batch 1")
    assert explain(monkeypatch, 1.0, *argv).endswith("--launch zero3, or on more GPUs")


def train_without_memory() -> None:
    """As a rank: train.py, where the last rank has too little memory at step 3."""
    add_gradients = loop.add_gradients

    def fail(run: Any, *arguments: Any) -> Any:
        if run.state.step == 2 and run.runtime.rank == run.runtime.world_size - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return add_gradients(run, *arguments)

    loop.add_gradients = fail
    run_entry(main, prints_result=False)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_one_rank_without_memory_ends_all_with_one_error(
    prepared: Path, tmp_path: Path, world: int
) -> None:
    """It is an error of the settings: the same command would fail again."""
    run = tmp_path / "run"
    arguments = tiny(prepared, "--run.timeout_seconds", "20")
    code = "from tests import test_shortage; test_shortage.train_without_memory()"
    ranks = start_ranks(world, "-c", code, "--run.dir", str(run), *arguments)
    _, output = finish(ranks)
    assert [rank.returncode for rank in ranks] == [2] * world, output
    micro_batch = 8 // world
    ended = read(run)
    assert ended["class"] == "config"
    assert f"data.micro_batch={micro_batch} did not fit into the memory of cpu" in ended["reason"]
    assert f"the same command with --data.micro_batch {micro_batch // 2}" in ended["reason"]
