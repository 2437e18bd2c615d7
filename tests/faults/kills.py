"""Kills of a rank or of the launcher, by a seed, in every phase of a run, start and exit too.

Schedule number N is a function of N. After the kill all processes must end by themselves, and the
same command must then end in the same bits as a run that nobody disturbed.
"""

import contextlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from dist_lm.checkpoint.folder import step_folders, step_of
from dist_lm.config import DataConfig
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.errors import UserError
from dist_lm.metrics import read_metrics
from tests.conftest import TINY, text_of
from tests.procs import Process, finish, free_port, start_ranks

STEPS = 9
FLAGS = (
    f"--run.steps {STEPS} --run.save_every 2 --run.keep_last 1 --run.eval_every 4"
    " --run.eval_batches 1 --run.timeout_seconds 20 --data.micro_batch 2 --run.trackers"
)
PATIENCE = 120  # seconds until all have to be gone, before the schedule is given up
SPREADS = [
    ("single", 1),
    ("ddp", 2),
    ("ddp", 3),
    ("ddp", 4),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3", 3),
]
PHASES = ["imports", "start-up", "step", "save", "evaluation", "pruning", "exit"]


@dataclass(frozen=True)
class Schedule:
    number: int
    strategy: str
    world: int
    victim: str  # a rank, or the launcher
    phase: str
    signal: str
    delay: float  # seconds after the phase was seen

    def __str__(self) -> str:
        victim = self.victim if self.victim == "launcher" else f"rank {self.victim}"
        return f"{self.signal} to {victim} of {self.strategy} x {self.world} in {self.phase}"


@dataclass
class Figures:
    """What a schedule showed."""

    schedule: str
    seconds_until_all_ended: float = 0.0
    steps_lost: int = 0
    wrong: str = ""


def schedule(number: int) -> Schedule:
    rng = random.Random(f"kills {number}")
    strategy, world = rng.choice(SPREADS)
    phase = rng.choice(PHASES)
    has_launcher = world == 2 and (phase == "imports" or rng.random() < 0.3)
    victim = str(rng.randrange(world))
    if has_launcher and rng.random() < 0.6:
        victim = "launcher"
    number_of_signal = rng.choice(["SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM"])
    return Schedule(
        number=number,
        strategy=strategy,
        world=world,
        victim=f"{victim} under torchrun" if has_launcher and victim != "launcher" else victim,
        phase=phase,
        signal=number_of_signal,
        delay=rng.choice([0.0, 0.0, 0.05, 0.3, 1.0]),
    )


def arguments(folder: Path, run: Path, strategy: str) -> list[str]:
    """The command line of the run; the same every time it is started."""
    flags = dict(zip(TINY[::2], TINY[1::2], strict=True))
    words = FLAGS.split()
    words.remove("--run.trackers")
    flags |= dict(zip(words[::2], words[1::2], strict=True))
    launch = ["--launch", strategy] if strategy.startswith("zero") else []
    command = ["dist_lm/train.py", "--run.dir", str(run), "--data.input", str(folder / "shards")]
    for name, value in flags.items():
        command += [name, value]
    return [*command, "--run.trackers", *launch]


def reference(folder: Path, strategy: str, world: int) -> Path:
    """A run that nobody disturbed, made once."""
    if not (folder / "shards").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text.txt").write_text(text_of(150))
        data = DataConfig(
            input=str(folder / "text.txt"), separator="\n\n", tokenizer="byte", val_fraction=0.1
        )
        prepare_dataset(data, folder / "shards", 1, say=lambda *_: None)
    run = folder / f"{strategy}-{world}"
    if not run.exists():
        code, printed = finish(start_ranks(world, *arguments(folder, run, strategy)))
        assert code == 0, printed
    return run


# --- the processes of a run


def pids_of(run: Path) -> dict[str, int]:
    """The processes of a run that have not ended, by rank.

    Their environment names the rank. One without a rank is the `launcher`.
    """
    found = {}
    for process in psutil.process_iter():
        try:
            is_ours = str(run) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
            if is_ours:
                found[process.environ().get("RANK", "launcher")] = process.pid
        except psutil.Error:
            continue
    return found


