"""Run folders for tests of reports, written by hand: an ordinary one, and one by an attacker."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Text that would run a script if a page took it for markup: it would set `window.hacked`.
SCRIPTS = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    '"><svg onload=window.hacked=3>',
    "<!--<script>",
    "</script ><script>window.hacked = 6</script >",
    "javascript:window.hacked=4",
    "']});window.hacked=5;//",
    "@SCRIPT@ @DATA@ \\1 \\g<0>",
)
ATTACK = " ".join(SCRIPTS)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def step_line(step: int, **more: Any) -> dict[str, Any]:
    """A step of 1,000 tokens in 10 s."""
    return {
        "step": step,
        "loss": 2 + 8 * math.exp(-step / 10),
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": 1000 * step,
        "tokens_per_second": 100.0,
        "data_wait": 0.1,
        **more,
    }


def val_line(step: int, val_set: str, loss: float) -> dict[str, Any]:
    return {
        "step": step,
        "val_set": val_set,
        "val_loss": loss,
        "val_perplexity": math.exp(loss),
        "val_bits_per_byte": loss / 3,
    }


def start_line(
    at: float, step: int, attempt: int, tokens: int = 0, devices: int = 4
) -> dict[str, Any]:
    """A process that began at `at` and trains 60 s later."""
    return {
        "event": "start",
        "step": step,
        "began": at,
        "time": at + 60,
        "attempt": attempt,
        "tokens": tokens,
        "strategy": "ddp",
        "world_size": devices,
    }


def stop_line(at: float, attempt: int, kind: str, reason: str = "") -> dict[str, Any]:
    return {"event": "stop", "time": at, "attempt": attempt, "class": kind, "reason": reason}


SPIKE = {
    "event": "spike",
    "step": 30,
    "reason": "loss=9 is far above 2",
    "done": "the run goes on",
}


def ordinary_run(folder: Path, steps: int = 60, lr: float = 1e-3) -> Path:
    """A run that is stopped half-way, goes on with 8 devices instead of 4, and has a spike."""
    folder.mkdir(parents=True)
    half = steps // 2
    again = 1000 + 60 + 10 * half + 3600  # an hour later
    lines = [start_line(1000, step=0, attempt=1)]
    lines += [step_line(step, lr=lr) for step in range(1, half + 1)]
    lines += [val_line(half, "web", 3.5), val_line(half, "books", 3.9), SPIKE]
    lines += [stop_line(1060 + 10 * half, 1, "preempted", "SIGTERM")]
    lines += [start_line(again, half, 2, tokens=1000 * half, devices=8)]
    lines += [step_line(step, lr=lr) for step in range(half + 1, steps + 1)]
    lines += [val_line(steps, "web", 3.0), val_line(steps, "books", 3.4)]
    lines += [stop_line(again + 60 + 10 * (steps - half), 2, "done")]
    write_lines(folder / "metrics.jsonl", lines)
    evaluations = [
        {"step": half, "task": "arc", "shots": 0, "metrics": {"acc": 0.25, "acc_stderr": 0.01}},
        {"step": steps, "task": "arc", "shots": 0, "metrics": {"acc": 0.5, "acc_stderr": 0.01}},
    ]
    write_lines(folder / "evals.jsonl", evaluations)
    (folder / "config.yaml").write_text(f"optim: {{lr: {lr}}}\nrun: {{steps: {2 * steps}}}\n")
    samples = ""
    for step, text in ((half, "Once there"), (steps, "Once there was")):
        samples += (
            f"## step {step}, loss 3.5, checkpoint step-{step:08d}\nprompt 'Once'\n"
            f"temperature 0.0\n```\n{text} cold\n```\n"
            f"temperature 0.8\n```\n{text} warm\n```\n\n"
        )
    (folder / "samples.md").write_text(samples)
    return folder


def hostile_run(folder: Path) -> Path:
    """A run whose every text is an attack, and whose figures are as strange as readers allow."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [start_line(0, step=0, attempt=1) | {"strategy": ATTACK}]
    mixture = {f"share_{ATTACK}": 0.5, f"asked_{ATTACK}": 0.5, f"passes_{ATTACK}": 0.1}
    mixture |= {"share_b": 0.5, "asked_b": "x", "passes_b": "nan"}
    for step in range(1, 41):
        lines.append(step_line(step, **mixture))
    lines += [
        step_line(41, loss="nan", grad_norm="inf", lr=[1], mfu=ATTACK, **mixture),
        step_line(42, loss=1e99, grad_norm={}, tokens=2**48, tokens_per_second=0, **mixture),
        step_line(2**48, memory_gb=None, tokens=5, **mixture),
        val_line(40, ATTACK, 3.0) | {"val_loss": "inf"},
        val_line(41, ATTACK, 3.0),
        {"event": "spike", "step": 41, "reason": ATTACK, "done": ATTACK},
        {"event": "evaluation", "step": 41, "seconds": 1e12},
        stop_line(1e12, 1, ATTACK, ATTACK),
        stop_line(0, 2, ATTACK, ATTACK),
    ]
    write_lines(folder / "metrics.jsonl", lines)
    evaluations = [
        {"step": 41, "task": ATTACK, "metrics": {ATTACK: 1.0, f"{ATTACK}_stderr": -1e300}},
        {"step": 2**48, "task": "__proto__", "metrics": {"constructor": 1e100}},
        {"step": "x", "task": ATTACK, "metrics": {ATTACK: 1.0}},
    ]
    write_lines(folder / "evals.jsonl", evaluations)
    config = {"model": {"activation": ATTACK}, "data": {"input": ATTACK, "sources": {ATTACK: 3}}}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "samples.md").write_text(
        f"## step 41, loss <b>, {ATTACK}\nprompt {ATTACK!r}\ntemperature <i>\n```\n{ATTACK}\n"
        "\u202egnp.exe\n```\n"
    )
    (folder / "outcome.json").write_text(json.dumps({"class": ATTACK}))
    return folder
