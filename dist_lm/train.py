"""Train a GPT: `accelerate launch dist_lm/train.py [--config FILE] [--section.field VALUE ...]`, torchrun or python.

One step, in order: agree on stopping, evaluate, save, set the rate, micro-batches, update, hand figures over. The batch
of a step is a function of (seed, step); everything else that a run carries along is in TrainState, the weights and the
optimizer's tensors. Running the same command again goes on where the run folder stands.
"""

import gc
from pathlib import Path

from dist_lm.launcher import die_with_launcher

# Before all imports that take time: a launcher may be killed during them.
if __name__ == "__main__":
    die_with_launcher()

from dist_lm.cli import load
from dist_lm.config import FREE_ON_RESUME, BatchLayout, Config, batch_layout
from dist_lm.errors import DivergedError, UserError, run_entry
from dist_lm.outcome import TRAIN, Attempt, TrainFlags

# Before the seconds that torch takes to import: answer typing mistakes, and listen to signals.
if __name__ == "__main__":
    ARGUMENTS = run_entry(lambda argv: load(argv, TRAIN))
    ATTEMPT = Attempt(Path(ARGUMENTS[0].run.dir))
    ATTEMPT.stop.listen()

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dist_lm import __version__
from dist_lm.checkpoint.folder import (
    locate,
    newest_valid,
    read_state,
    set_aside_newer,
    step_folders,
    verify,
)
from dist_lm.checkpoint.load import read_description, restore, tokenizer_hash
from dist_lm.checkpoint.save import Saver
from dist_lm.config import NO_TARGET
from dist_lm.data.batches import Batches
from dist_lm.data.dataset import Dataset, open_dataset
from dist_lm.data.mix import count_left_out, merge_after
from dist_lm.metrics import Metrics, draw_curves
from dist_lm.model import hf
from dist_lm.model.gpt import GPT
from dist_lm.model.init import flops_per_token, init_weights, parameter_shapes
from dist_lm.optim import lr_at, make_optimizer, set_lr
from dist_lm.runtime.start import hold_folder, start
from dist_lm.runtime.world import Runtime
from dist_lm.sample import Sampling, sample
from dist_lm.validate import validate

SAMPLE_TOKENS, SAMPLE_TEMPERATURES = 96, (0.0, 0.8)  # what each evaluation writes to samples.md
SMALLEST_SCALE = 1.0  # an fp16 loss scale below this means that the loss itself is not finite


@dataclass
class TrainState:
    """All that a run carries from step to step besides tensors."""

    step: int = 0  # updates made
    tokens: int = 0  # targets trained on
    skipped_updates: int = 0  # fp16 overflows
    val_loss: float | None = None  # of the newest evaluation
    streams: dict[str, Any] = field(
        default_factory=dict
    )  # where raw sources stand, as far as this rank reads them


@dataclass(frozen=True)
class ResumePoint:
    """Where a run stands: known before anything is built, so that a finished one says so at once."""

    data: Dataset
    steps: int | None  # None: the data says when it ends
    folder: Path | None  # the checkpoint to go on from
    facts: Mapping[str, Any]  # its state.json


@dataclass
class Run:
    """What the phases of main() build and train() uses."""

    config: Config
    runtime: Runtime
    data: Dataset
    layout: BatchLayout
    steps: int | None  # None: the data says when it ends
    model: GPT
    optimizer: torch.optim.Optimizer
    metrics: Metrics
    saver: Saver
    state: TrainState
    batches: Batches | None = None  # of training, while it lasts

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)


@dataclass
class Pending:
    """Figures of a step that are still on the device; reading them is the one host sync, one step late."""

    step: int
    lr: float
    loss_norm_targets_flags: Tensor
    seconds: float
    seconds_waiting: float  # for data
    batch_hash: Tensor | None
    shares: dict[str, float]  # of a mixture


def main(config: Config, flags: TrainFlags, attempt: Attempt) -> str:
    """Why the run stopped before its end, or nothing."""
    runtime, why = start(config, flags.launch, attempt), ""
    try:
        hold_folder(runtime)
        place = find_resume_point(runtime, config, flags.allow_change)
        if place:
            run = build(runtime, config, place)
            describe(run)
            try:
                why = train(run)
            except UserError:
                if run.batches:
                    run.batches.close()
                report_saving(run, run.saver.finish)  # what is on its way to disk shall get there
                raise
            finish(run, why)
    except UserError:  # raised by all ranks together, so they can also leave together
        runtime.close()
        raise
    except Exception as error:  # of this rank alone
        runtime.give_up(error)
        raise
    runtime.close()
    return why


