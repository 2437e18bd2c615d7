"""The training loop, from a run's start to its end.

One step, in order: agree on stopping, evaluate, save, set the rate, micro-batches, update, record
the figures. The batch of a step is a function of (seed, step). Everything else that a run carries
along is in TrainState, the weights and the optimizer's tensors.
"""

import json
import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lm import families
from dist_lm.checkpoint.state import compose_state
from dist_lm.config import NO_TARGET, Config
from dist_lm.console import dispensable
from dist_lm.curves import draw_curves
from dist_lm.data.batches import Batch, Batches, Micro
from dist_lm.data.dataset import Dataset
from dist_lm.data.mix import count_left_out, merge_after
from dist_lm.data.order import batch_of_step
from dist_lm.data.prepared.progress import count_kinds
from dist_lm.data.prepared.shard_check import ShardCheck
from dist_lm.disk import open_own
from dist_lm.errors import DivergedError, RetryableError, UserError
from dist_lm.optim import lr_at, set_lr
from dist_lm.outcome import Attempt
from dist_lm.resume import Run, build, describe, find_resume_point, go_back
from dist_lm.runtime.engine import ReplicatedEngine
from dist_lm.runtime.late import LateFigures, Moment
from dist_lm.runtime.replicas import hash_of_bits, who_computes_otherwise, who_differs
from dist_lm.runtime.start import hold_folder, start
from dist_lm.runtime.world import Runtime
from dist_lm.sample import Sampling, sample
from dist_lm.spikes import (
    LONGEST_RANGE,
    STRETCH,
    WINDOW,
    Ranges,
    Spike,
    far_off,
    spell_ranges,
    with_range,
)
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
    forwarded: Moment  # the first forward of this rank has ended
    seconds_waiting: float  # for data
    batch_hash: LateFigures | None
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


def shortage_of_memory(runtime: Runtime, config: Config, vocab_size: int) -> UserError:
    """What to say when this rank's device had too little memory."""
    from dist_lm.planning.shortage import explain_shortage  # slow, and seldom needed

    strategy = runtime.engine.strategy
    world = runtime.world_size
    text = explain_shortage(config, strategy, vocab_size, world=world, device=runtime.device)
    return UserError(text)


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


def return_from(run: Run, spike: Spike) -> None:
    """Go back to the last good checkpoint, and step over the data up to the spike. All ranks.

    What is stepped over is the same from whichever checkpoint the run goes back, and a run that is
    killed before it has saved that meets the same spike again. So an interrupted run is the same.
    """
    run.runtime.has_made_a_step = False  # what follows is a start-up
    run.runtime.enter(run.state.step, "start-up")
    _end_reading_and_saving(run)
    known = run.state.stepped_over
    latest = max(spike.step - STRETCH, 0)
    last = batch_of_step(spike.step - 1, known)
    refuse_endless_returns(run, spike, with_range(known, batch_of_step(latest, known), last + 1))
    go_back(run, latest)
    step = run.state.step
    first = batch_of_step(max(step, latest), known)
    run.state.stepped_over = with_range(known, first, last + 1)
    done = f"went back to step {step}, steps over global batches {first} to {last}"
    record_spike(run, spike, [first, last], done, back=step, tokens=run.state.tokens)


def refuse_endless_returns(run: Run, spike: Spike, ranges: Ranges) -> None:
    """End a run that spikes again and again in one place, before it steps over more. All ranks."""
    if max(stop - start for start, stop in ranges) <= LONGEST_RANGE:
        return
    run.metrics.close()
    raise DivergedError(
        f"diverged at step {spike.step}: {spike.reason}; it did so again and again after going"
        f" back, the last time without global batches {spell_ranges(run.state.stepped_over)}; rule:"
        " a loss that falls; try a smaller optim.lr, or an earlier step as run.resume"
    )


def record_spike(run: Run, spike: Spike, batches: list[int], done: str, **facts: Any) -> None:
    """Say what happened at a step, and note it with the data that it may come from. Rank 0.

    `batches` has the first and the last of these global batches; their positions are those that
    count every sequence of the run.
    """
    size = run.config.data.global_batch
    first, last = batches
    run.runtime.say(f"warning: step {spike.step}: {spike.reason}; {done}")
    run.metrics.event(
        "spike",
        spike.step,
        loss=spike.loss,
        grad_norm=spike.norm,
        batches=batches,
        positions=[first * size, (last + 1) * size - 1],
        reason=spike.reason,
        done=done,
        **facts,
    )


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
            loss = engine.model(
                micro.tokens_BT,
                micro.targets_BT,
                dropout_keys_B=micro.dropout_keys_B,
                segments_BT=micro.segments_BT,
                bounds_N=micro.bounds_N,
            )
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
    loss: Tensor = run.runtime.engine.model(
        micro.tokens_BT,
        torch.full_like(micro.targets_BT, NO_TARGET),
        dropout_keys_B=micro.dropout_keys_B,
        segments_BT=micro.segments_BT,
        bounds_N=micro.bounds_N,
    )
    return loss


