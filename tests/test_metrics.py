"""What lands in metrics.jsonl, on the console and in pictures, and that none of it stops a run."""

import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch

from dist_lm import metrics, progress_line
from dist_lm.console import duration, shorten
from dist_lm.curves import draw_curves, run_names, smooth, trailing_means
from dist_lm.errors import UserError
from dist_lm.metrics import Metrics, peak_flops, read_metrics

VAL = {"val_loss": 2.5, "val_perplexity": math.exp(2.5), "val_bits_per_byte": 1.9}


def make(run_dir, **options):
    defaults = {
        "steps": 4,
        "flops_per_token": 1e9,
        "device": torch.device("cpu"),
        "world_size": 1,
        "is_main": True,
    }
    return Metrics(run_dir, **(defaults | options))


def give(recorder, step, **figures):
    figures = {
        "loss": 3 - step / 8,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 100 * step,
        "tokens_per_second": 1000.0,
        "data_wait": 0.25,
    } | figures
    recorder.step(step=step, **figures)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(progress_line, "time", clock)
    return clock


# --- metrics.jsonl


def test_lines_are_whole_and_unrounded(tmp_path):
    recorder = make(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()  # a run that does nothing leaves no history
    give(recorder, 1, loss=1 / 3, batch_hash="00ff")
    line = (tmp_path / "metrics.jsonl").read_text()  # at once, not when closed
    assert line.endswith("\n") and json.loads(line) == {
        "step": 1,
        "loss": 1 / 3,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 100,
        "tokens_per_second": 1000.0,
        "data_wait": 0.25,
        "batch_hash": "00ff",
    }
    recorder.evaluation(1, "val", VAL)
    recorder.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1]) == {
        "step": 1,
        "val_set": "val",
        **VAL,
    }


def test_not_finite_is_valid_json_and_read_back(tmp_path):
    recorder = make(tmp_path)
    give(recorder, 1, loss=math.nan, grad_norm=math.inf, lr=-math.inf)
    recorder.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss": "nan", "lr": "-inf", "grad_norm": "inf"' in text
    ((step,), _) = read_metrics(tmp_path)
    assert math.isnan(step["loss"]) and (step["grad_norm"], step["lr"]) == (math.inf, -math.inf)


def test_other_ranks_record_nothing(tmp_path, capsys):
    recorder = make(tmp_path, is_main=False, track=pytest.fail)
    give(recorder, 1)
    recorder.evaluation(1, "val", VAL)
    recorder.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_a_step_trained_twice_and_torn_lines(tmp_path):
    # The second process trains step 2 again.
    for first, losses in ((1, [1.0, 2.0, 3.0]), (2, [9.0])):
        recorder = make(tmp_path)
        for n, loss in enumerate(losses, first):
            give(recorder, n, loss=loss)
        recorder.evaluation(2, "val", {**VAL, "val_loss": losses[-1]})
        recorder.close()
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 7, "lo')  # killed here; the next process starts a new line
    recorder = make(tmp_path)
    give(recorder, 5)
    recorder.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'12\n"loss"\n\xff\n\n{"other": 1}\n{')
    steps, evaluations = read_metrics(tmp_path)
    assert [(s["step"], s["loss"]) for s in steps] == [(1, 1.0), (2, 9.0), (3, 3.0), (5, 2.375)]
    assert [(e["step"], e["val_loss"]) for e in evaluations] == [(2, 9.0)]


def test_no_history_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"metrics\.jsonl: No such file or directory; rule: the folder of a run"
    ) as refusal:
        read_metrics(tmp_path)
    assert refusal.value.code == 66


# --- nothing stops a run


def test_full_disk_costs_one_warning(tmp_path, capsys):
    recorder = make(tmp_path)
    recorder.file.stream = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    for n in (1, 2, 3):
        give(recorder, n)
    recorder.close()
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/metrics.jsonl could not be written, the run goes on:"
        " No space left on device\n"
    )