def train(run: Run) -> str:
    """The loop. Every paragraph is run by all ranks, with the same outcome on each. Why it stopped early, if it did."""
    config, runtime, state, model = run.config, run.runtime, run.state, run.runtime.model
    batches = run.batches = training_batches(run)
    batch = batches.take()
    runtime.warm_up(
        lambda: model(
            batch.micros[0].tokens_BT, torch.full_like(batch.micros[0].tokens_BT, NO_TARGET)
        )
    )
    targets, stop, is_lost = runtime.sum(
        runtime.with_stop(batch.targets)
    )  # it may have come during start-up
    runtime.refuse_lost_folder(float(is_lost))
    first_step, stopping, pending = state.step, bool(stop), None
    profiler = runtime.profiler(config.run.profile_steps, run.dir / "trace.json")

    while True:
        # Is this the last turn? It only evaluates and saves. Pending figures come first, so that no NaN is ever saved.
        moved, ended = state.step > first_step, batch.end or state.step == run.steps
        leaving = ended or stopping or state.step == config.run.stop_after
        evaluating = moved and due(state.step, config.run.eval_every, at_the_end=ended)
        saving = moved and (leaving or due(state.step, config.run.save_every))
        if pending and (evaluating or saving or leaving):
            stopping |= record_step(run, pending)
            pending = None

        if evaluating:
            evaluate(run)
        if saving:
            save(run, last=leaving)
        if leaving:
            break
        report_saving(run, run.saver.poll)

        started = time.monotonic()
        lr = lr_at(config.optim, state.step, run.steps or 0)
        set_lr(run.optimizer, lr)

        # The loss is the sum over the global batch divided by its number of targets, however it is cut up.
        loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
        for number, micro in enumerate(batch.micros, 1):
            with runtime.micro_step(last=number == len(batch.micros)):
                loss = model(
                    micro.tokens_BT,
                    micro.targets_BT,
                    dropout_keys_B=micro.dropout_keys_B,
                    segments_BT=micro.segments_BT,
                )
                runtime.backward(loss / targets.float())
            loss_sum += loss.detach()

        norm = runtime.update(config.optim.clip)

        # One small sum carries all that ranks must agree on; its two flags are read one step late, like the figures.
        waiting = time.monotonic()
        next_batch = batches.take()
        waited = time.monotonic() - waiting
        agreed = runtime.sum(torch.cat([loss_sum[None], runtime.with_stop(next_batch.targets)]))
        loss_sum, next_targets, stop, is_lost = agreed
        if pending:
            stopping = record_step(run, pending)
        figures = torch.stack([loss_sum / targets, norm.double(), targets, stop, is_lost])
        hashing = config.run.log_batch_hash
        batch_hash = (
            runtime.sum(torch.tensor([batch.row_hashes], device=runtime.device))
            if hashing
            else None
        )
        seconds = time.monotonic() - started
        pending = Pending(state.step + 1, lr, figures, seconds, waited, batch_hash, batch.shares)
        state.step, state.val_loss, state.streams = state.step + 1, None, batch.after
        batch, targets = next_batch, next_targets
        profiler.step()

    profiler.stop()
    batches.close()
    return (
        (runtime.stop.reason or "another rank was told to stop") if stopping and not ended else ""
    )


def record_step(run: Run, pending: Pending) -> bool:
    """Read a step's figures, refuse what is not finite, record them; whether some rank was told to stop. All ranks."""
    runtime, state = run.runtime, run.state
    loss, norm, targets, stop, is_lost = pending.loss_norm_targets_flags.tolist()
    runtime.refuse_lost_folder(is_lost)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        if not runtime.scaler.is_enabled() or runtime.scaler.get_scale() < SMALLEST_SCALE:
            run.metrics.close()
            raise DivergedError(
                f"diverged at step {pending.step}: loss={loss}, grad_norm={norm}, optim.lr={pending.lr}; no later step"
                " was saved; rule: finite on every rank; try a smaller optim.lr, a longer warm-up or optim.clip",
            )
        state.skipped_updates += 1
    state.tokens += int(targets)
    extra: dict[str, Any] = {**pending.shares}
    if pending.batch_hash is not None:
        extra["batch_hash"] = f"{int(pending.batch_hash) % 2**64:016x}"
    if runtime.scaler.is_enabled():
        extra.update(scale=runtime.scaler.get_scale(), skipped_updates=state.skipped_updates)
    if runtime.attempt.lock.lost:
        return bool(stop)  # the file is another run's; the ranks agree on it in the next step
    run.metrics.step(
        step=pending.step,
        loss=loss,
        lr=pending.lr,
        grad_norm=norm,
        tokens=state.tokens,
        tokens_per_second=targets / pending.seconds,
        data_wait=pending.seconds_waiting / pending.seconds,
        **extra,
    )
    return bool(stop)


