"""The training loop, from a run's start to its end.

One step, in order: agree on stopping, evaluate, save, set the rate, micro-batches, update, record
the figures. The batch of a step is a function of (seed, step). Everything else that a run carries
along is in TrainState, the weights and the optimizer's tensors.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lm import families
from dist_lm.checkpoint.state import compose_state
from dist_lm.config import NO_TARGET, Config, due
from dist_lm.console import dispensable
from dist_lm.curves import draw_curves
from dist_lm.data.batches import Batch, Batches
from dist_lm.data.dataset import Dataset
from dist_lm.data.mix import count_left_out, merge_after
from dist_lm.data.prepared.progress import count_kinds
from dist_lm.data.prepared.shard_check import ShardCheck
from dist_lm.disk import open_own
from dist_lm.errors import UserError
from dist_lm.model import hf
from dist_lm.optim import lr_at, set_lr
from dist_lm.outcome import Attempt
from dist_lm.resume import Run, build, describe, find_resume_point
from dist_lm.runtime.fixed_point import spell
from dist_lm.runtime.late import LateFigures, Moment, late_figures_of
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
from dist_lm.sample import Sampling, sample
from dist_lm.spikes import (
    Spike,
)
from dist_lm.validate import validate

SAMPLE_TOKENS = 96  # of each text that an evaluation writes to samples.md
PROMPT_TOKENS = 16  # of held-out text, where run.sample_prompt is unset
SAMPLE_TEMPERATURES = (0.0, 0.8)


@dataclass
class Pending:
    """Figures of a step that are on their way to the host.

    They are read one step late, while the device works on the next step.
    """

    step: int
    lr: float
    loss_norm_targets_flags: LateFigures
    began: Moment  # where the step before ended, or an evaluation or a save after that
    forwarded: Moment  # the first forward of this rank has ended
    seconds_waiting: float  # for data
    batch_hash: LateFigures | None
    gradient_hashes: LateFigures | None  # of run.exact
    hashes: LateFigures | None  # of replicas, by rank
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
                reason = _train_and_keep(run)
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
    """The check of the shards, which rank 0 does. Damage makes it refuse in the next sum."""

    def refuse(error: UserError) -> None:
        runtime.refusal = error

    sets = data.shards() if runtime.is_main else []
    return ShardCheck(Path(config.run.dir), sets, refuse)


def _train_and_keep(run: Run) -> str:
    """Train; after an error still complete the checkpoint that is being written. All ranks."""
    config = run.config
    profiler = run.runtime.profiler(config.run.profile_steps, run.dir / "trace.json")
    try:
        while True:
            try:
                reason = train(run, profiler)
            except Spike as spike:
                _end_reading_and_saving(run)
                return_from(run, spike)
            else:
                profiler.stop()
                return reason
    except UserError:
        _end_reading_and_saving(run)
        raise


def _end_reading_and_saving(run: Run) -> None:
    """What has begun beside training comes to its end. All ranks."""
    if run.batches:
        run.batches.close()
    report_saving(run, run.saver.finish)


def train(run: Run, profiler: Any) -> str:
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
    record_start(run)
    pending: Pending | None = None
    began = Moment(runtime.device)

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
        loss_sum, forwarded = add_gradients(run, batch, targets)
        runtime.enter(state.step, "update")
        norm = runtime.engine.update()

        # All ranks: one small sum carries all that they must agree on. Its flags are read one step
        # late, with the figures.
        runtime.enter(state.step, "data")
        waiting = time.monotonic()
        next_batch = take_batch(run, batches)
        seconds_waiting = time.monotonic() - waiting
        flags = runtime.with_flags(next_batch.targets)
        agreed = runtime.sum(torch.cat([loss_sum[None], flags, runtime.of_main(norm)[None]]))
        loss_sum, next_targets, stop, are_refusing, norm = agreed

        figures = torch.stack([loss_sum / targets, norm, targets, stop, are_refusing])
        batch_hash = sum_of_hashes(run, batch)
        gradient_hashes = late_figures_of(runtime.engine.gradient_hashes())
        hashes = hashes_of_replicas(run, batch)
        late_figures = LateFigures(figures)

        # All ranks: read the figures of the step before, and keep those of this step.
        if pending:
            is_stopping = record_step(run, pending)
        state.advance(batch.after)
        runtime.has_made_a_step = True
        pending = Pending(
            step=state.step,
            lr=lr,
            loss_norm_targets_flags=late_figures,
            began=began,
            forwarded=forwarded,
            batch_hash=batch_hash,
            gradient_hashes=gradient_hashes,
            hashes=hashes,
            seconds_waiting=seconds_waiting,
            shares=batch.shares,
        )
        began = late_figures.moment
        batch = next_batch
        targets = next_targets
        profiler.step()

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
        loss_sum += engine.addend(loss.detach())
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
    loss, norm, targets, stop, are_refusing = pending.loss_norm_targets_flags.read()
    seconds = pending.loss_norm_targets_flags.moment.seconds_since(pending.began)
    runtime.note_own_seconds(
        pending.seconds_waiting + pending.forwarded.seconds_since(pending.began)
    )
    runtime.refuse_together(are_refusing)
    refuse_corrupt_replicas(run, pending.step, pending.hashes)
    judge_step(run, pending.step, lr=pending.lr, loss=loss, norm=norm)
    state.tokens += int(targets)

    extra: dict[str, Any] = dict(pending.shares)
    if pending.batch_hash is not None:
        (batch_hash,) = pending.batch_hash.read()
        extra["batch_hash"] = f"{int(batch_hash) % 2**64:016x}"
    if pending.gradient_hashes is not None:
        of_sum, *of_units = map(spell, pending.gradient_hashes.read())
        extra["grad_hash"] = of_sum
        if of_units:
            extra["unit_hashes"] = of_units
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


def evaluate(run: Run, is_saving: bool = False) -> None:
    """Held-out figures, and samples in which a reader sees the text become coherent.

    `is_saving`: this step gets a checkpoint, which the samples name. All ranks, in step.
    """
    run.runtime.enter(run.state.step, "evaluation")
    with run.metrics.pause("evaluation", run.state.step):
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
    runtime.enter(run.state.step, "save")
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
        facts_of_bits=runtime.engine.facts_of_bits(hf.shapes(spec)),
    )
    contents = {
        "config.json": families.config_json(spec, tokenizer.eot),
        "generation_config.json": families.generation_config_json(tokenizer.eot),
        "state.json": state,
    }
    texts = {name: json.dumps(content, indent=1) for name, content in contents.items()}
    with run.metrics.pause("save", run.state.step):
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
        unit=run.layout.unit,
        channel=runtime.reading,
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
