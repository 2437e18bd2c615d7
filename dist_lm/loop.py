"""The training loop, from a run's start to its end.

`run_to_end` has the phases of a run, `train` the loop, and `make_step` one step. The batch of a
step is a function of (seed, step). Everything else that a run carries along is in TrainState, in
the weights and in the optimizer's tensors.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lm.config import NO_TARGET, Config, due
from dist_lm.console import dispensable
from dist_lm.curves import draw_curves
from dist_lm.data.batches import Batch, Batches
from dist_lm.data.dataset import Dataset
from dist_lm.data.prepared.shard_check import ShardCheck
from dist_lm.disk import open_own
from dist_lm.errors import UserError
from dist_lm.evaluation import evaluate
from dist_lm.optim import lr_at, set_lr
from dist_lm.outcome import Attempt
from dist_lm.resume import Run, build, describe, find_resume_point
from dist_lm.runtime.late import LateFigures, Moment
from dist_lm.runtime.start import hold_folder, start
from dist_lm.runtime.world import Runtime
from dist_lm.safeguards import (
    hashes_of_replicas,
    judge_step,
    loss_of,
    refuse_corrupt_replicas,
    return_from,
    shortage_of_memory,
)
from dist_lm.saving import report_saving, save
from dist_lm.spikes import Spike


@dataclass
class Pending:
    """Figures of a step that are on their way to the host.

    They are read one step late, while the device works on the next step.
    """

    step: int
    lr: float
    # Loss, gradient norm, targets, how many ranks were told to stop, and how many refuse to go on.
    figures: LateFigures
    began: Moment  # where the step before ended, or an evaluation or a save after that
    forwarded: Moment  # the first forward of this rank has ended
    seconds_waiting: float  # for data
    batch_hash: LateFigures | None
    replica_hashes: LateFigures | None  # by rank
    shares: dict[str, float]  # of a mixture


def run_to_end(
    config: Config,
    attempt: Attempt,
    launch: str | None = None,
    allow_change: Sequence[str] = (),
) -> str:
    """Meet the other ranks, train, and leave together. All ranks.

    `launch` names a strategy, and `allow_change` settings that a resumed run may change. Returns
    why the run stopped early, or nothing.
    """
    runtime = start(config, launch, attempt)
    reason = ""
    vocab_size = 1
    try:
        hold_folder(runtime)
        point = find_resume_point(runtime, config, allow_change)
        if point:
            vocab_size = point.data.tokenizer.vocab_size
            with _shard_check(runtime, config, point.data) as check:
                run = build(runtime, config, point)
                describe(run)
                runtime.on_main(check.wait)
                reason = _train_through_spikes(run)
            finish(run, reason)
    except torch.OutOfMemoryError as error:  # of this rank, perhaps alone
        shortage = shortage_of_memory(runtime, config, vocab_size)
        runtime.give_up(shortage)
        raise shortage from error
    except UserError:  # raised by all ranks together, so they can also leave together
        runtime.close()
        raise
    except Exception as error:  # of this rank alone
        runtime.give_up(error)
        raise
    runtime.close()
    return reason


def _shard_check(runtime: Runtime, config: Config, data: Dataset) -> ShardCheck:
    """The check of the shards. Rank 0 does it, and after damage refuses in the next sum."""

    def refuse(error: UserError) -> None:
        runtime.refusal = error

    sets = data.shards() if runtime.is_main else []
    return ShardCheck(Path(config.run.dir), sets, refuse)


def _train_through_spikes(run: Run) -> str:
    """Train, and go back after each spike; returns why the run stopped early. All ranks.

    A checkpoint that is being written is completed also after an error.
    """
    config = run.config
    run.runtime.start_profiler(config.run.profile_steps, run.dir / "trace.json")
    try:
        while True:
            try:
                reason = train(run)
            except Spike as spike:
                _end_reading_and_saving(run)
                return_from(run, spike)
            else:
                run.runtime.profiler.stop()
                return reason
    except UserError:
        _end_reading_and_saving(run)
        raise


def _end_reading_and_saving(run: Run) -> None:
    """End what works beside training: reading ahead, and writing a checkpoint. All ranks."""
    end_reading(run)
    report_saving(run, run.saver.finish)


def train(run: Run) -> str:
    """Make the steps of a run. All ranks run every paragraph, with one outcome.

    Returns why the run stopped early, or nothing.
    """
    config = run.config
    runtime = run.runtime
    state = run.state
    batch, targets, is_stopping = begin(run)
    first_step = state.step
    began = Moment(runtime.device)
    pending: Pending | None = None

    while True:
        # All ranks: decide what is due. The last turn only evaluates and saves.
        has_ended = batch.end or state.step == run.steps
        is_leaving = has_ended or is_stopping or state.step == config.run.stop_after
        has_moved = state.step > first_step
        is_evaluating = has_moved and due(state.step, config.run.eval_every, at_the_end=has_ended)
        is_saving = has_moved and (is_leaving or due(state.step, config.run.save_every))

        # All ranks: evaluate and save. The pending figures are read first, so no NaN is ever saved.
        if pending and (is_evaluating or is_saving or is_leaving):
            is_stopping |= record_step(run, pending)
            pending = None
        if is_evaluating:
            evaluate(run, is_saving)
        if is_saving:
            save(run, last=is_leaving)
        if is_leaving:
            break
        if is_evaluating or is_saving:
            began = Moment(runtime.device)  # a step's time is that of training alone
        report_saving(run, run.saver.poll)

        # All ranks, each on its rows of the batch: one update. The next batch is taken meanwhile.
        made, next_batch, targets = make_step(run, batch, targets, began)

        # All ranks: read the figures of the step before, while the device works on this one.
        if pending:
            is_stopping = record_step(run, pending)
        state.advance(batch.after)
        runtime.has_made_a_step = True
        pending = made
        began = made.figures.moment
        batch = next_batch
        runtime.profiler.step()

    # All ranks: reading ahead ends.
    end_reading(run)
    run.has_ended = has_ended
    if has_ended or not is_stopping:
        return ""
    return runtime.why_stopped


def begin(run: Run) -> tuple[Batch, Tensor, bool]:
    """Open the data and take the first batch. All ranks.

    Returns the batch, the targets of the global batch, and whether a rank was told to stop during
    start-up.
    """
    runtime = run.runtime
    run.batches = training_batches(run)
    batch = take_batch(run)
    runtime.engine.warm_up(lambda: loss_of_nothing(run, batch))
    targets, stop, are_refusing = runtime.sum(runtime.with_flags(batch.targets))
    runtime.refuse_together(float(are_refusing))
    record_start(run)
    return batch, targets, bool(stop)


def make_step(
    run: Run, batch: Batch, targets: Tensor, began: Moment
) -> tuple[Pending, Batch, Tensor]:
    """One update of the weights. All ranks.

    `targets` are those of the global batch. Returns the figures of the step, which are still on
    their way; the next batch; and the targets of the next global batch.
    """
    runtime = run.runtime
    step = run.state.step
    # All ranks: forward, backward and update.
    lr = lr_at(run.config.optim, step, run.steps or 0)
    set_lr(run.optimizer, lr)
    loss_sum, forwarded = add_gradients(run, batch, targets)
    runtime.enter(step, "update")
    norm = runtime.engine.update()

    # All ranks: take the next batch.
    runtime.enter(step, "data")
    waiting = time.monotonic()
    next_batch = take_batch(run)
    seconds_waiting = time.monotonic() - waiting

    # All ranks: one small sum carries all that they must agree on. Its flags are read one step
    # late, with the figures.
    flags = runtime.with_flags(next_batch.targets)
    agreed = runtime.sum(torch.cat([loss_sum[None], flags, runtime.of_main(norm)[None]]))
    loss_sum, next_targets, stop, are_refusing, norm = agreed
    figures = torch.stack([loss_sum / targets, norm, targets, stop, are_refusing])
    batch_hash = sum_of_hashes(run, batch)
    replica_hashes = hashes_of_replicas(run, batch)
    pending = Pending(
        step=step + 1,
        lr=lr,
        figures=LateFigures(figures),  # this step ends here, and the next one begins
        began=began,
        forwarded=forwarded,
        seconds_waiting=seconds_waiting,
        batch_hash=batch_hash,
        replica_hashes=replica_hashes,
        shares=batch.shares,
    )
    return pending, next_batch, next_targets


def training_batches(run: Run) -> Batches:
    """The batches from the run's step on. All ranks."""
    config = run.config
    data = run.data
    runtime = run.runtime
    reader = data.open_reader(
        config.data,
        state=run.state.streams,
        rank=runtime.rank,
        world=runtime.world_size,
        # A lone prepared folder needs none: each rank reads its own rows of it.
        channel=None if data.any_order else runtime.reading(),
    )
    return Batches(
        reader,
        config.data,
        run.layout,
        runtime.device,
        eot=data.tokenizer.eot,
        first_step=run.state.step,
        stepped_over=run.state.stepped_over,
        dropout_seed=config.run.seed if config.model.dropout > 0 else None,
        hash_rows=config.run.log_batch_hash,
    )


