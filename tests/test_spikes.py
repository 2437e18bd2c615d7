"""Spikes: the rule, what is stepped over, and runs that go back from a poisoned batch and go on."""

import hashlib
import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lm import loop
from dist_lm.checkpoint.folder import step_folders
from dist_lm.cli import load
from dist_lm.data.batches import Batch, Batches
from dist_lm.data.order import batch_after, batch_of_step
from dist_lm.errors import run_entry
from dist_lm.history import open_data, read_steps
from dist_lm.metrics import read_lines
from dist_lm.outcome import TRAIN
from dist_lm.report import main as report
from dist_lm.resume import _last_step
from dist_lm.spikes import far_off, with_range
from dist_lm.train import main as train
from tests.procs import finish, start_ranks
from tests.test_train import losses, tiny

# --- the rule


def curve(steps: int, seed: int) -> list[list[float]]:
    """A loss that falls with noise, and a norm whose logarithm is normal."""
    rng = random.Random(seed)
    figures = []
    for step in range(steps):
        loss = 2 + 6 * math.exp(-step / 100) + rng.gauss(0, 0.05)
        figures.append([loss, rng.lognormvariate(0, 0.4)])
    return figures


def test_an_ordinary_curve_has_no_spike() -> None:
    figures = curve(3000, seed=0)
    for step in range(1, len(figures)):
        assert far_off(figures[max(0, step - 64) : step], *figures[step]) == ""


def test_jumps_are_spikes_upwards_only_and_after_some_steps() -> None:
    recent = curve(1000, seed=1)[-64:]
    assert far_off(recent, 3.0, 1.0).startswith("loss=3.0000 is far above 1.9976")
    assert far_off(recent, 2.0, 1000.0).startswith("grad_norm=1000 is far above ")
    assert far_off(recent, 2.15, 1.0) == ""  # by less than a tenth
    assert far_off(recent, 2.0, 8.0) == ""  # less than ten times the usual norm
    assert far_off(recent, 0.1, 1e-9) == ""
    assert far_off(recent[:31], 3.0, 100.0) == ""


# --- which batches are trained on


def test_the_batches_of_steps_are_those_that_are_not_stepped_over() -> None:
    ranges: list[list[int]] = []
    left = list(range(100))
    for first, stop in ((10, 18), (0, 2), (30, 31), (8, 20)):
        ranges = with_range(ranges, first, stop)
        left = [batch for batch in left if not first <= batch < stop]
        steps = range(len(left))
        assert [batch_of_step(step, ranges) for step in steps] == left
        assert [batch_after(step, ranges) for step in steps[1:]] == [n + 1 for n in left[:-1]]
    assert ranges == [[0, 2], [8, 20], [30, 31]]
    assert batch_after(0, ranges) == 0


# --- runs


@dataclass(frozen=True)
class Poisoned(Batch):
    """A batch with another loss than its own."""


def train_with_poison() -> None:
    """As a rank: train.py, whose batches of these numbers multiply gradients by a factor."""
    numbers = json.loads(sys.argv[1])
    factor = float(sys.argv[2])
    del sys.argv[1:3]
    read = Batches.read
    add_gradients = loop.add_gradients

    def read_poison(self: Batches, number: int) -> Batch:
        batch = read(self, number)
        if number in numbers and self._hash_rows:  # validation hashes none
            return Poisoned(**vars(batch))
        return batch

    def add_poison(run: Any, batch: Batch, targets: torch.Tensor) -> torch.Tensor:
        if isinstance(batch, Poisoned):
            targets = targets / factor
        return add_gradients(run, batch, targets)

    Batches.read = read_poison  # type: ignore[method-assign]
    loop.add_gradients = add_poison  # type: ignore[assignment]
    run_entry(train, prints_result=False)


def poisoned(
    run: Path, numbers: list[int], factor: str, world: int, *arguments: str, code: int = 0
) -> str:
    words = ("-c", "from tests import test_spikes; test_spikes.train_with_poison()")
    poison = (json.dumps(numbers), factor)
    ranks = start_ranks(world, *words, *poison, "--run.dir", str(run), *arguments)
    got, output = finish(ranks)
    assert got == code, f"exit code {got}, not {code}:\n{output}"
    return output


