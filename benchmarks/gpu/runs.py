"""Whole runs of dist_lm/train.py, as a user starts them, and what they left.

A run has a name, settings, and a number of ranks. Runs that go on in one folder form a chain.
Chains run side by side.
"""

import contextlib
import random
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu.context import Context
from benchmarks.gpu.processes import ROOT, Command, Fork, environment
from benchmarks.gpu.resultfile import last_line, tail

LOOK_SECONDS = 0.02
PORTS = (15_000, 30_000)

Settings = dict[str, Any]  # {"model.layers": 4, ...}
Steps = list[dict[str, Any]]  # the lines of metrics.jsonl


@dataclass(frozen=True)
class Spec:
    """One start of train.py. Starts with the same name share a run folder."""

    name: str
    settings: Settings
    world: int = 0  # ranks; 0: one process that no launcher started
    launch: str | None = None  # the strategy
    env: Mapping[str, str] = field(default_factory=dict)


class RunFailed(Exception):
    """A run did not end with exit code 0."""


def small_settings(ctx: Context, **changes: Any) -> Settings:
    """Settings of a small run on the text. Keyword `run__steps` changes `run.steps`."""
    settings: Settings = {
        "model.layers": 4,
        "model.heads": 4,
        "model.width": 256,
        "data.input": str(ctx.text),
        "data.seq_len": 256,
        "data.global_batch": 16,
        "optim.lr": 1e-3,
        "optim.warmup_steps": 10,
        "run.eval_every": 0,
        "run.save_every": 0,
        "run.trackers": [],
        "run.timeout_seconds": 60.0,
    }
    if ctx.is_dry:
        settings |= {
            "model.layers": 2,
            "model.heads": 2,
            "model.width": 32,
            "data.seq_len": 64,
            "data.global_batch": 8,
        }
    for name, value in changes.items():
        settings[name.replace("__", ".")] = value
    return settings


def nested(settings: Settings) -> dict[str, dict[str, Any]]:
    """{"model.layers": 4} as {"model": {"layers": 4}}, for a YAML file."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = value
    return sections


def run_chains(ctx: Context, chains: Sequence[Sequence[Spec]], at_once: int) -> None:
    """Run chains side by side, each chain's runs one after another. Raises if a run fails."""
    if ctx.is_dry:
        at_once = 1
    waiting = [list(chain) for chain in chains]
    active: list[tuple[list[Spec], Ranks]] = []
    try:
        while waiting or active:
            while waiting and len(active) < at_once:
                chain = waiting.pop(0)
                active.append((chain, Ranks(ctx, chain[0])))
            time.sleep(LOOK_SECONDS)
            for entry in list(active):
                chain, ranks = entry
                if ranks.have_ended():
                    active.remove(entry)
                    if len(chain) > 1:
                        waiting.insert(0, chain[1:])
    finally:
        for _, ranks in active:
            ranks.kill()


class Ranks:
    """The processes of one start of train.py."""

    def __init__(self, ctx: Context, spec: Spec):
        self._name = spec.name
        self._log = ctx.folder / f"{spec.name}.log"
        file = ctx.folder / f"{spec.name}.yaml"
        settings = spec.settings | {"run.dir": str(folder_of(ctx, spec.name))}
        file.write_text(yaml.safe_dump(nested(settings)), encoding="utf-8")
        words = ["--config", str(file)]
        if spec.launch:
            words += ["--launch", spec.launch]
        port = free_port()
        self._processes: list[Command | Fork] = []
        for rank in range(max(1, spec.world)):
            env = environment(GLOO_SOCKET_IFNAME="lo") | spec.env  # all ranks are on this machine
            if spec.world:
                env |= _rank_environment(rank, spec.world, port)
            self._processes.append(_start_train(ctx, words, self._log, env))

    def have_ended(self) -> bool:
        """Whether all ranks have ended well. Raises as soon as one has not."""
        codes = [process.poll() for process in self._processes]
        bad = [code for code in codes if code]
        if bad:
            time.sleep(0.5)  # the others may say more
            self.kill()
            print(f"{self._name}:\n{tail(self._log)}")  # the result has the end of our own log
            raise RunFailed(f"{self._name}: exit code {bad[0]}: {last_line(self._log)}")
        return None not in codes

    def kill(self) -> None:
        for process in self._processes:
            process.kill()


def _rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _start_train(
    ctx: Context, words: list[str], log: Path, env: Mapping[str, str]
) -> Command | Fork:
    if not ctx.is_dry:
        command = [sys.executable, str(ROOT / "dist_lm" / "train.py"), *words]
        return Command(command, log, env, leads=False)

    def work() -> None:
        from dist_lm.errors import run_entry
        from dist_lm.train import main

        torch.set_num_threads(1)
        trace_only()
        sys.argv = ["dist_lm/train.py", *words]
        run_entry(main)

    return Fork(work, log, env, leads=False)


def trace_only() -> None:
    """In a dry run compile() traces and makes no kernels: that takes a minute on a CPU."""
    original = torch.compile

    def compile_without_inductor(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **(kwargs | {"backend": "aot_eager"}))

    torch.compile = compile_without_inductor  # type: ignore[assignment]


def free_port() -> int:
    """A port of this machine that nobody listens on.

    It is below those that the system gives out by itself: another process could get one of them
    before our ranks listen.
    """
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as door, contextlib.suppress(OSError):
            door.bind(("127.0.0.1", port))
            return port


# --- what a run left


def folder_of(ctx: Context, name: str) -> Path:
    return ctx.folder / name


def steps_of(ctx: Context, name: str) -> Steps:
    """The steps of a run, in order."""
    from dist_lm.metrics import read_metrics

    steps, _ = read_metrics(folder_of(ctx, name))
    return steps


def losses_of(ctx: Context, name: str) -> list[float]:
    return [step["loss"] for step in steps_of(ctx, name)]


def largest_difference(ctx: Context, name: str, other: str, key: str = "loss") -> float:
    """The largest relative difference of a figure over all steps of two runs."""
    ours = steps_of(ctx, name)
    theirs = steps_of(ctx, other)
    assert len(ours) == len(theirs) > 0, f"{name} has {len(ours)} steps, {other} {len(theirs)}"
    largest = 0.0
    for step, same_step in zip(ours, theirs, strict=True):
        difference = abs(step[key] - same_step[key]) / abs(same_step[key])
        if not difference <= largest:  # NaN too
            largest = difference
    return largest


def last_checkpoint(ctx: Context, name: str) -> Path:
    """The newest step folder of a run."""
    return max(folder_of(ctx, name).glob("step-*"))


def different_tensors(ctx: Context, name: str, other: str) -> list[str]:
    """The files of tensors that differ between the last checkpoints of two runs."""
    ours = last_checkpoint(ctx, name)
    theirs = last_checkpoint(ctx, other)
    names = {path.name for path in [*ours.glob("*.safetensors"), *theirs.glob("*.safetensors")]}
    assert names, f"{ours} has no tensors"
    different = []
    for file in sorted(names):
        if (ours / file).read_bytes() != (theirs / file).read_bytes():
            different.append(file)
    return different