def sum_of_hashes(run: Run, batch: Batch) -> LateFigures | None:
    """The hash of the global batch, if the run logs it: the sum over its rows. All ranks."""
    if not run.config.run.log_batch_hash:
        return None
    return LateFigures(run.runtime.sum(run.runtime.on_device([batch.row_hashes], torch.int64)))


def hashes_of_replicas(run: Run, batch: Batch) -> LateFigures | None:
    """What the ranks compare after this step, if that is due: hashes by rank. All ranks.

    The first row is of the weights. With run.deterministic the second is of each rank's gradient of
    a micro-batch, and the third of that of the rank before it. They are also compared before a
    save, so that what is saved was checked.
    """
    config = run.config.run
    runtime = run.runtime
    engine = runtime.engine
    step = run.state.step + 1
    is_due = due(step, config.check_every) or due(step, config.save_every)
    if not (config.check_every and is_due and isinstance(engine, ReplicatedEngine)):
        return None
    hashes = torch.zeros(3, engine.world_size, dtype=torch.int64, device=runtime.device)
    hashes[0, engine.rank] = hash_of_bits(engine.bare.parameters())
    if config.deterministic and engine.has_replicas:
        ours = replace(batch.micros[0], bounds_N=None)  # their number differs between ranks
        theirs = ours.each(runtime.of_rank_before)
        hashes[1, engine.rank] = engine.hash_of_gradient(lambda: loss_of(run, ours))
        hashes[2, engine.rank] = engine.hash_of_gradient(lambda: loss_of(run, theirs))
    return LateFigures(runtime.sum(hashes))


def loss_of(run: Run, micro: Micro) -> Tensor:
    """The summed loss of a micro-batch."""
    loss: Tensor = run.runtime.engine.model(
        micro.tokens_BT,
        micro.targets_BT,
        dropout_keys_B=micro.dropout_keys_B,
        segments_BT=micro.segments_BT,
        bounds_N=micro.bounds_N,
    )
    return loss


def refuse_corrupt_replicas(run: Run, pending: Pending) -> None:
    """End the run if a rank has other weights than the others, or computes otherwise. All ranks."""
    if pending.hashes is None:
        return
    weights, own, of_neighbour = pending.hashes.read()
    what = "the weights"
    ranks = who_differs(weights)
    if not ranks:
        what = "the gradients of the same rows"
        ranks = who_computes_otherwise(own, of_neighbour)
    if not ranks:
        return
    hosts = run.runtime.channel.gather(socket.gethostname())
    names = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
    verdict = f"{what} of {names} are not those of the others"
    if len(ranks) > 1:
        verdict = f"{what} of {names} differ, and no majority says whose are right"
    run.metrics.close()
    raise RetryableError(
        f"corrupt at step {pending.step}: {verdict}; rule: equal bits on every rank; the same"
        " command goes on from the newest checkpoint, better without that device"
    )


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
    refuse_corrupt_replicas(run, pending)
    judge_step(run, pending, loss, norm)
    state.tokens += int(targets)

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


def judge_step(run: Run, pending: Pending, loss: float, norm: float) -> None:
    """Warn of figures that are far off, go back from them, or end the run. All ranks.

    Without run.on_spike=act only figures that are not finite end it. They never reach a checkpoint.
    """
    state = run.state
    scaler = run.runtime.engine.scaler
    on_spike = run.config.run.on_spike
    if math.isfinite(loss) and math.isfinite(norm):
        reason = ""
        if on_spike != "ignore":
            forget_before_new_stage(run, pending.step)
            reason = far_off(state.recent, loss, norm)
        spike = Spike(pending.step, loss, norm, reason)
        if reason and on_spike == "act":
            raise spike
        if reason and not run.is_spiking:
            batch = batch_of_step(pending.step - 1, state.stepped_over)
            record_spike(run, spike, [batch, batch], "the run goes on")
        run.is_spiking = bool(reason)
        state.recent = [*state.recent, [loss, norm]][-WINDOW:]
    elif scaler.is_enabled() and scaler.get_scale() >= SMALLEST_SCALE:
        state.skipped_updates += 1
    elif on_spike == "act":
        reason = f"loss={loss}, grad_norm={norm} is not finite"
        raise Spike(pending.step, loss, norm, reason)
    else:
        run.metrics.close()
        raise DivergedError(
            f"diverged at step {pending.step}: loss={loss}, grad_norm={norm},"
            f" optim.lr={pending.lr}; no later step was saved; rule: finite on every rank; try"
            " a smaller optim.lr, a longer warm-up or optim.clip",
        )


def forget_before_new_stage(run: Run, step: int) -> None:
    """Compare the steps of a stage with each other only: another mixture has another loss."""
    stages = run.config.data.stages
    if not stages or step < 2:
        return
    state = run.state
    before = batch_of_step(step - 2, state.stepped_over)
    batch = batch_of_step(step - 1, state.stepped_over)
    if any(before < stage.from_step <= batch for stage in stages):
        state.recent = []


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
        stepped_over=run.state.stepped_over,
        dropout_seed=config.run.seed if config.model.dropout > 0 else None,
        hash_rows=config.run.log_batch_hash,
    )
