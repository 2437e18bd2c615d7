"""Safeguards of a run: against spikes, corrupt ranks and too little memory.

The loop judges each step here, with the figures that all ranks have agreed on, so all ranks decide
alike. The rule for spikes is in spikes.py.
"""

import math
import socket
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_lm.config import Config, due
from dist_lm.data.batches import Batch, Micro
from dist_lm.data.order import batch_of_step
from dist_lm.errors import DivergedError, RetryableError, UserError
from dist_lm.resume import Run, go_back
from dist_lm.runtime.engine import ReplicatedEngine
from dist_lm.runtime.late import LateFigures
from dist_lm.runtime.replicas import hash_of_bits, who_computes_otherwise, who_differs
from dist_lm.runtime.world import Runtime
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

SMALLEST_SCALE = 1.0  # an fp16 loss scale below this means that the loss itself is not finite


# --- spikes


def judge_step(run: Run, step: int, *, lr: float, loss: float, norm: float) -> None:
    """Warn of figures that are far off, go back from them, or end the run. All ranks.

    Without run.on_spike=act only figures that are not finite end it. They never reach a checkpoint.
    """
    state = run.state
    scaler = run.runtime.engine.scaler
    on_spike = run.config.run.on_spike
    if math.isfinite(loss) and math.isfinite(norm):
        reason = ""
        if on_spike != "ignore":
            forget_before_new_stage(run, step)
            reason = far_off(state.recent, loss, norm)
        spike = Spike(step, loss, norm, reason)
        if reason and on_spike == "act":
            raise spike
        if reason and not run.is_spiking:
            batch = batch_of_step(step - 1, state.stepped_over)
            record_spike(run, spike, [batch, batch], "the run goes on")
        run.is_spiking = bool(reason)
        state.recent = [*state.recent, [loss, norm]][-WINDOW:]
    elif scaler.is_enabled() and scaler.get_scale() >= SMALLEST_SCALE:
        state.skipped_updates += 1
    elif on_spike == "act":
        reason = f"loss={loss}, grad_norm={norm} is not finite"
        raise Spike(step, loss, norm, reason)
    else:
        run.metrics.close()
        raise DivergedError(
            f"diverged at step {step}: loss={loss}, grad_norm={norm},"
            f" optim.lr={lr}; no later step was saved; rule: finite on every rank; try"
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


def return_from(run: Run, spike: Spike) -> None:
    """Go back to the last good checkpoint, and step over the data up to the spike. All ranks.

    What is stepped over is the same from whichever checkpoint the run goes back, and a run that is
    killed before it has saved that meets the same spike again. So an interrupted run is the same.
    """
    run.runtime.has_made_a_step = False  # what follows is a start-up
    run.runtime.enter(run.state.step, "start-up")
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


# --- silent corruption


def hashes_of_replicas(run: Run, batch: Batch) -> LateFigures | None:
    """Hashes by rank, which the ranks compare after this step if that is due. All ranks.

    The first row has the hashes of the weights. With run.deterministic the second row has those of
    each rank's gradient of a micro-batch, and the third those of its gradient of the
    micro-batch of the rank before it. They are due before each save, so what is saved was checked.
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


def refuse_corrupt_replicas(run: Run, step: int, hashes: LateFigures | None) -> None:
    """End the run if a rank has other weights than the others, or computes otherwise. All ranks."""
    if hashes is None:
        return
    weights, own, of_neighbour = hashes.read()
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
        f"corrupt at step {step}: {verdict}; rule: equal bits on every rank; the same"
        " command goes on from the newest checkpoint, better without that device"
    )


# --- memory


def shortage_of_memory(runtime: Runtime, config: Config, vocab_size: int) -> UserError:
    """The error for this rank's device, which had too little memory."""
    from dist_lm.planning.shortage import explain_shortage  # slow, and seldom needed

    strategy = runtime.engine.strategy
    world = runtime.world_size
    text = explain_shortage(config, strategy, vocab_size, world=world, device=runtime.device)
    return UserError(text)
