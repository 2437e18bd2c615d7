"""What a checkpoint costs: how long training waits for it, and how long a start loads it."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.claim import COST, Claim, Context, Measured, Target, must_equal, take_turns
from benchmarks.isolation import ZERO_MODULES, run_ranks
from benchmarks.loops import build_run, make_shards, train_to
from dist_lm import loop
from dist_lm.checkpoint.folder import step_folders
from dist_lm.checkpoint.load import read_weights, restore
from dist_lm.checkpoint.save import _elements
from dist_lm.checkpoint.state import verify_state
from dist_lm.resume import Run

_SIZE = {
    "model.layers": 7,
    "model.width": 768,
    "model.heads": 12,
    "data.seq_len": 64,
    "data.global_batch": 4,
}
_QUICK = {**_SIZE, "model.layers": 1, "model.width": 32, "model.heads": 2, "data.seq_len": 16}


def stall(ctx: Context, strategy: str) -> Measured:
    shards = make_shards(ctx.scratch / "shards", 2048, 20_000)
    settings = {"data.input": str(shards), **ctx.pick(_SIZE, _QUICK)}

    def be_rank(rank: int) -> Any:
        run = build_run(ctx.scratch / "run", strategy, settings)
        train_to(run, 1)
        found = _save_in_turns(ctx, run)
        found["equal"] = _is_saved(run)
        run.runtime.close()
        return found

    answers = run_ranks(2, be_rank, ctx.scratch)
    equal = must_equal([answer["equal"] for answer in answers], [True, True], "weights on disk")
    return Measured(answers[0]["ours"], answers[0]["other"], equal)


def _save_in_turns(ctx: Context, run: Run) -> dict[str, Any]:
    """The slowest rank's wait for a save, and for one copy of the bytes that it stages."""
    runtime = run.runtime
    elements = _elements(run.saver._pieces_of_this_rank())
    source = torch.ones(elements)
    target = torch.ones(elements)
    found: dict[str, Any] = {"ours": [], "other": []}
    # The first save also makes the memory that later ones use again.
    for number in range(ctx.rounds + 1):
        run.state.step = 2 + number
        runtime.barrier()
        began = time.perf_counter()
        loop.save(run, last=False)
        stalled = max(runtime.channel.gather(time.perf_counter() - began))
        run.saver.finish()
        runtime.barrier()
        began = time.perf_counter()
        target.copy_(source)
        copied = max(runtime.channel.gather(time.perf_counter() - began))
        if number:
            found["ours"].append(stalled)
            found["other"].append(copied)
    return found


def _is_saved(run: Run) -> bool:
    """Whether the newest checkpoint has the weights that this rank owns."""
    run.runtime.barrier()
    spec = run.config.model_spec(run.data.tokenizer.vocab_size)
    weights = read_weights(step_folders(run.dir)[-1], spec)
    for part in run.runtime.engine.owned():
        saved = weights[part.name].flatten()[part.start : part.stop]
        if not torch.equal(saved, part.weight[: len(saved)]):
            return False
    return True


def load(ctx: Context) -> Measured:
    """Weights and moments into a run that is built, without verification, against torch.load.

    The files are in the system's cache, so CPU time is all the time there is.
    """
    shards = make_shards(ctx.scratch / "shards", 2048, 20_000)
    settings = {"data.input": str(shards), **ctx.pick(_SIZE, _QUICK)}
    run = build_run(ctx.scratch / "run", "single", settings)
    train_to(run, 1)
    folder = step_folders(run.dir)[-1]
    plain = ctx.scratch / "plain.pt"
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, plain)
    spec = run.config.model_spec(run.data.tokenizer.vocab_size)
    engine = run.runtime.engine
    expected = _everything(run)

    def ours() -> None:
        restore(folder, spec, engine.owned(), optimizer=True)

    def theirs() -> None:
        found = torch.load(plain, weights_only=True)
        run.model.load_state_dict(found["model"])
        run.optimizer.load_state_dict(found["optimizer"])

    for side in (ours, theirs):
        _forget(run)
        side()
        equal = must_equal(_differences(_everything(run), expected), [], "weights and moments")
    measured = take_turns(ctx, ours, theirs, equal, clock="cpu")
    verified = [_seconds_verified(folder, ours) for _ in range(ctx.rounds)]
    measured.notes["with verification, x the time"] = round(
        statistics.median(verified) / statistics.median(measured.other), 2
    )
    run.runtime.close()
    return measured


def _seconds_verified(folder: Path, ours: Any) -> float:
    began = time.process_time()
    verify_state(folder)
    ours()
    return time.process_time() - began


def _everything(run: Run) -> list[torch.Tensor]:
    tensors = []
    for part in run.runtime.engine.owned():
        tensors.append(part.weight.clone())
        tensors += [values.clone() for values in part.state.values()]
    return tensors


@torch.no_grad()
def _forget(run: Run) -> None:
    for part in run.runtime.engine.owned():
        part.weight.zero_()
        for values in part.state.values():
            values.zero_()


def _differences(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[int]:
    differing = []
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(one, other):
            differing.append(number)
    return differing


CLAIMS = (
    Claim(
        name="checkpoint-stall-ddp",
        sentence="training waits for a checkpoint under DDP, against one copy of its bytes",
        figure=COST,
        target=Target(most=1.0),
        measure=lambda ctx: stall(ctx, "ddp"),
        threads=2,
        probe="copy",
    ),
    Claim(
        name="checkpoint-stall-zero3",
        sentence="training waits for a checkpoint under ZeRO-3, against one copy of its bytes",
        figure=COST,
        target=Target(most=1.0),
        measure=lambda ctx: stall(ctx, "zero3"),
        threads=2,
        probe="copy",
        preload=ZERO_MODULES,
    ),
    Claim(
        name="checkpoint-load",
        sentence="loading weights and moments, unverified, against torch.load (50 M parameters)",
        figure=COST,
        target=Target(most=0.6),
        measure=load,
        probe="copy",
    ),
)