class Started:
    """A run that was started, with torchrun or as ranks alone."""

    def __init__(self, folder: Path, run: Path, what: Schedule):
        self.run = run
        self.has_launcher = "launcher" in what.victim or "torchrun" in what.victim
        words = arguments(folder, run, what.strategy)
        if self.has_launcher:
            torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(what.world)]
            torchrun += ["--master-port", str(free_port())]
            with open(run.with_suffix(".out"), "w") as out:
                self.processes = [Process([sys.executable, *torchrun, *words], stdout=out)]
        else:
            self.processes = start_ranks(what.world, *words)  # they print less than a pipe holds

    def pid(self, victim: str) -> int | None:
        if not self.has_launcher:
            process = self.processes[int(victim)]
            return None if process.poll() is not None else process.pid
        name = victim.split()[0]
        return pids_of(self.run).get(name)

    def is_running(self) -> bool:
        has_process = any(process.poll() is None for process in self.processes)
        return has_process or (self.has_launcher and bool(pids_of(self.run)))

    def end(self) -> list[int]:
        """Kill what is left; its process ids."""
        left = [process.pid for process in self.processes if process.poll() is None]
        left += list(pids_of(self.run).values()) if self.has_launcher else []
        for pid in left:
            send(pid, signal.SIGKILL)
        for process in self.processes:
            process.communicate()
        return left


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error):
        psutil.Process(pid).send_signal(number)


# --- one schedule


def seen(run: Path, phase: str, started: Started, step: int) -> bool:
    """Whether the run is in this phase, or behind it."""
    if phase == "imports":
        return bool(pids_of(run)) if started.has_launcher else True
    if phase == "start-up":
        return (run / "run.lock").exists()
    if phase == "save":
        return any(run.glob(".step-*.tmp"))
    if phase == "pruning":
        return any(run.glob(".step-*.old.tmp"))
    if phase == "exit":
        return (run / f"step-{STEPS:08d}").exists()
    wanted = 4 if phase == "evaluation" else step
    return last_step(run) >= wanted


def last_step(run: Path) -> int:
    try:
        steps, _ = read_metrics(run)
    except UserError:
        return 0
    return int(steps[-1]["step"]) if steps else 0


def run_schedule(what: Schedule, folder: Path) -> Figures:
    """Start, kill, wait, start again, compare."""
    figures = Figures(str(what))
    whole = reference(folder, what.strategy, what.world)
    run = folder / f"killed-{what.number}"
    shutil.rmtree(run, ignore_errors=True)
    started = Started(folder, run, what)
    try:
        _strike(what, started)
        began = time.monotonic()
        while started.is_running() and time.monotonic() - began < PATIENCE:
            time.sleep(0.05)
        figures.seconds_until_all_ended = time.monotonic() - began
    finally:
        left = started.end()
    if left:
        figures.wrong = f"{len(left)} processes were left after {PATIENCE} s"
        return figures
    reached = last_step(run)
    saved = max(map(step_of, step_folders(run)), default=0) if run.exists() else 0
    figures.steps_lost = max(0, reached - saved)
    code, printed = finish(start_ranks(what.world, *arguments(folder, run, what.strategy)))
    figures.wrong = f"ended with {code}: {printed[-500:]}" if code else compare(run, whole)
    shutil.rmtree(run)
    return figures


def _strike(what: Schedule, started: Started) -> None:
    """Wait for the phase, and send the signal. If the run ends before, nothing is sent."""
    step = random.Random(what.number).randint(1, STEPS - 2)
    deadline = time.monotonic() + 120
    while not seen(started.run, what.phase, started, step) and started.is_running():
        assert time.monotonic() < deadline, f"{what}: the phase never came"
        time.sleep(0.001)
    time.sleep(what.delay)
    pid = started.pid(what.victim)
    if pid is not None:
        send(pid, signal.Signals[what.signal])


def compare(run: Path, whole: Path) -> str:
    """What differs from an undisturbed run: the last figures of each step, tensors, files."""
    compared: list[tuple[str, Callable[[Path], object]]] = [
        ("figures", figures_of),
        ("tensors", lambda path: tensors_of(path).keys()),
        ("files", names_in),
    ]
    for name, of in compared:
        if of(run) != of(whole):
            return f"other {name}: {of(run)} instead of {of(whole)}"
    ours, theirs = tensors_of(run), tensors_of(whole)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    return f"other bits in {different[:3]}" if different else ""


def names_in(run: Path) -> list[str]:
    """The files of a run, but for its picture: a run that has ended does not draw again."""
    return sorted(file.name for file in run.iterdir() if file.name != "loss.png")


def figures_of(run: Path) -> list[tuple[object, ...]]:
    """Of each step: its batch, loss and norm."""
    steps, evaluations = read_metrics(run)
    figures = [(one["step"], one["batch_hash"], one["loss"], one["grad_norm"]) for one in steps]
    return [*figures, *((one["step"], one["val_loss"]) for one in evaluations)]


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((run / f"step-{STEPS:08d}").glob("*.safetensors")):
        found |= load_file(file)
    return found
