"""A step's figures are read when the next step has been handed to the device, and never waited for.

There is no GPU here. So a function mode finds what would make the host wait for one: reading a
tensor's value, and making a tensor on a device from numbers of the host.
"""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dist_lm import evaluation, loop
from dist_lm.cli import load
from dist_lm.outcome import TRAIN, Attempt
from dist_lm.resume import Run
from dist_lm.runtime.engine import Engine
from dist_lm.runtime.late import LateFigures, Moment
from tests.procs import finish, start_ranks
from tests.test_train import losses, tiny

READING = "item tolist numpy cpu nonzero __bool__ __float__ __int__ __index__ masked_select".split()
COPYING = ("tensor", "as_tensor")


class SyncFinder(TorchFunctionMode):
    """Notes each call that would make the host wait for a GPU, while it is watching."""

    def __init__(self) -> None:
        super().__init__()
        self.is_watching = False
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        is_mask = any(isinstance(arg, Tensor) and arg.dtype == torch.bool for arg in args[1:2])
        reads = name in READING or (name == "__getitem__" and is_mask)
        copies = name in COPYING and kwargs.get("device") is not None
        if self.is_watching and (reads or copies):
            self.found.append(name)
        return func(*args, **kwargs)


def in_process(function: str, *arguments: str) -> str:
    """What a function of this file prints in a process of its own."""
    listed = ", ".join(map(repr, arguments))
    code = f"from tests.runtime import test_late; test_late.{function}({listed})"
    got, output = finish(start_ranks(1, "-c", code))
    assert got == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_never_waits_for_the_device(prepared: Path, tmp_path: Path, optimizer: str) -> None:
    words = ["--run.steps", "4", "--optim.name", optimizer, "--data.micro_batch", "2"]
    words += ["--model.dropout", "0.1", "--run.ema", "0.9", "--run.eval_every", "4"]
    output = in_process(
        "train_watched", "--run.dir", str(tmp_path / "run"), *tiny(prepared, *words)
    )
    # Figures are read when the next step is on its way; those of the last step at once.
    assert "order: update update read update read update read read\n" in output
    assert "would wait: []\n" in output
    assert output.count("an evaluation waits: ['tolist']\n") == 2  # of the weights, and the average
    assert [step["step"] for step in losses(tmp_path / "run")] == [1, 2, 3, 4]


def train_watched(*words: str) -> None:
    """As a process: train, and print the order of updates and reads, and what would wait."""
    order = []
    finder = SyncFinder()
    set_lr, update, record_step = loop.set_lr, Engine.update, loop.record_step

    def watched_set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
        finder.is_watching = True
        set_lr(optimizer, lr)

    def noted_update(engine: Engine) -> Tensor:
        order.append("update")
        return update(engine)

    def noted_record_step(run: Run, pending: loop.Pending) -> bool:
        order.append("read")
        finder.is_watching = False  # it reads what has arrived long ago
        return record_step(run, pending)

    def watched_validate(*arguments: Any) -> dict[str, float]:
        before = finder.found
        finder.found = []
        finder.is_watching = True
        figures = validate(*arguments)
        finder.is_watching = False
        print(f"an evaluation waits: {finder.found}", flush=True)
        finder.found = before
        return figures

    validate = evaluation.validate
    evaluation.validate = watched_validate
    loop.set_lr, Engine.update, loop.record_step = watched_set_lr, noted_update, noted_record_step
    config, _ = load(list(words), TRAIN)
    with finder:
        loop.run_to_end(config, Attempt(Path(config.run.dir)))
    print(f"order: {' '.join(order)}")
    print(f"would wait: {finder.found}")


@pytest.mark.slow
def test_the_time_of_a_step_is_that_of_training_alone(prepared: Path, tmp_path: Path) -> None:
    """Between the figures of two steps: what the host does then counts, evaluations do not."""
    words = tiny(prepared, "--run.steps", "6", "--run.eval_every", "3")
    in_process("train_slowly", "--run.dir", str(tmp_path / "run"), *words)
    seconds = [8 * 32 / step["tokens_per_second"] for step in losses(tmp_path / "run")]
    # Each turn sleeps 0.1 s in its step. When the figures of the third step are complete, the turn
    # before has slept 1 s over those of the first.
    least = [0.1, 0.1, 1.1, 0.1, 0.1, 1.1]
    assert len(seconds) == 6
    assert all(low <= found < low + 0.9 for low, found in zip(least, seconds, strict=True))


def train_slowly(*words: str) -> None:
    """As a process: train with a slow step, slow reading and very slow evaluations."""
    set_lr, record_step = loop.set_lr, loop.record_step

    def slow_set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
        time.sleep(0.1)
        set_lr(optimizer, lr)

    def slow_record_step(run: Run, pending: loop.Pending) -> bool:
        time.sleep(1.0)
        return record_step(run, pending)

    loop.set_lr, loop.record_step = slow_set_lr, slow_record_step
    loop.evaluate = lambda *arguments: time.sleep(1.0)
    config, _ = load(list(words), TRAIN)
    loop.run_to_end(config, Attempt(Path(config.run.dir)))


def test_figures_of_a_gpu_come_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied without waiting, then an event; reading waits for the event, and time is its clock."""
    done = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 250.0

    class Host:
        def copy_(self, figures: Any, non_blocking: bool) -> None:
            done.append(f"copy, non_blocking={non_blocking}")

        def tolist(self) -> list[float]:
            done.append("read")
            return [1.0, 2.0]

    def empty_like(figures: Any, device: str, pin_memory: bool) -> Host:
        done.append(f"{device}, pin_memory={pin_memory}")
        return Host()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    began = Moment(on_gpu.device)
    figures = LateFigures(on_gpu)  # type: ignore[arg-type]
    assert done == ["record", "cpu, pin_memory=True", "copy, non_blocking=True", "record"]
    assert figures.read() == [1.0, 2.0]
    assert done[4:] == ["wait", "read"]
    assert figures.moment.seconds_since(began) == 0.25
