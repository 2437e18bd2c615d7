"""The training loop, from a run's start to its end.

One step, in order: agree on stopping, evaluate, save, set the rate, micro-batches, update, record
the figures. The batch of a step is a function of (seed, step). Everything else that a run carries
along is in TrainState, the weights and the optimizer's tensors.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lm import families
from dist_lm.checkpoint.state import compose_state
from dist_lm.config import NO_TARGET, Config
from dist_lm.console import dispensable
from dist_lm.curves import draw_curves
from dist_lm.data.batches import Batch, Batches
from dist_lm.data.dataset import Dataset
from dist_lm.data.mix import count_left_out, merge_after
from dist_lm.data.prepared.progress import count_kinds
from dist_lm.data.prepared.shard_check import ShardCheck
from dist_lm.disk import open_own
from dist_lm.errors import DivergedError, UserError
from dist_lm.optim import lr_at, set_lr
from dist_lm.outcome import Attempt
from dist_lm.resume import Run, build, describe, find_resume_point
from dist_lm.runtime.late import LateFigures, Moment
from dist_lm.runtime.start import hold_folder, start
from dist_lm.runtime.world import Runtime
from dist_lm.sample import Sampling, sample
from dist_lm.validate import validate

SAMPLE_TOKENS = 96  # of each text that an evaluation writes to samples.md
PROMPT_TOKENS = 16  # of held-out text, where run.sample_prompt is unset
SAMPLE_TEMPERATURES = (0.0, 0.8)
SMALLEST_SCALE = 1.0  # an fp16 loss scale below this means that the loss itself is not finite


@dataclass
class Pending:
    """Figures of a step that are on their way to the host.

    They are read one step late, while the device works on the next step.
    """

    step: int
    lr: float
    loss_norm_targets_flags: LateFigures
    began: Moment  # where the step before ended, or an evaluation or a save after that
    seconds_waiting: float  # for data
    batch_hash: LateFigures | None
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
    try:
        hold_folder(runtime)
        point = find_resume_point(runtime, config, allow_change)
        if point:
            with _shard_check(runtime, config, point.data) as check:
                run = build(runtime, config, point)
                describe(run)
                runtime.on_main(check.wait)
                reason = _train_and_keep(run)
            finish(run, reason)
    except UserError:  # raised by all ranks together, so they can also leave together
        runtime.close()
        raise
    except Exception as error:  # of this rank alone
        runtime.give_up(error)
        raise
    runtime.close()
    return reason


def _shard_check(runtime: Runtime, config: Config, data: Dataset) -> ShardCheck:
    """The check of the shards, which rank 0 does. Damage makes it refuse in the next sum."""

    def refuse(error: UserError) -> None:
        runtime.refusal = error

    sets = data.shards() if runtime.is_main else []
    return ShardCheck(Path(config.run.dir), sets, refuse)


def _train_and_keep(run: Run) -> str:
    """Train; after an error still complete the checkpoint that is being written. All ranks."""
    try:
        return train(run)
    except UserError:
        if run.batches:
            run.batches.close()
        report_saving(run, run.saver.finish)
        raise


def train(run: Run) -> str:
    """The loop. All ranks run it, with one outcome; returns why it stopped early, or nothing."""
    config = run.config
    runtime = run.runtime
    state = run.state
    # All ranks: the first batch, and what they must agree on before its step.
    batches = training_batches(run)
    run.batches = batches
    batch = take_batch(run, batches)
    runtime.engine.warm_up(lambda: loss_of_nothing(run, batch))
    targets, is_stopping = agree_on_first_step(run, batch)
    first_step = state.step
    pending: Pending | None = None
    began = Moment(runtime.device)
    profiler = runtime.profiler(config.run.profile_steps, run.dir / "trace.json")

    while True:
        # All ranks: is this the last turn? It only evaluates and saves.
        has_ended = batch.end or state.step == run.steps
        is_leaving = has_ended or is_stopping or state.step == config.run.stop_after
        has_moved = state.step > first_step
        is_evaluating = has_moved and due(state.step, config.run.eval_every, at_the_end=has_ended)
        is_saving = has_moved and (is_leaving or due(state.step, config.run.save_every))

        # All ranks: record what is pending first, so that no NaN is ever saved. Rank 0 writes
        # samples and the curve.
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

        # All ranks, each on its rows of the batch: gradients, and one update.
        lr = lr_at(config.optim, state.step, run.steps or 0)
        set_lr(run.optimizer, lr)
        loss_sum = add_gradients(run, batch, targets)
        norm = runtime.engine.update()

        # All ranks: one small sum carries all that they must agree on. Its flags are read one step
        # late, with the figures.
        waiting = time.monotonic()
        next_batch = take_batch(run, batches)
        seconds_waiting = time.monotonic() - waiting
        agreed = runtime.sum(torch.cat([loss_sum[None], runtime.with_flags(next_batch.targets)]))
        loss_sum, next_targets, stop, are_refusing = agreed

        figures = torch.stack([loss_sum / targets, norm.double(), targets, stop, are_refusing])
        batch_hash = sum_of_hashes(run, batch)
        late_figures = LateFigures(figures)

        # All ranks: read the figures of the step before, and keep those of this step.
        if pending:
            is_stopping = record_step(run, pending)
        state.advance(batch.after)
        pending = Pending(
            step=state.step,
            lr=lr,
            loss_norm_targets_flags=late_figures,
            began=began,
            batch_hash=batch_hash,
            seconds_waiting=seconds_waiting,
            shares=batch.shares,
        )
        began = late_figures.moment
        batch = next_batch
        targets = next_targets
        profiler.step()

    profiler.stop()
    batches.close()
    run.has_ended = has_ended
    if has_ended or not is_stopping:
        return ""
    return runtime.why_stopped


def take_batch(run: Run, batches: Batches) -> Batch:
    """The next batch. Rows that this rank cannot read make it refuse in the next sum. All ranks."""
    batch = batches.take()
    if batch.failure:
        run.runtime.refusal = batch.failure
    return batch


def agree_on_first_step(run: Run, batch: Batch) -> tuple[Tensor, bool]:
    """The targets of the first global batch, and whether a rank was told to stop during start-up.

    All ranks.
    """
    runtime = run.runtime
    targets, stop, are_refusing = runtime.sum(runtime.with_flags(batch.targets))
    runtime.refuse_together(float(are_refusing))
    return targets, bool(stop)


def add_gradients(run: Run, batch: Batch, targets: Tensor) -> Tensor:
    """Forward and backward of this rank's micro-batches; the sum of its losses. All ranks.

    The loss is the sum over the global batch divided by its number of targets, however the batch is
    cut up.
    """
    engine = run.runtime.engine
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.runtime.device)
    for number, micro in enumerate(batch.micros, 1):
        with engine.micro_step(last=number == len(batch.micros)):
            loss = engine.model(
                micro.tokens_BT,
                micro.targets_BT,
                dropout_keys_B=micro.dropout_keys_B,
                segments_BT=micro.segments_BT,
            )
            engine.backward(loss / targets.float())
        loss_sum += loss.detach()
    return loss_sum


def loss_of_nothing(run: Run, batch: Batch) -> Tensor:
    """A loss without targets: zero, with gradients of zero.

    Its arguments are those of a step, so that a compiled model compiles what the step needs.
    """
    micro = batch.micros[0]
    loss: Tensor = run.runtime.engine.model(
        micro.tokens_BT,
        torch.full_like(micro.targets_BT, NO_TARGET),
        dropout_keys_B=micro.dropout_keys_B,
        segments_BT=micro.segments_BT,
    )
    return loss


def sum_of_hashes(run: Run, batch: Batch) -> LateFigures | None:
    """The hash of the global batch, if the run logs it: the sum over its rows. All ranks."""
    if not run.config.run.log_batch_hash:
        return None
    return LateFigures(run.runtime.sum(run.runtime.on_device([batch.row_hashes], torch.int64)))


def record_step(run: Run, pending: Pending) -> bool:
    """Read a step's figures, refuse what is not finite, record them. All ranks.

    Returns whether some rank was told to stop.
    """
    runtime = run.runtime
    state = run.state
    scaler = runtime.engine.scaler
    loss, norm, targets, stop, are_refusing = pending.loss_norm_targets_flags.read()
    seconds = pending.loss_norm_targets_flags.moment.seconds_since(pending.began)
    runtime.refuse_together(are_refusing)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        if not scaler.is_enabled() or scaler.get_scale() < SMALLEST_SCALE:
            run.metrics.close()
            raise DivergedError(
                f"diverged at step {pending.step}: loss={loss}, grad_norm={norm},"
                f" optim.lr={pending.lr}; no later step was saved; rule: finite on every rank; try"
                " a smaller optim.lr, a longer warm-up or optim.clip",
            )
        state.skipped_updates += 1
    state.tokens += int(targets)

    extra: dict[str, Any] = dict(pending.shares)
    if pending.batch_hash is not None:
        (batch_hash,) = pending.batch_hash.read()
        extra["batch_hash"] = f"{int(batch_hash) % 2**64:016x}"
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


def evaluate(run: Run, is_saving: bool = False) -> None:
    """Held-out figures, and samples in which a reader sees the text become coherent.

    `is_saving`: this step gets a checkpoint, which the samples name. All ranks, in step.
    """
    with run.metrics.pause():
        losses = []
        for name in run.data.val:
            losses.append(_evaluate_set(run, name, name))
            if run.config.run.ema:
                with run.runtime.engine.averaged():
                    _evaluate_set(run, name, f"{name} of ema")
        run.state.val_loss = losses[0]  # the first set decides which checkpoint is the best
        write_samples(run, losses[0], is_saving)


def _evaluate_set(run: Run, name: str, label: str) -> float:
    """The loss of a validation set, recorded under a label. All ranks."""
    figures = validate(
        run.runtime,
        run.runtime.engine.model,
        run.data.val[name],
        run.config,
        run.layout,
        run.data.tokenizer,
    )
    run.metrics.evaluation(run.state.step, label, figures)
    return figures["val_loss"]


def write_samples(run: Run, val_loss: float, is_saving: bool) -> None:
    """Continue a prompt at each temperature, for samples.md. All ranks; rank 0 writes.

    The texts are one batch: half the forwards, in each of which ZeRO-3 gathers weights.
    """
    tokenizer = run.data.tokenizer
    tokens = prompt_of_samples(run)
    prompt = run.config.run.sample_prompt or tokenizer.decode(tokens)
    rows = len(SAMPLE_TEMPERATURES)
    settings = Sampling(SAMPLE_TOKENS, SAMPLE_TEMPERATURES)
    with run.runtime.engine.autocast():
        *_, continuations = sample(
            run.model, tokenizer, [tokens] * rows, settings, [0] * rows, stop_early=False
        )
    step = f"step-{run.state.step:08d}"
    checkpoint = f"checkpoint {step}" if is_saving else "no checkpoint of this step"
    texts = [f"## step {run.state.step}, loss {val_loss:.4f}, {checkpoint}", f"prompt {prompt!r}"]
    for temperature, continuation in zip(SAMPLE_TEMPERATURES, continuations, strict=True):
        texts.append(f"temperature {temperature}\n```\n{prompt}{continuation.text}\n```")
    if run.runtime.is_main:
        path = run.dir / "samples.md"
        with dispensable(path), open_own(path, "a", encoding="utf-8") as file:
            file.write("\n".join(texts) + "\n\n")


def prompt_of_samples(run: Run) -> list[int]:
    """The tokens of run.sample_prompt, or else the first ones of the held-out text."""
    tokenizer = run.data.tokenizer
    prompt = run.config.run.sample_prompt
    if prompt:
        return tokenizer.encode(prompt) or [tokenizer.eot]
    held_out = next(iter(run.data.val.values()))
    data = run.config.data
    (tokens,) = held_out.read([0], data.seq_len, data.stride)
    first = tokens[: min(PROMPT_TOKENS, data.seq_len)].tolist()
    if tokenizer.eot in first:  # of one document only
        first = first[: first.index(tokenizer.eot)]
    return first or [tokenizer.eot]


def save(run: Run, last: bool) -> None:
    """Begin a checkpoint, which is written beside training; wait for the last one. All ranks."""
    config = run.config
    runtime = run.runtime
    tokenizer = run.data.tokenizer
    spec = config.model_spec(tokenizer.vocab_size)
    streams = merge_after(runtime.channel.gather(run.state.streams))
    if last:
        _say_left_out(runtime, streams)
    state = compose_state(
        run.state,
        streams=streams,
        strategy=runtime.strategy,
        world_size=runtime.world_size,
        scaler=runtime.engine.scaler.state_dict(),
        config=config,
        data_identity=run.data.identity,
    )
    contents = {
        "config.json": families.config_json(spec, tokenizer.eot),
        "generation_config.json": families.generation_config_json(tokenizer.eot),
        "state.json": state,
    }
    texts = {name: json.dumps(content, indent=1) for name, content in contents.items()}
    with run.metrics.pause():
        report_saving(run, run.saver.finish)
        run.saver.begin(run.state.step, spec, runtime.engine.owned, texts, tokenizer)
        if last:
            run.saver.finish()


def _say_left_out(runtime: Runtime, streams: dict[str, Any]) -> None:
    """Print how much the streams have left out in the whole run so far, by kind."""
    left_out = count_left_out(streams)
    if left_out:
        runtime.say(f"left out so far: {count_kinds(left_out)}")


def report_saving(run: Run, look: Callable[[], None]) -> None:
    """Warn about a checkpoint in mid-run that could not be written. It does not end the run."""
    try:
        look()
    except UserError as error:
        run.runtime.say(f"warning: {error}; training goes on")


def due(step: int, every: int, at_the_end: bool = False) -> bool:
    """Whether this step is a multiple of `every`. Never for 0."""
    return every > 0 and (at_the_end or step % every == 0)


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
        channel=runtime.reading,
    )
    return Batches(
        reader,
        config.data,
        run.layout,
        runtime.device,
        eot=data.tokenizer.eot,
        first_step=run.state.step,
        dropout_seed=config.run.seed if config.model.dropout > 0 else None,
        hash_rows=config.run.log_batch_hash,
    )
