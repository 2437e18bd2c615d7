"""The proof on a GPU (benchmarks/gpu): its scheduler with made-up sections, and its dry run."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.context import Context
from benchmarks.gpu.data import make_data
from benchmarks.gpu.listing import SECTIONS, choose, tasks_of
from benchmarks.gpu.processes import Command, Fork, environment
from benchmarks.gpu.resultfile import read_results, read_section
from benchmarks.gpu.runs import RunFailed, Spec, largest_difference, run_chains, small_settings
from benchmarks.gpu.scheduler import SPARE_SECONDS, Result, Scheduler, Task, exit_code
from benchmarks.gpu.table import markdown
from dist_lm.config import Config
from dist_lm.model.loss import cross_entropy_sum
from dist_lm.runtime import start
from tests.procs import ROOT, clean_env

CHECK = Task("C1", "correctness", seconds=0.1, timeout=1.0, must=True)
TIMING = Task("S1", "speed", seconds=0.1, timeout=1.0, must=True, alone=True)


class Pretended:
    """A process that ends after some time with a code, or never."""

    def __init__(self, seconds: float, code: int = 0):
        self.end = time.monotonic() + seconds
        self.code = code
        self.is_killed = False

    def poll(self) -> int | None:
        return self.code if time.monotonic() >= self.end else None

    def kill(self) -> None:
        self.is_killed = True


def schedule(
    tasks: list[Task],
    start: Callable[[Task], Any],
    read: Callable[[Task, int], Result] | None = None,
    seconds: float = 20.0,
    places: int = 2,
    gigabytes: float = 100.0,
) -> list[Result]:
    """The results of made-up tasks."""
    results: list[Result] = []

    def passed(task: Task, code: int) -> Result:
        return {"result": "passed", "why": "", "rows": []}

    Scheduler(
        tasks,
        start=start,
        read=read or passed,
        record=results.append,
        deadline=time.monotonic() + seconds,
        places=places,
        gigabytes=gigabytes,
    ).run()
    return results


def by_name(results: list[Result]) -> dict[str, Result]:
    return {result["section"]: result for result in results}


def test_everything_runs_and_timings_run_alone() -> None:
    """The times of starting and ending show which processes were there together."""
    spans: dict[str, tuple[float, float]] = {}

    def start(task: Task) -> Pretended:
        process = Pretended(0.2)
        spans[task.name] = (time.monotonic(), process.end)
        return process

    tasks = [
        TIMING,
        replace(CHECK, name="C1"),
        replace(CHECK, name="C2"),
        replace(CHECK, name="C3"),
        replace(TIMING, name="S2"),
    ]
    results = schedule(tasks, start)
    assert {result["result"] for result in results} == {"passed"}
    assert exit_code(tasks, results, is_dry=False) == 0
    assert spans["C2"][0] < spans["C1"][1]  # side by side
    assert spans["C3"][0] >= spans["C1"][1]  # there are two places
    last_check = max(spans[name][1] for name in ("C1", "C2", "C3"))
    assert last_check <= spans["S1"][0]
    assert spans["S1"][1] <= spans["S2"][0]


def test_memory_limits_how_many_run() -> None:
    running: list[Pretended] = []
    most = 0

    def start(task: Task) -> Pretended:
        nonlocal most
        running.append(Pretended(0.1))
        most = max(most, sum(process.poll() is None for process in running))
        return running[-1]

    tasks = [replace(CHECK, name=f"C{n}", gigabytes=40) for n in range(4)]
    schedule(tasks, start, places=4, gigabytes=79)
    assert most == 1
    schedule(tasks, start, places=4, gigabytes=81)
    assert most == 2


def test_what_does_not_fit_is_skipped() -> None:
    seconds = SPARE_SECONDS + 2
    tasks = [CHECK, replace(TIMING, seconds=50, timeout=100)]
    results = schedule(tasks, lambda task: Pretended(0.1), seconds=seconds)
    skipped = by_name(results)["S1"]
    assert skipped["result"] == "skipped"
    assert "needs about 50 s, and 2 s are left" in skipped["why"]
    assert exit_code(tasks, results, is_dry=False) == 3


def test_time_is_kept_for_what_must_run() -> None:
    """A section that may be skipped does not take the time of one that may not."""
    seconds = SPARE_SECONDS + 5
    tasks = [
        replace(CHECK, name="C7", seconds=3, must=False),
        replace(TIMING, seconds=4),
    ]
    results = schedule(tasks, lambda task: Pretended(0.1), seconds=seconds)
    assert by_name(results)["C7"]["result"] == "skipped"
    assert "4 s of them for what may not be skipped" in by_name(results)["C7"]["why"]
    assert by_name(results)["S1"]["result"] == "passed"
    assert exit_code(tasks, results, is_dry=False) == 0


def test_what_hangs_is_killed() -> None:
    hanging = Pretended(1000)
    tasks = [replace(CHECK, timeout=0.3), replace(CHECK, name="C2")]

    def start(task: Task) -> Pretended:
        return hanging if task.name == "C1" else Pretended(0.1)

    results = schedule(tasks, start)
    assert hanging.is_killed
    assert by_name(results)["C1"]["result"] == "failed"
    assert "timed out after 0.3" in by_name(results)["C1"]["why"]
    assert by_name(results)["C2"]["result"] == "passed"
    assert exit_code(tasks, results, is_dry=False) == 1


def test_the_whole_ends_in_time() -> None:
    began = time.monotonic()
    seconds = SPARE_SECONDS + 0.5
    tasks = [replace(TIMING, timeout=100)]
    results = schedule(tasks, lambda task: Pretended(1000), seconds=seconds)
    assert time.monotonic() - began < seconds
    assert "when the time of the whole was up" in results[0]["why"]
    assert exit_code(tasks, results, is_dry=False) == 3


def test_a_section_that_cannot_start_ends_nothing() -> None:
    def start(task: Task) -> Pretended:
        if task.name == "C1":
            raise OSError("no memory")
        return Pretended(0.1)

    tasks = [CHECK, replace(CHECK, name="C2")]
    results = schedule(tasks, start)
    assert by_name(results)["C1"]["why"] == "did not start: OSError: no memory"
    assert by_name(results)["C2"]["result"] == "passed"


@pytest.mark.parametrize(
    ("kind", "result", "row", "is_dry", "code"),
    [
        ("correctness", "passed", {"ok": True}, False, 0),
        ("correctness", "failed", {"ok": False}, False, 1),
        ("correctness", "failed", {}, False, 1),  # it crashed
        ("correctness", "skipped", {}, False, 3),
        ("speed", "measured", {"met": False}, False, 0),  # a missed target is no failure
        ("speed", "failed", {}, False, 3),
        ("speed", "failed", {"ok": False}, False, 1),  # what is compared is not the same
        ("speed", "failed", {}, True, 1),
        ("speed", "dry", {}, True, 0),
    ],
)
def test_exit_codes(kind: Any, result: str, row: dict[str, bool], is_dry: bool, code: int) -> None:
    task = Task("X", kind, seconds=1, timeout=1, must=True)
    results = [{"section": "X", "result": result, "rows": [row]}]
    assert exit_code([task], results, is_dry) == code


def test_a_section_without_a_result_counts_as_skipped() -> None:
    assert exit_code([CHECK], [], is_dry=False) == 3
    assert exit_code([replace(CHECK, must=False)], [], is_dry=False) == 0


def test_sections_are_chosen_by_name_or_its_beginning() -> None:
    names = [section.task.name for section in choose(["s2", "C1"])]
    assert names == ["C1", "S2-1558m", "S2-350m", "S2-774m"]
    with pytest.raises(ValueError, match="--only C99 must be one of: C1, C2"):
        choose(["C99"])


def test_must_run_is_what_the_proof_rests_on() -> None:
    must = [section.task.name for section in SECTIONS if section.task.must]
    assert must == ["C1", "C2", "C3", "C4", "C5", "C6", "S1", "S2-1558m"]
    names = [task.name for task in tasks_of(choose(["S2-1558m"]), 80)]
    assert names == ["S2-1558m"]  # nothing runs beside which the cache could be filled
    names = [task.name for task in tasks_of(SECTIONS, 80)]
    assert names[:2] == ["S1-warm", "C1"]
    assert names.index("C6") < names.index("S2-1558m-warm") < names.index("C10")


def test_the_table_shows_every_figure(tmp_path: Path) -> None:
    file = tmp_path / "2030-01-01-X.jsonl"
    lines: list[dict[str, Any]] = [
        {
            "section": "header",
            "date": "2030-01-01",
            "card": "NVIDIA X",
            "torch": "9",
            "commit": "c",
        },
        {
            "section": "S1",
            "kind": "speed",
            "result": "measured",
            "seconds": 2.0,
            "rows": [{"what": "train", "value": 123456.0, "unit": "tokens/s", "target": ">= 2"}],
        },
        {"section": "S1-warm", "kind": "warm", "result": "passed", "seconds": 1.0, "rows": []},
        {
            "section": "C1",
            "kind": "correctness",
            "result": "failed",
            "why": "a | b",
            "seconds": 1.0,
            "rows": [{"what": "loss", "value": 0.5, "limit": 0.1, "ok": False}],
        },
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = markdown(*read_results(file))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| **C1** | CPU against CUDA, fp32 | 1 s | | **failed**: a / b |",
        "| | loss | 0.5 | <= 0.1 | **does not hold** |",
        "| **S1** | 124M: train against a bare loop and a nanoGPT-style one | 2 s | |"
        " **measured** |",
        "| | train | 123,456 tokens/s | >= 2 |  |",
    ]
    assert "1 x NVIDIA X" in text and "warm" not in text


def test_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="is no result file of this command"):
        read_results(file)


# --- the command


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it, on a machine that shows no GPU."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        env=clean_env(CUDA_VISIBLE_DEVICES="", **env),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_mistakes_on_the_command_line() -> None:
    done = command("--seconds", "60")
    assert done.returncode == 2
    assert "--seconds 60 must be at least 120" in done.stderr
    done = command("--only", "C99")
    assert done.returncode == 2
    assert "error: --only C99 must be one of" in done.stderr


def test_what_failed_is_run_again(tmp_path: Path) -> None:
    """Skipped and cut off counts as failed. `S1` is not `S1-hf`."""
    file = tmp_path / "earlier.jsonl"
    names = ["C1", "C2", "C3", "S1", "S1-hf", "S5"]
    lines: list[dict[str, Any]] = [{"section": "header", "date": "2030-01-01", "sections": names}]
    for name, result in (("C1", "passed"), ("C2", "failed"), ("C3", "skipped"), ("S1", "measured")):
        lines.append({"section": name, "kind": "speed", "result": result})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = command("--failed", str(file), "--list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["C2", "C3", "S5", "S1-hf"]


@pytest.mark.slow
@pytest.mark.long
def test_the_dry_run_has_every_section(tmp_path: Path) -> None:
    file = tmp_path / "dry.jsonl"
    done = command("--out", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    header, results = read_results(file)
    assert "card" not in header
    outcomes = {result["section"]: result["result"] for result in results}
    assert outcomes == {section.task.name: "dry" for section in SECTIONS}
    for result in results:
        assert result["rows"], f"{result['section']} has no figures"
    assert "a dry run on a CPU: no figure of it says anything about a GPU" in done.stdout


# --- a section by itself


def run_here(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, **replaced: Any) -> Result:
    """A section's dry run in this process, with something of its module replaced."""
    from benchmarks.gpu.listing import BY_NAME
    from benchmarks.gpu.section import run_section

    module = BY_NAME[name].function.split(".")[0]
    for attribute, value in replaced.items():
        monkeypatch.setattr(f"benchmarks.gpu.sections.{module}.{attribute}", value)
    run_section(name, folder, is_dry=True, seconds=60)
    return read_section(folder / f"{name}.jsonl", folder / f"{name}.log", 0)


