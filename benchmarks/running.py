"""Runs claims, each in a process of its own, and makes an entry of what it measured."""

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.claim import Claim, Context, summarize
from benchmarks.isolation import Fork

_SECONDS = 600  # that a claim may take
_QUICK_SECONDS = 120
# What nearly every claim needs. `datasets` is not among them: it starts a thread.
_PRELOAD = ("torch", "dist_lm.loop", "dist_lm.generate")


@dataclass
class Outcome:
    """How the run of a claim ended. One of the three is not empty."""

    claim: Claim
    entry: dict[str, Any] | None = None
    skipped: str = ""
    failed: str = ""


def prepare_imports(claims: Sequence[Claim]) -> None:
    """Import what claims need, before anything is forked."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # or numpy starts threads, which a fork would lose
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ["DS_ACCELERATOR"] = "cpu"  # as dist_lm sets it before it imports DeepSpeed
    modules = list(_PRELOAD)
    for claim in claims:
        modules += claim.preload
    for module in dict.fromkeys(modules):
        importlib.import_module(module)


def why_skipped(claim: Claim, nanogpt: Path | None) -> str:
    """What a claim needs that is not here, or nothing."""
    missing = [peer for peer in claim.peers if not machine.is_installed(peer)]
    if missing:
        return f"{', '.join(missing)} is not installed; nearest: pip install -e '.[peers]'"
    if claim.needs_nanogpt and nanogpt is None:
        return "it compares with a checkout of nanoGPT; nearest: --nanogpt DIR"
    return ""


class Runner:
    """Runs claims on this machine."""

    def __init__(
        self,
        is_quick: bool,
        nanogpt: Path | None,
        keep: Callable[[dict[str, Any]], None] = lambda entry: None,
    ):
        """`keep` gets each entry as soon as it is there."""
        self._keep = keep
        self._is_quick = is_quick
        self._nanogpt = nanogpt
        self._facts = machine.facts()
        self._cores = sorted(os.sched_getaffinity(0))

    def run_all(self, claims: Sequence[Claim]) -> list[Outcome]:
        """All, one after another; quick ones side by side, one a core."""
        if not self._is_quick:
            outcomes = []
            for number, claim in enumerate(claims, 1):
                print(f"{number} of {len(claims)}: {claim.name}", file=sys.stderr, flush=True)
                outcomes.append(self._finish(claim, self._start(claim, 0)))
                self._say(outcomes[-1])
            return outcomes
        return self._run_side_by_side(claims)

    def _run_side_by_side(self, claims: Sequence[Claim]) -> list[Outcome]:
        outcomes = []
        waiting = list(claims)
        lanes = min(2, len(self._cores))
        running: list[tuple[Claim, Any]] = []
        while waiting or running:
            while waiting and len(running) < lanes:
                claim = waiting.pop(0)
                running.append((claim, self._start(claim, len(running))))
            claim, started = running.pop(0)
            outcomes.append(self._finish(claim, started))
            self._say(outcomes[-1])
        return outcomes

    def _say(self, outcome: Outcome) -> None:
        print(words_of(outcome, self._is_quick), flush=True)
        if outcome.entry:
            self._keep(outcome.entry)

    def _start(self, claim: Claim, lane: int) -> "str | tuple[Fork, Path]":
        """Why it is skipped, or the process that measures it and the folder that it may use."""
        why = why_skipped(claim, self._nanogpt)
        if why:
            return why
        scratch = Path(tempfile.mkdtemp(prefix="benchmarks-"))
        work = scratch / "work"
        work.mkdir()
        ctx = Context(
            scratch=work,
            is_quick=self._is_quick,
            rounds=1 if self._is_quick else claim.rounds,
            nanogpt=self._nanogpt,
        )
        return Fork(lambda: self._measure(claim, ctx, lane), scratch / "log", leads=True), scratch

    def _measure(self, claim: Claim, ctx: Context, lane: int) -> dict[str, Any]:
        """In the fork: both sides, and the probe before and after them."""
        os.chdir(ctx.scratch)
        cores = self._cores[: claim.threads]
        if self._is_quick:
            cores = [self._cores[lane % len(self._cores)]]
        os.sched_setaffinity(0, set(cores))
        measured = claim.measure(ctx)
        import torch  # slow; after the claim, which may fork ranks

        torch.set_num_threads(len(cores))
        probe = machine.probe(claim.probe, self._is_quick)
        return {**asdict(measured), "probe": probe}

    def _finish(self, claim: Claim, started: "str | tuple[Fork, Path]") -> Outcome:
        if isinstance(started, str):
            return Outcome(claim, skipped=started)
        fork, scratch = started
        try:
            found = fork.result(_QUICK_SECONDS if self._is_quick else _SECONDS)
        except RuntimeError as error:
            return Outcome(claim, failed=str(error))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return Outcome(claim, entry=self._entry(claim, found))

    def _entry(self, claim: Claim, found: dict[str, Any]) -> dict[str, Any]:
        """What a result file holds."""
        from benchmarks.claim import Measured  # the words of asdict, back again

        probe = found.pop("probe")
        measured = Measured(**found)
        numbers = summarize(claim.figure, measured)
        return {
            "name": claim.name,
            **{name: float(f"{value:.4g}") for name, value in numbers.items()},
            "unit": claim.figure.unit,
            "is_met": claim.target.is_met(numbers["figure"]),
            "ours": [float(f"{value:.4g}") for value in measured.ours],
            "other": [float(f"{value:.4g}") for value in measured.other],
            "equal": measured.equal,
            "notes": measured.notes,
            "threads": claim.threads,
            "probe": probe,
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            **self._facts,
        }


def words_of(outcome: Outcome, is_quick: bool = False) -> str:
    """A line for the terminal. Figures of small sizes mean nothing, so they are not in it."""
    claim = outcome.claim
    if outcome.skipped:
        return f"{claim.name}: skipped: {outcome.skipped}"
    entry = outcome.entry
    if entry is None:
        return f"{claim.name}: FAILED\n{outcome.failed}"
    if is_quick:
        return f"{claim.name}: works; {entry['equal']}"
    target = claim.target.words()
    verdict = "met" if entry["is_met"] else "missed"
    return f"{claim.name}: {figure_words(entry)}; target {target}: {verdict}; {entry['equal']}"


def figure_words(entry: dict[str, Any]) -> str:
    """A figure with its range."""
    numbers = [_digits(entry[name]) for name in ("figure", "least", "most")]
    return f"{numbers[0]} {entry['unit']} ({numbers[1]} to {numbers[2]})"


def _digits(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    if 0 < abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}"
