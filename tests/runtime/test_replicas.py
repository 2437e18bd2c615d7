"""A flipped bit in one rank's weights is found, and the rank is named where a majority can tell."""

import itertools
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_lm.checkpoint.folder import step_folders
from dist_lm.errors import run_entry
from dist_lm.outcome import read
from dist_lm.runtime.engine import ReplicatedEngine
from dist_lm.runtime.replicas import hash_of_bits, who_computes_otherwise, who_differs
from dist_lm.train import main
from tests.procs import finish, start_ranks, train
from tests.test_train import tiny


def test_who_differs() -> None:
    assert who_differs([5, 5, 5]) == []
    assert who_differs([5, 6]) == [0, 1]
    assert who_differs([5, 6, 5]) == [1]
    assert who_differs([5, 6, 7]) == [0, 1, 2]
    assert who_differs([5, 5, 6, 6]) == [0, 1, 2, 3]
    assert who_differs([-1, 5, 5, 5, 2]) == [0, 4]


def test_who_computes_otherwise() -> None:
    assert who_computes_otherwise([1, 2, 3], [3, 1, 2]) == []
    assert who_computes_otherwise([1, 9, 3], [3, 8, 9]) == [0, 1]  # rank 1 was right about its own
    assert who_computes_otherwise([1, 9, 3], [3, 8, 2]) == [1]
    assert who_computes_otherwise([1, 2, 3, 9], [9, 1, 2, 8]) == [2, 3]
    assert who_computes_otherwise([1, 2], [7, 8]) == [0, 1]


def test_any_flipped_bit_and_any_exchange_of_tensors_changes_the_hash() -> None:
    tensors = [torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    right = int(hash_of_bits(tensors))
    assert int(hash_of_bits([tensor.clone() for tensor in tensors])) == right
    assert int(hash_of_bits(reversed(tensors))) != right
    for number, bit in itertools.product(range(2), range(32)):
        copies = [tensor.clone() for tensor in tensors]
        flip(copies[number], bit)
        assert int(hash_of_bits(copies)) != right


def flip(tensor: Tensor, bit: int) -> None:
    """Flip one bit of the fourth number."""
    bits = tensor.detach().view(-1).view(torch.int32)
    bits[3] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)


def train_with_a_flipped_bit() -> None:
    """As a rank: train.py, but after update 4 the lowest bit of one weight of rank 1 flips."""
    step_ = ReplicatedEngine._step
    updates = 0

    def step(self: Any) -> Tensor:
        nonlocal updates
        norm = step_(self)
        updates += 1
        if updates == 4 and self.rank == 1:
            flip(next(self.bare.parameters()), bit=0)
        return norm

    ReplicatedEngine._step = step  # type: ignore[method-assign]
    run_entry(main, prints_result=False)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_a_flipped_bit_is_found_and_named(prepared: Path, tmp_path: Path, world: int) -> None:
    """The comparison after step 6 finds it: the save of that step begins behind it."""
    run = tmp_path / "run"
    arguments = tiny(prepared, "--run.check_every", "3", "--run.save_every", "2")
    code = "from tests.runtime import test_replicas; test_replicas.train_with_a_flipped_bit()"
    ranks = start_ranks(world, "-c", code, "--run.dir", str(run), *arguments)
    _, output = finish(ranks)
    assert [rank.returncode for rank in ranks] == [70] * world, output
    host = socket.gethostname()
    named = {
        2: f"the weights of rank 0 on {host}, rank 1 on {host} differ, and no majority says",
        3: f"the weights of rank 1 on {host} are not those of the others",
    }
    ended = read(run)
    assert ended["class"] == "retryable" and ended["step"] == 2
    assert f"corrupt at step 4: {named[world]}" in ended["reason"]
    assert [folder.name for folder in step_folders(run)] == ["step-00000002"]


@pytest.mark.slow
def test_equal_weights_go_on_and_one_process_says_that_it_has_nothing_to_compare(
    prepared: Path, tmp_path: Path
) -> None:
    arguments = tiny(prepared, "--run.check_every", "1")
    assert "compares nothing" not in train(tmp_path / "two", *arguments, world=2)
    said = train(tmp_path / "one", *arguments)
    assert "warning: run.check_every=1 compares nothing: no two processes hold the same" in said


def train_with_other_arithmetic() -> None:
    """As a rank: train.py, but all losses of rank 1 are a millionth too large from step 4 on."""
    backward = ReplicatedEngine._backward
    step_ = ReplicatedEngine._step
    updates = 0

    def step(self: Any) -> Tensor:
        nonlocal updates
        updates += 1
        return step_(self)

    def spoil(self: Any, loss: Tensor) -> None:
        is_wrong = self.rank == 1 and updates >= 3
        backward(self, loss * 1.000001 if is_wrong else loss)

    ReplicatedEngine._step = step  # type: ignore[method-assign]
    ReplicatedEngine._backward = spoil  # type: ignore[method-assign]
    run_entry(main, prints_result=False)


@pytest.mark.slow
def test_a_rank_that_computes_otherwise_is_found_although_all_weights_are_equal(
    prepared: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = tiny(prepared, "--run.check_every", "2", "--run.deterministic", "true")
    code = "from tests.runtime import test_replicas; test_replicas.train_with_other_arithmetic()"
    ranks = start_ranks(3, "-c", code, "--run.dir", str(run), *arguments)
    _, output = finish(ranks)
    assert [rank.returncode for rank in ranks] == [70] * 3, output
    named = f"the gradients of the same rows of rank 1 on {socket.gethostname()} are not those"
    assert f"corrupt at step 4: {named}" in read(run)["reason"]


@pytest.mark.slow
def test_comparing_changes_no_bit(prepared: Path, tmp_path: Path) -> None:
    """Also where a step has several backward passes, and with dropout."""
    more = ("--data.micro_batch", "2", "--model.dropout", "0.1", "--run.deterministic", "true")
    for name, every in (("compared", "1"), ("not", "0")):
        arguments = tiny(prepared, *more, "--run.check_every", every)
        train(tmp_path / name, *arguments, world=2)
    compared, other = (
        (step_folders(tmp_path / name)[-1] / "model.safetensors").read_bytes()
        for name in ("compared", "not")
    )
    assert compared == other