def take_batch(run: Run) -> Batch:
    """The next batch. Rows that this rank cannot read make it refuse in the next sum. All ranks."""
    assert run.batches, "begin() opens them"
    batch = run.batches.take()
    if batch.failure:
        run.runtime.refusal = batch.failure
    return batch


def end_reading(run: Run) -> None:
    """Close the batches, if they were opened. All ranks."""
    if run.batches:
        run.batches.close()


def record_start(run: Run) -> None:
    """Note in metrics.jsonl where and when this process begins to train. Rank 0."""
    if run.has_begun:  # it went back
        return
    run.has_begun = True
    attempt = run.runtime.attempt
    run.metrics.event(
        "start",
        run.state.step,
        time=time.time(),
        began=attempt.began,
        attempt=attempt.number,
        tokens=run.state.tokens,
        strategy=run.runtime.strategy,
        world_size=run.runtime.world_size,
    )


def add_gradients(run: Run, batch: Batch, targets: Tensor) -> tuple[Tensor, Moment]:
    """Forward and backward of this rank's micro-batches. All ranks.

    Returns the sum of its losses, and when its first forward had ended. The loss is the sum over
    the global batch divided by its number of targets, however the batch is cut up.
    """
    runtime = run.runtime
    engine = runtime.engine
    step = run.state.step
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    forwarded: Moment | None = None
    for number, micro in enumerate(batch.micros, 1):
        with engine.micro_step(last=number == len(batch.micros)):
            runtime.enter(step, "forward")
            loss = loss_of(run, micro)
            forwarded = forwarded or Moment(runtime.device)
            runtime.enter(step, "backward")
            engine.backward(loss / targets.float())
        loss_sum += loss.detach()
    assert forwarded, "a batch has a micro-batch"
    return loss_sum, forwarded