def test_a_planted_link_is_not_followed(tmp_path, capsys):
    (tmp_path / "victim").touch()
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "victim")
    recorder = make(tmp_path)
    give(recorder, 1)
    recorder.close()
    assert (tmp_path / "victim").read_text() == ""
    assert "metrics.jsonl could not be written" in capsys.readouterr().err


def test_a_line_cut_short_by_a_full_disk_spoils_no_other(tmp_path):
    class Disk:
        full, content = False, b""

        def write(self, data):
            kept = data[: 5 if self.full else None]
            self.content += kept
            return len(kept)

        def close(self): ...

    recorder = make(tmp_path)
    recorder.file.stream = disk = Disk()
    for n, full in ((1, False), (2, True), (3, False), (4, False)):
        disk.full = full
        give(recorder, n)
    (tmp_path / "metrics.jsonl").write_bytes(disk.content)
    assert [s["step"] for s in read_metrics(tmp_path)[0]] == [1, 3, 4]


def test_failing_tracker_is_dropped_with_one_warning(tmp_path, capsys, clock):
    calls = []

    def track(values, step):
        calls.append((step, values))
        raise RuntimeError("no network")

    recorder = make(tmp_path, track=track)
    for n in (1, 2):
        clock.now += 5
        give(recorder, n, batch_hash="ab", loss=math.nan)
    recorder.close()
    figures = {
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 100,
        "tokens_per_second": 1000.0,
        "data_wait": 0.25,
    }
    assert calls == [(1, figures)]
    warning = "warning: tracking is off, the run goes on: RuntimeError: no network\n"
    assert capsys.readouterr().err == warning


def test_trackers_are_told_once_a_second_and_of_the_ends(tmp_path, clock):
    steps = []
    recorder = make(
        tmp_path, steps=30, track=lambda values, step: steps.append((step, sorted(values)[-1]))
    )
    for n in range(1, 31):
        clock.now += 0.125
        give(recorder, n)
    recorder.evaluation(30, "val", VAL)
    recorder.close()
    assert [step for step, _ in steps] == [1, 9, 17, 25, 30, 30]
    assert steps[-1][1] == "val/val_perplexity"


SCRIPT = """
import sys
from types import SimpleNamespace
from dist_lm.errors import run_entry
from dist_lm.metrics import Metrics
CPU = SimpleNamespace(type="cpu")  # torch would take a second to import
VAL = {"val_loss": 1.0, "val_perplexity": 2.0, "val_bits_per_byte": 3.0}
STEP = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens_per_second": 1.0, "data_wait": 0.0}
def main(argv):
    recorder = Metrics(argv[0], steps=3, flops_per_token=1, device=CPU, world_size=1, is_main=True)
    sys.stdin.readline()
    for n in (1, 2, 3):
        recorder.evaluation(n, "val", VAL)
        recorder.step(step=n, tokens=n, **STEP)
    recorder.close()

run_entry(main, prints_result=False)
"""


@pytest.mark.parametrize("where", ["closed pipe", "full disk", "closed", "all in a closed pipe"])
def test_training_outlives_its_standard_output(tmp_path, where):
    out = {"full disk": os.open("/dev/full", os.O_WRONLY), "closed": None}.get(
        where, subprocess.PIPE
    )
    err = subprocess.STDOUT if where == "all in a closed pipe" else subprocess.PIPE
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    close_it = {"preexec_fn": lambda: os.close(1)} if where == "closed" else {}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=err,
        text=True,
        env=buffered,
        **close_it,
    )
    if process.stdout:
        process.stdout.close()
        process.stdout = None
    _, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 0, errors
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    expected = {
        "closed pipe": "Broken pipe",
        "full disk": "No space left on device",
    }.get(where)
    assert (errors or "") == (
        f"warning: standard output is gone, the command goes on: {expected}\n" if expected else ""
    )


# --- the console