def weights(run: Path) -> bytes:
    return (step_folders(run)[-1] / "model.safetensors").read_bytes()


def state(run: Path) -> dict[str, Any]:
    return json.loads((step_folders(run)[-1] / "state.json").read_text())


def spikes(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run) if line.get("event") == "spike"]


# The world, the flags, and the steps at which the interrupted run stops: both of them are within
# the stretch, and set aside.
STRATEGIES = {
    "single": (1, (), ("20", "23")),
    "ddp": (2, (), ("23",)),
    "zero2": (2, ("--launch", "zero2"), ("23",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_back_from_a_nan_and_an_interrupted_one_is_the_same(
    prepared: Path, tmp_path: Path, strategy: str
) -> None:
    """Batch 24 is poison. Steps 18 to 25 read the stretch, so the checkpoint is that of step 10."""
    world, launch, stops = STRATEGIES[strategy]
    arguments = [
        *tiny(prepared, "--run.steps", "32", "--run.save_every", "10", "--model.dropout", "0.1"),
        *("--run.on_spike", "act"),
        *launch,
    ]
    output = poisoned(tmp_path / "whole", [24], "nan", world, *arguments)
    done = "went back to step 10, steps over global batches 17 to 24"
    assert "warning: step 25: loss=" in output and done in output
    assert state(tmp_path / "whole")["stepped_over"] == [[17, 25]]
    (spike,) = spikes(tmp_path / "whole")
    assert (spike["step"], spike["back"], spike["batches"]) == (25, 10, [17, 24])
    assert spike["positions"] == [17 * 8, 25 * 8 - 1] and not math.isfinite(spike["grad_norm"])

    for stop in stops:
        stopped = ("--run.stop_after", stop)
        poisoned(tmp_path / "parts", [24], "nan", world, *arguments, *stopped)
    poisoned(tmp_path / "parts", [24], "nan", world, *arguments)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert losses_alone(tmp_path / "parts") == losses_alone(tmp_path / "whole")


def losses_alone(run: Path) -> list[tuple[int, float, str]]:
    return [(step["step"], step["loss"], step["batch_hash"]) for step in losses(run)]


@pytest.mark.slow
def test_a_run_that_goes_back_to_its_beginning_and_reports_it(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Before the first save there is no checkpoint. The others' batches come as they would."""
    arguments = tiny(prepared, "--run.on_spike", "act", "--optim.name", "muon")
    poisoned(tmp_path / "run", [3], "nan", 1, *arguments)
    longer = tiny(prepared, "--optim.name", "muon", "--run.steps", "16")
    poisoned(tmp_path / "other", [], "nan", 1, *longer)
    theirs = {step["step"]: step["batch_hash"] for step in losses(tmp_path / "other")}
    ours = {step["step"]: step["batch_hash"] for step in losses(tmp_path / "run")}
    assert [ours[step] for step in range(1, 13)] == [theirs[step] for step in range(5, 17)]
    report([str(tmp_path / "run"), "--output", str(tmp_path / "x.png")])
    told = capsys.readouterr().out
    assert "run at step 4: loss=" in told and "went back to step 0" in told


@pytest.mark.slow
def test_an_interrupted_run_goes_back_to_its_beginning_too(prepared: Path, tmp_path: Path) -> None:
    """The spike at step 14 is too early for the first regular save, and behind the stop at 12."""
    flags = ("--run.on_spike", "act", "--run.steps", "20", "--run.save_every", "10")
    arguments = tiny(prepared, *flags)
    poisoned(tmp_path / "whole", [13], "nan", 1, *arguments)
    poisoned(tmp_path / "parts", [13], "nan", 1, *arguments, "--run.stop_after", "12")
    poisoned(tmp_path / "parts", [13], "nan", 1, *arguments)
    assert state(tmp_path / "parts")["stepped_over"] == [[6, 14]]
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_streams_read_and_leave_out_what_is_stepped_over(prepared: Path, tmp_path: Path) -> None:
    """Two ranks: the batches after the stretch are those of an undisturbed run."""
    text = prepared.parent / "text.txt"
    source = ("--data.stream", "true", "--data.separator", "\n\n", "--data.tokenizer", "byte")
    arguments = tiny(text, *source, "--run.steps", "24", "--run.save_every", "5")
    act = ("--run.on_spike", "act")
    poisoned(tmp_path / "run", [15], "nan", 2, *arguments, *act)
    poisoned(tmp_path / "other", [], "nan", 2, *arguments)
    theirs = {step["step"]: step["batch_hash"] for step in losses(tmp_path / "other")}
    ours = {step["step"]: step["batch_hash"] for step in losses(tmp_path / "run")}
    assert state(tmp_path / "run")["stepped_over"] == [[8, 16]]
    assert [ours[step] for step in range(1, 9)] == [theirs[step] for step in range(1, 9)]
    assert [ours[step] for step in range(9, 17)] == [theirs[step] for step in range(17, 25)]
    assert hashes_read_again(tmp_path / "run", 24) == ours
    poisoned(tmp_path / "parts", [15], "nan", 2, *arguments, *act, "--run.stop_after", "12")
    poisoned(tmp_path / "parts", [15], "nan", 2, *arguments, *act)
    assert weights(tmp_path / "parts") == weights(tmp_path / "run")


def hashes_read_again(run: Path, steps: int) -> dict[int, str]:
    """The hash of each step's batch, from what show reads."""
    config, _ = load(["--config", str(run / "config.yaml")], TRAIN)
    hashes = {}
    batches = read_steps(config, open_data(config), 0)
    for step, origins in zip(range(1, steps + 1), batches, strict=False):
        total = 0
        for place, origin in origins.items():
            row = origin.tokens().astype("<u4").tobytes() + place.to_bytes(8)
            total += int.from_bytes(hashlib.blake2b(row, digest_size=8).digest())
        hashes[step] = f"{total % 2**64:016x}"
    return hashes


@pytest.mark.parametrize(
    ("length", "facts", "last"),
    [
        (["--run.steps", "100"], {"stepped_over": [[3, 11]]}, 100),
        (["--run.epochs", "2"], {"stepped_over": [[3, 11], [20, 22]]}, 90),
        (["--run.steps", "100"], {"streams": {"end": 321}, "stepped_over": [[3, 11]]}, 33),
    ],
)
def test_where_the_data_decides_a_run_is_shorter_by_what_it_stepped_over(
    length: list[str], facts: dict[str, Any], last: int
) -> None:
    """A finished run must say so. A global batch has 8 sequences."""
    config, _ = load([*length, "--data.global_batch", "8"], TRAIN)
    assert _last_step(config, 100, facts) == last


@pytest.mark.slow
def test_finite_spikes_are_warned_about_once_acted_on_or_left_alone(
    prepared: Path, tmp_path: Path
) -> None:
    """Two poisoned batches in a row are one warning."""
    arguments = tiny(prepared, "--run.steps", "48", "--run.save_every", "20")
    runs = {}
    for on_spike in ("warn", "act", "ignore"):
        run = tmp_path / on_spike
        poisoned(run, [39, 40], "1000", 1, *arguments, "--run.on_spike", on_spike)
        runs[on_spike] = [(spike["step"], spike["done"]) for spike in spikes(run)]
    went_back = "went back to step 20, steps over global batches 32 to 39"
    assert runs["warn"] == [(40, "the run goes on")]
    assert runs["act"][0] == (40, went_back)
    assert runs["ignore"] == []
    assert weights(tmp_path / "warn") == weights(tmp_path / "ignore")


@pytest.mark.slow
def test_a_run_that_only_diverges_ends_with_a_report(prepared: Path, tmp_path: Path) -> None:
    arguments = tiny(prepared, "--run.steps", "60", "--run.save_every", "10")
    output = poisoned(
        tmp_path / "run",
        list(range(24, 1000)),
        "nan",
        1,
        *arguments,
        "--run.on_spike",
        "act",
        code=76,
    )
    assert "it did so again and again after going back" in output
    batches = [spike["batches"] for spike in spikes(tmp_path / "run")]
    assert batches == [[17, 24], [10, 25], [3, 26]]
