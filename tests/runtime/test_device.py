"""What is set before CUDA starts, and what run.deterministic makes of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dist_lm.runtime.start import _use_host
from dist_lm.runtime.strategy import Strategy
from tests.procs import finish, start_ranks
from tests.test_train import losses, tiny

LOOK = """
import os, sys, torch
from pathlib import Path
from dist_lm import loop
from dist_lm.cli import load
from dist_lm.outcome import TRAIN, Attempt
from dist_lm.runtime import start
meet = start._meet
def look(*arguments):
    assert not torch.cuda.is_initialized()
    print("allocator", os.environ["PYTORCH_CUDA_ALLOC_CONF"])
    print("bf16 sums", torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
    print("strict", torch.are_deterministic_algorithms_enabled())
    print("fills", torch.utils.deterministic.fill_uninitialized_memory)
    print("workspace", os.environ.get("CUBLAS_WORKSPACE_CONFIG"), flush=True)
    return meet(*arguments)
start._meet = look
config, _ = load(sys.argv[1:], TRAIN)
loop.run_to_end(config, Attempt(Path(config.run.dir)))
"""


def said(run: Path, *words: str, **variables: str) -> str:
    got, output = finish(start_ranks(1, "-c", LOOK, "--run.dir", str(run), *words, **variables))
    assert got == 0, output
    return output


@pytest.mark.slow
def test_before_cuda_starts(prepared: Path, tmp_path: Path) -> None:
    """Also with run.deterministic a CPU gives the same figures."""
    words = tiny(prepared, "--run.steps", "3", "--model.dropout", "0.1")
    output = said(tmp_path / "plain", *words)
    assert "allocator expandable_segments:True\nbf16 sums False\nstrict False\n" in output
    assert "workspace None\n" in output
    output = said(tmp_path / "strict", *words, "--run.deterministic", "true")
    assert "strict True\nfills False\nworkspace :4096:8\n" in output
    keys = ("loss", "grad_norm")
    assert [[step[key] for key in keys] for step in losses(tmp_path / "strict")] == [
        [step[key] for key in keys] for step in losses(tmp_path / "plain")
    ]


@pytest.mark.slow
def test_what_the_user_has_set_stays(prepared: Path, tmp_path: Path) -> None:
    words = tiny(prepared, "--run.steps", "1", "--run.deterministic", "true")
    given = {"PYTORCH_CUDA_ALLOC_CONF": "backend:native", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    output = said(tmp_path / "run", *words, **given)
    assert "allocator backend:native\n" in output
    assert "workspace :16:8\n" in output


@pytest.mark.parametrize(
    ("gpu", "strategy", "expected"),
    [
        (False, Strategy(), [6]),
        (True, Strategy(), []),
        (True, Strategy(stage=2), []),
        (True, Strategy(stage=2, optimizer_device="cpu"), [6]),
    ],
)
def test_an_optimizer_in_host_memory_has_the_cores(
    gpu: bool, strategy: Strategy, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    runtime = SimpleNamespace(engine=SimpleNamespace(strategy=strategy))
    _use_host(runtime, threads=6, local_world=1)  # type: ignore[arg-type]
    assert threads == expected