def test_plain_lines_come_at_the_ends_and_every_ten_seconds(tmp_path, capsys, clock):
    recorder = make(tmp_path, steps=6)
    for n in range(1, 7):
        clock.now += 4
        give(recorder, n)
        if n == 3:
            with recorder.pause("evaluation", 3):
                clock.now += 2
            recorder.evaluation(n, "val", VAL)
    recorder.evaluation(6, "val", VAL)
    recorder.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 1/6  loss 2.8750  lr 1.0e-03  norm 0.5  1k tok/s  wait 25%",
        "step 3  val: loss 2.5000  perplexity 12.18  bits per byte 1.9000",
        "step 4/6  eta 0:09  loss 2.5000  lr 1.0e-03  norm 0.5  1k tok/s  wait 25%",
        "step 6/6  eta 0:00  loss 2.2500  lr 1.0e-03  norm 0.5  1k tok/s  wait 25%",
        "step 6  val: loss 2.5000  perplexity 12.18  bits per byte 1.9000",
        "6 steps in 0:26: goodput 77%, up to the first step 15%, evaluating and saving 8%",
        "600 tokens so far, 0.01 device hours in this start",
    ]


def test_what_a_start_has_taken_and_will_take(tmp_path, capsys, clock):
    """Two devices make 4 of 10 steps in 40 hours, the first in 20."""
    recorder = make(tmp_path, steps=10, world_size=2)
    for n, hours in ((1, 20), (2, 5), (3, 5), (4, 5)):
        clock.now += 3600 * hours
        give(recorder, n)
    with recorder.pause("save", 4):
        clock.now += 3600 * 5
    recorder.close()
    saved = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert saved == {
        "event": "save",
        "step": 4,
        "seconds": 5 * 3600.0,
        "tokens": 400,
        "elapsed_seconds": 40 * 3600.0,
        "device_hours": 80.0,
        "tokens_expected": 1000,
        "elapsed_seconds_expected": 80 * 3600.0,  # 6 more steps; 3 took 20 hours with the save
        "device_hours_expected": 160.0,
    }
    assert capsys.readouterr().out.splitlines()[-1] == (
        "400 tokens so far, 80.00 device hours in this start; by the end 1k tokens,"
        " 160.00 device hours, 3.3 days"
    )


def test_nothing_is_expected_of_a_run_without_a_known_end(tmp_path, capsys, clock):
    recorder = make(tmp_path, steps=None)
    for n in (1, 2):
        clock.now += 3600
        give(recorder, n)
    with recorder.pause("evaluation", 2):
        pass
    recorder.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["device_hours"] == 2.0 and not [key for key in line if "expected" in key]
    assert capsys.readouterr().out.endswith("200 tokens so far, 2.00 device hours in this start\n")


def test_a_stopped_run_prints_its_last_step(tmp_path, capsys, clock):
    recorder = make(tmp_path, steps=9)
    give(recorder, 1)
    clock.now += 1
    give(recorder, 2)
    recorder.close()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[:2]] == ["1/9", "2/9"]


def test_one_line_on_a_terminal(tmp_path, capsys, clock, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        progress_line.shutil, "get_terminal_size", lambda: os.terminal_size((50, 24))
    )
    recorder = make(tmp_path)
    for n in (1, 2, 3):  # step 2 comes too soon after step 1
        clock.now += 0.06
        give(recorder, n)
    recorder.evaluation(3, "val", VAL)
    recorder.close()
    third = "step 3/4 eta 0:00 loss 2.6250 lr 1.0e-03 norm 0.5"  # the rest is cut off
    assert capsys.readouterr().out.split("\r\x1b[K") == [
        "",
        "step 1/4 loss 2.8750 lr 1.0e-03 norm 0.5 1k tok/s",
        third,
        "step 3  val: loss 2.5000  perplexity 12.18  bits per byte 1.9000\n",
        f"{third}\n3 steps in 0:00: goodput 67%, up to the first step 33%,"
        " evaluating and saving 0%\n300 tokens so far, 0.00 device hours in this start;"
        " by the end 400 tokens, 0.00 device hours, 0:00\n",
    ]