def evaluate(run: Run) -> None:
    """Held-out figures, and samples to watch the text become coherent. All ranks, in step."""
    config, runtime, data = run.config, run.runtime, run.data
    with run.metrics.pause():
        losses = []
        for name, shards in data.val.items():
            figures = validate(runtime, runtime.model, shards, config, run.layout, data.tokenizer)
            run.metrics.evaluation(run.state.step, name, figures)
            losses.append(figures["val_loss"])
            if config.run.ema:
                with runtime.averaged():
                    averaged = validate(
                        runtime, runtime.model, shards, config, run.layout, data.tokenizer
                    )
                run.metrics.evaluation(run.state.step, f"{name} of ema", averaged)
        run.state.val_loss = losses[0]  # the first set decides which checkpoint is the best
        prompt = data.tokenizer.encode(config.run.sample_prompt) or [data.tokenizer.eot]
        rows = len(
            SAMPLE_TEMPERATURES
        )  # as one batch: half the forwards, in each of which ZeRO-3 gathers weights
        settings = Sampling(SAMPLE_TOKENS, SAMPLE_TEMPERATURES)
        with runtime.autocast():
            *_, made = sample(
                run.model, data.tokenizer, [prompt] * rows, settings, [0] * rows, stop_early=False
            )
        texts = [f"## step {run.state.step}, loss {losses[0]:.4f}"]
        for temperature, continuation in zip(SAMPLE_TEMPERATURES, made, strict=True):
            text = config.run.sample_prompt + continuation.text
            texts.append(f"temperature {temperature}\n```\n{text}\n```")
        if runtime.is_main:
            with open(run.dir / "samples.md", "a", encoding="utf-8") as file:
                file.write("\n".join(texts) + "\n\n")


def save(run: Run, last: bool) -> None:
    """Begin a checkpoint, whose writing goes on beside training; the last one is waited for. All ranks."""
    config, runtime = run.config, run.runtime
    spec = config.model_spec(run.data.tokenizer.vocab_size)
    streams = merge_after(runtime.channel.gather(run.state.streams))
    if left_out := count_left_out(streams):
        runtime.say(
            "left out so far: "
            + ", ".join(f"{number:,} {kind}" for kind, number in left_out.items())
        )
    facts = {
        **asdict(run.state),
        "streams": streams,
        "strategy": runtime.strategy,
        "world_size": runtime.world_size,
        "scaler": runtime.scaler.state_dict(),
        "config": config.model_dump(mode="json"),
        "data": run.data.identity,
        "versions": {"dist_lm": __version__, "torch": torch.__version__},
        "commit": git_commit(),
    }
    contents = {
        "config.json": hf.config_json(spec, run.data.tokenizer.eot),
        "generation_config.json": hf.generation_config_json(run.data.tokenizer.eot),
        "state.json": facts,
    }
    texts = {name: json.dumps(content, indent=1) for name, content in contents.items()}
    with run.metrics.pause():
        report_saving(run, run.saver.finish)
        run.saver.begin(
            run.state.step,
            spec,
            runtime.owned,
            texts,
            run.data.tokenizer,
        )
        if last:
            run.saver.finish()


def report_saving(run: Run, look: Callable[[], None]) -> None:
    """A checkpoint in mid-run that could not be written is said, not fatal."""
    try:
        look()
    except UserError as error:
        run.runtime.say(f"warning: {error}; training goes on")


def due(step: int, every: int, at_the_end: bool = False) -> bool:
    return every > 0 and (at_the_end or step % every == 0)