def loss_of_nothing(run: Run, batch: Batch) -> Tensor:
    """A loss without targets: zero, with gradients of zero.

    Its arguments are those of a step, so that a compiled model compiles what the step needs.
    """
    micro = batch.micros[0]
    no_targets_BT = torch.full_like(micro.targets_BT, NO_TARGET)
    return loss_of(run, replace(micro, targets_BT=no_targets_BT))


def sum_of_hashes(run: Run, batch: Batch) -> LateFigures | None:
    """The hash of the global batch, if the run logs it: the sum over its rows. All ranks."""
    if not run.config.run.log_batch_hash:
        return None
    return LateFigures(run.runtime.sum(run.runtime.on_device([batch.row_hashes], torch.int64)))


def record_step(run: Run, pending: Pending) -> bool:
    """Read a step's figures, judge them, record them. All ranks.

    Returns whether some rank was told to stop.
    """
    runtime = run.runtime
    state = run.state
    loss, norm, targets, stop, are_refusing = pending.figures.read()
    seconds = pending.figures.moment.seconds_since(pending.began)
    runtime.note_own_seconds(
        pending.seconds_waiting + pending.forwarded.seconds_since(pending.began)
    )
    runtime.refuse_together(are_refusing)
    refuse_corrupt_replicas(run, pending.step, pending.replica_hashes)
    judge_step(run, pending.step, lr=pending.lr, loss=loss, norm=norm)
    state.tokens += int(targets)
    state.curve.add_step(pending.step, state.tokens, loss)

    extra: dict[str, Any] = dict(pending.shares)
    if pending.batch_hash is not None:
        (batch_hash,) = pending.batch_hash.read()
        extra["batch_hash"] = f"{int(batch_hash) % 2**64:016x}"
    scaler = runtime.engine.scaler
    if scaler.is_enabled():
        extra["scale"] = scaler.get_scale()
        extra["skipped_updates"] = state.skipped_updates
    # If the lock is lost, the file is another run's. The ranks agree on that in the next step.
    if not runtime.attempt.lock.lost:
        run.metrics.step(
            step=pending.step,
            loss=loss,
            lr=pending.lr,
            grad_norm=norm,
            tokens=state.tokens,
            tokens_per_second=targets / seconds,
            data_wait=pending.seconds_waiting / seconds,
            **extra,
        )
    return bool(stop)


def finish(run: Run, reason: str) -> None:
    """Draw the curve, and print what to type next. Rank 0."""
    run.metrics.close()
    if not run.runtime.is_main:
        return
    try:
        path = run.dir / "loss.png"
        with dispensable(path), open_own(path, "wb") as file:
            draw_curves([run.dir], file)
    except Exception as error:
        # A picture that cannot be drawn must not spoil a finished run.
        run.runtime.say(f"warning: no loss.png: {type(error).__name__}: {error}")
    run.runtime.say(f"step {run.state.step} is saved; {what_next(run, reason)}")


def what_next(run: Run, reason: str) -> str:
    """How to go on, or what to do with a run that is finished."""
    if reason:
        return f"stopped: {reason}; the same command goes on"
    if run.has_ended:
        return f"try: python -m dist_lm.generate --ckpt {run.dir} --prompt ..."
    of_steps = f" of {run.steps}" if run.steps else ""
    return (
        f"unfinished: run.stop_after={run.state.step}{of_steps} steps; the same command without"
        " run.stop_after, or with a larger one, goes on"
    )