def test_rates_are_averaged_over_steps(tmp_path, capsys):
    recorder = make(tmp_path, steps=2)
    give(recorder, 1, tokens_per_second=1000.0, data_wait=0.0)
    give(recorder, 2, tokens_per_second=3000.0, data_wait=0.5)
    recorder.close()
    # Equal tokens in 3 and 1 parts of the time.
    assert "  1.5k tok/s  wait 25%\n" in capsys.readouterr().out


# --- what a device can do


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090 D", math.inf),
        ("NVIDIA H20", math.inf),
        ("Tesla V100-SXM2-16GB", math.inf),
    ],
)
def test_peaks(name, tflops):
    assert peak_flops(name) == tflops * 1e12


def test_mfu_and_memory_on_a_known_device(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_500_000_000)
    recorder = make(tmp_path, device=torch.device("cuda", 0), world_size=2, flops_per_token=1e9)
    give(recorder, 1, tokens_per_second=121_000.0)
    recorder.close()
    ((step,), _) = read_metrics(tmp_path)
    assert step["mfu"] == pytest.approx(0.5) and step["memory_gb"] == 2.5
    assert "  mfu 50.0%  " in capsys.readouterr().out


# --- curves


@pytest.mark.parametrize("smoother", [smooth, trailing_means])
def test_smoothing(smoother):
    assert smoother([1.0] * 200) == pytest.approx([1.0] * 200)
    assert smoother([4.0, 2.0]) == [4.0, 2.0]  # a short curve is left as it is
    assert smoother([math.nan, 2.0, math.inf, 4.0])[1:3] == [2.0, 2.0]
    assert math.isnan(smoother([math.nan])[0])
    assert smoother([0.0] * 100 + [1.0] * 100)[-1] > 0.99
    assert smoother([]) == []


def test_trailing_means_lag():
    long = trailing_means([0.0] * 100 + [1.0] * 100)
    assert long[99] == 0 and long[100] == pytest.approx(0.25, abs=0.01)


def test_the_smoothed_line_of_a_falling_curve_does_not_lag():
    """It lay above its own data for the first tenth when it was a mean of what came before."""
    losses = [2 + 8 * math.exp(-step / 20) for step in range(400)]
    above = [line - loss for line, loss in zip(smooth(losses), losses, strict=True)]
    assert max(above[:40]) < 0.1  # of a fall by 8
    assert abs(sum(above[:40]) / 40) < 0.01
    assert smooth(losses)[0] == losses[0] and max(map(abs, above[100:])) < 0.01


def test_smoothing_takes_the_noise_away():
    rng = random.Random(1)
    noise = [rng.gauss(0, 1) for _ in range(1000)]
    line = smooth(noise)[20:-20]  # near the ends it averages over fewer values
    assert math.sqrt(sum(value**2 for value in line) / len(line)) < 0.3


def test_curves_are_drawn(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        recorder = make(tmp_path / name)
        for n in range(1, 9):
            give(recorder, n, loss=math.nan if n == 5 else 3.0 / n)
        recorder.evaluation(4, "val", VAL)
        recorder.close()
    draw_curves([tmp_path / "one", tmp_path / "two"], tmp_path / "loss.png")
    first = (tmp_path / "loss.png").read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 10_000
    draw_curves([tmp_path / "one"], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes() != first


def test_names_of_runs():
    assert run_names(["a/one", "b/two/"]) == ["one", "two"]
    assert run_names(["a/one", "b/one"]) == ["a/one", "b/one"]


def test_numbers_for_people():
    short = {7.0: "7", 999.4: "999", 51234: "51.2k", 1.5e6: "1.5M", 2e9: "2G"}
    assert {number: shorten(number) for number in short} == short
    times = {0.4: "0:00", 59.6: "1:00", 3599: "59:59", 3600: "1:00:00", 90061: "25:01:01"}
    assert {seconds: duration(seconds) for seconds in times} == times