def find_resume_point(
    runtime: Runtime, config: Config, allowed: Sequence[str]
) -> ResumePoint | None:
    """Where the run folder stands, or None if nothing is left to do, which is said. All ranks."""
    data, run_dir = open_dataset(config, runtime.on_main), Path(config.run.dir)
    steps, batch = data.steps(config), config.data.global_batch

    def choose() -> str | None:  # rank 0 decides; others may see the folder otherwise for a while
        if config.run.resume == "never":
            if (run_dir / "metrics.jsonl").exists() or step_folders(run_dir):
                raise UserError(
                    f"run.dir={run_dir} has a history and run.resume=never; rule: an empty folder; or run.resume=auto"
                )
            return None
        if config.run.resume != "auto":
            folder = Path(config.run.resume)
            step = verify(folder)["step"]
            set_aside_newer(run_dir, step, runtime.say)
            return str(folder)
        newest, passed_over = newest_valid(run_dir)
        for why in passed_over:
            runtime.say(f"warning: passed over a damaged checkpoint: {why}")
        return str(newest) if newest else None

    chosen = runtime.on_main(choose)
    if chosen is None:
        return ResumePoint(data, steps, None, {})
    facts = read_state(Path(chosen))
    refuse_other_mathematics(runtime, config, data, facts, allowed)
    used_up = facts.get("streams", {}).get("end")  # the first position that streams do not fill
    last = min(
        steps or sys.maxsize,
        config.run.stop_after or sys.maxsize,
        -(-(used_up or sys.maxsize) // batch),
    )
    if facts["step"] >= last:
        runtime.say(
            f"{run_dir} is finished at step {facts['step']}; to go on raise run.steps={steps} or run.stop_after,"
            " to start anew choose another run.dir"
        )
        return None
    return ResumePoint(data, steps, Path(chosen), facts)


def build(runtime: Runtime, config: Config, place: ResumePoint) -> Run:
    """Model and optimizer on this rank's device, standing where the run does. All ranks."""
    data = place.data
    spec = config.model_spec(data.tokenizer.vocab_size)
    with runtime.construction():
        model = GPT(spec, config.run.activation_checkpointing)
    optimizer = make_optimizer(model, config.optim, config.run.precision)
    gc.freeze()  # what is there by now stays: collecting need not look through torch's modules again
    runtime.prepare(model, optimizer, parameter_shapes(spec), config)
    metrics = Metrics(
        config.run.dir,
        steps=place.steps,
        flops_per_token=flops_per_token(spec),
        device=runtime.device,
        world_size=runtime.world_size,
        is_main=runtime.is_main,
        track=runtime.track,
    )
    saver = Saver(
        Path(config.run.dir),
        runtime.background,
        config.run.keep_last,
        config.run.keep_every,
        resumed=place.folder,
        lost=runtime.attempt.lock.look,
    )
    layout = batch_layout(config, runtime.world_size)
    run = Run(
        config, runtime, data, layout, place.steps, model, optimizer, metrics, saver, TrainState()
    )
    restore_or_init(run, place)
    return run


def restore_or_init(run: Run, place: ResumePoint) -> None:
    """Weights, moments and state as they were at its place, or as they start. All ranks."""
    config, runtime, facts = run.config, run.runtime, place.facts
    if place.folder is None:
        if config.run.init_from:
            runtime.together(lambda: start_from(run, config.run.init_from or ""))
        else:
            init_weights(
                run.model, config.run.seed, ((h.name, h.start, h.weight) for h in runtime.owned())
            )
        runtime.spread()
        runtime.start_average()
        return
    folder, spec = place.folder, config.model_spec(run.data.tokenizer.vocab_size)
    runtime.together(lambda: restore(folder, spec, runtime.owned(), optimizer=True))
    runtime.spread()
    if runtime.scaler.is_enabled():
        runtime.scaler.load_state_dict(facts["scaler"])
    run.state = TrainState(
        facts["step"], facts["tokens"], facts["skipped_updates"], streams=facts.get("streams", {})
    )
    runtime.say(f"resuming {folder.name}, written by {facts['strategy']} x {facts['world_size']}")


def training_batches(run: Run) -> Batches:
    config, data, runtime = run.config, run.data, run.runtime
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


def refuse_other_mathematics(
    runtime: Runtime,
    config: Config,
    data: Dataset,
    facts: Mapping[str, Any],
    allowed: Sequence[str],
) -> None:
    """A resumed run has the settings it was started with, but for those that do not touch its mathematics."""
    old = {
        f"{s}.{f}": value for s, fields in facts["config"].items() for f, value in fields.items()
    }
    old["data (its tokens, by hash)"] = facts["data"]
    new = {**config.flat(), "data (its tokens, by hash)": data.identity}
    changed = {
        name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]
    }
    for name in ("run.steps", "run.epochs"):
        before, after = changed.get(name, (None, None))
        if before is not None and after is not None and after > before:
            runtime.say(
                f"{name} grows from {before} to {after}: from here on the schedule is that of the longer run"
            )
            del changed[name]
    refused = [name for name in changed if name not in FREE_ON_RESUME and name not in allowed]
    if refused:
        both = ", ".join(
            f"{name}: {changed[name][0]!r} -> {changed[name][1]!r}" for name in refused
        )
        raise UserError(
            f"run.dir={config.run.dir} was started with other settings ({both}); rule: a resumed run keeps its"
            f" mathematics; choose another run.dir, or --allow_change {refused[0]}"
        )