def test_a_wrong_kernel_fails_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sees_the_future(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    result = run_here(monkeypatch, tmp_path, "C7", attend=sees_the_future)
    assert result["result"] == "failed"
    wrong = [row["what"] for row in result["rows"] if row["ok"] is False]
    assert "attention, T 64, causal" in wrong
    assert not [what for what in wrong if what.startswith("loss")]


def test_a_wrong_loss_fails_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_a_little(*args: Any) -> Any:
        return 1.01 * cross_entropy_sum(*args)

    result = run_here(monkeypatch, tmp_path, "C7", cross_entropy_sum=off_by_a_little)
    assert result["result"] == "failed"
    wrong = [row["what"] for row in result["rows"] if row["ok"] is False]
    assert "loss whole" in wrong
    assert not [what for what in wrong if what.startswith("attention")]


def test_a_nan_fails_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_a_number(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return q * k[:, :1] * v[:, :1] * float("nan")

    result = run_here(monkeypatch, tmp_path, "C7", attend=not_a_number)
    assert [row["ok"] for row in result["rows"] if row["what"].startswith("attention")] == [
        False
    ] * 8


def test_a_section_that_raises_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ctx: Any) -> None:
        ctx.measure("before", 1.0)
        raise RuntimeError("no such kernel")

    result = run_here(monkeypatch, tmp_path, "C10", no_host_sync=broken)
    assert result["result"] == "failed"
    assert result["why"].startswith("RuntimeError at test_gpu_proof.py:")
    assert result["why"].endswith("no such kernel")
    assert [row["what"] for row in result["rows"]] == ["before"]


def test_what_is_missing_skips_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run_here(monkeypatch, tmp_path, "C9")
    assert result == {"result": "skipped", "why": "transformers is missing", "rows": []}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run_here(monkeypatch, tmp_path, "C6")
    assert result == {"result": "skipped", "why": "deepspeed is missing", "rows": []}


# --- processes


def wait_for(process: Any, seconds: float = 20.0) -> int:
    end = time.monotonic() + seconds
    while (code := process.poll()) is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    return code


@pytest.mark.parametrize("kind", ["fork", "command"])
def test_a_process_that_crashes_or_hangs(tmp_path: Path, kind: str) -> None:
    """A crash leaves its exit code and last words; a kill also ends what the process started."""

    def start(name: str, code: str) -> Any:
        log = tmp_path / f"{name}.log"
        if kind == "fork":
            return Fork(lambda: exec(code), log, environment(), leads=True)
        return Command([sys.executable, "-c", code], log, environment(), leads=True)

    crashing = start("crash", "import os; os.write(2, b'last words\\n'); os._exit(7)")
    assert wait_for(crashing) == 7
    result = read_section(tmp_path / "none.jsonl", tmp_path / "crash.log", 7)
    assert result["why"] == "crashed with exit code 7: last words"

    pid_file = tmp_path / "pid"
    hanging = start(
        "hang",
        "import subprocess, pathlib, time\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
        "time.sleep(1000)",
    )
    end = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert hanging.poll() is None
    hanging.kill()
    assert hanging.poll() is not None
    end = time.monotonic() + 20
    while is_running(int(pid_file.read_text())):
        assert time.monotonic() < end
        time.sleep(0.02)


# --- what a machine with a card does: every process is a command


@pytest.mark.slow
def test_with_a_card_sections_are_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The machine is pretended to have a card, so the section fails where it asks for it."""
    monkeypatch.setattr(gpu, "probe", lambda: {"card": "NVIDIA H100", "memory_bytes": 85e9})
    monkeypatch.setattr(gpu.Whole, "make_data", lambda whole: "")
    file = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", "C7,S5", "--out", str(file)])
    assert gpu.main() == 1
    header, results = read_results(file)
    assert header["card"] == "NVIDIA H100" and header["sections"] == ["C7", "S5"]
    assert [result["section"] for result in results] == ["C7", "S5"]
    for result in results:
        assert result["result"] == "failed"
        assert "CUDA" in result["why"] or "NVIDIA" in result["why"]
        assert "Traceback" in result["log"]
    assert "C7" in capsys.readouterr().out


def test_a_section_ends_with_the_command(tmp_path: Path) -> None:
    """It leads a session of its own, so nothing else would end it."""
    code = (
        "import subprocess, sys\n"
        "child = 'from benchmarks.gpu.section import end_with_parent; import time;"
        " end_with_parent(); print(1, flush=True); time.sleep(1000)'\n"
        "process = subprocess.Popen([sys.executable, '-c', child], start_new_session=True,"
        " stdout=subprocess.PIPE)\n"
        "process.stdout.readline()\n"
        "print(process.pid)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    end = time.monotonic() + 20
    while is_running(int(done.stdout)):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.slow
def test_with_a_card_runs_are_commands(tmp_path: Path) -> None:
    """Two ranks of a real run on the CPU, and a run that fails."""
    make_data(tmp_path, is_dry=True)
    own = tmp_path / "X"
    own.mkdir()
    dry = Context(own, tmp_path / "X.jsonl", is_dry=True, is_warming=False, end=0)
    settings = small_settings(dry, run__steps=2)
    ctx: Any = SimpleNamespace(folder=own, is_dry=False)
    chains = [[Spec("one", settings)], [Spec("two", settings, world=2)]]
    run_chains(ctx, chains, at_once=2)
    assert largest_difference(ctx, "one", "two") < 1e-5
    wrong = settings | {"optim.lr": -1.0}
    with pytest.raises(RunFailed, match="wrong: exit code 2: .*optim.lr"):
        run_chains(ctx, [[Spec("wrong", wrong)]], at_once=1)


# --- two ranks on one card


@pytest.mark.parametrize(("wanted", "got"), [("gloo", "gloo"), (None, "nccl")])
def test_a_variable_chooses_the_backend(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, got: str
) -> None:
    """NCCL refuses two ranks on one GPU."""
    seen: list[Any] = []
    monkeypatch.setattr(start, "Accelerator", lambda **arguments: seen.append(arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DIST_LM_BACKEND", raising=False)
    if wanted:
        monkeypatch.setenv("DIST_LM_BACKEND", wanted)
    start._meet(Config(), None)
    (process_group,) = [
        handler
        for handler in seen[0]["kwargs_handlers"]
        if isinstance(handler, InitProcessGroupKwargs)
    ]
    assert process_group.backend == got