def start_from(run: Run, name: str) -> None:
    """Take only the weights of a checkpoint or transformers folder; refuses another model or tokenizer."""
    folder = locate(name)
    described = read_description(folder)
    ours, theirs = run.config.model.model_dump(), described.config.model_dump()
    different = [
        f"--model.{key} {theirs[key]}"
        for key in ours
        if ours[key] != theirs[key] and key not in ("dropout", "init")
    ]
    if different:
        raise UserError(
            f"run.init_from={name} is another model; rule: the same one: {' '.join(different)}"
        )
    tokenizer = run.data.tokenizer
    if tokenizer.vocab_size != described.vocab_size or tokenizer_hash(folder) not in (
        None,
        tokenizer.sha256,
    ):
        raise UserError(
            f"run.init_from={name} was trained with another tokenizer ({described.vocab_size} tokens) than data.input="
            f"{run.config.data.input} ({tokenizer.vocab_size}); nearest: data.tokenizer={folder}"
        )
    if described.seq_len < run.config.data.seq_len and run.config.model.positions == "learned":
        raise UserError(
            f"data.seq_len={run.config.data.seq_len} exceeds the context of run.init_from; nearest: {described.seq_len}"
        )
    spec = run.config.model_spec(described.vocab_size)
    restore(folder, spec, run.runtime.owned(), optimizer=False)


def describe(run: Run) -> None:
    """Say what is about to happen, and write the resolved settings into the run folder. Rank 0 speaks."""
    config, runtime, data = run.config, run.runtime, run.data
    say = runtime.say
    shapes = hf.shapes(config.model_spec(data.tokenizer.vocab_size))
    parameters = sum(math.prod(shape) for shape in shapes.values())
    length = f"{run.steps:,} steps" if run.steps else f"{config.run.epochs} passes"
    say(
        f"{parameters:,} parameters, sequences of {config.data.seq_len} tokens; {run.layout.tokens_per_step:,} tokens a"
        f" step, {length}"
    )
    for line in data.describe(config.data, run.steps, runtime.world_size):
        say(line)
    say(
        f"{runtime.strategy} on {runtime.world_size} process(es) of {runtime.device.type}, {config.run.precision}; each"
        f" step {run.layout.accumulation} x {run.layout.micro_batch} sequences a process"
    )
    if run.layout.filler_percent > 0:
        say(
            "warning: rows without targets even out the processes and cost"
            f" {run.layout.filler_percent:.1f} % of each step"
        )
    if run.steps and config.optim.warmup_steps > run.steps:
        say(
            f"warning: optim.warmup_steps={config.optim.warmup_steps} is longer than the run of {run.steps} steps"
        )
    if hf.family(config.model) is None:
        say("warning: no transformers family has this model; only dist_lm reads its checkpoints")
    if runtime.is_main:
        (run.dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    runtime.start_trackers(config)


def finish(run: Run, why: str) -> None:
    """The curve as a picture, and what to type next. Rank 0."""
    run.metrics.close()
    if run.runtime.is_main:
        try:
            draw_curves([run.dir], run.dir / "loss.png")
        except (
            Exception
        ) as error:  # a picture that cannot be drawn or stored must not spoil a finished run
            run.runtime.say(f"warning: no loss.png: {type(error).__name__}: {error}")
        again = f"stopped: {why}; the same command goes on"
        generate = f"try: python -m dist_lm.generate --ckpt {run.dir} --prompt ..."
        run.runtime.say(f"step {run.state.step} is saved; {again if why else generate}")


@cache
def git_commit() -> str | None:
    """The commit of the code that runs, where it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    run_entry(lambda _: ATTEMPT.run(lambda: main(*ARGUMENTS, ATTEMPT)))
