"""Before the loop: find where a run stands, build model and optimizer, and fill them.

The run folder says where its run stands, so the same command starts a run and resumes it. This is
found out before anything is built, so a run that is finished ends at once.
"""

import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_lm import families
from dist_lm.arithmetic import ceil_div
from dist_lm.checkpoint.folder import (
    locate,
    newest_valid,
    set_aside_newer,
    step_folders,
    step_of,
)
from dist_lm.checkpoint.load import restore
from dist_lm.checkpoint.retention import Retention
from dist_lm.checkpoint.save import Saver
from dist_lm.checkpoint.state import TrainState, read_state, verify_state
from dist_lm.config import BatchLayout, Config, batch_layout, free_on_resume
from dist_lm.console import count, dispensable
from dist_lm.data.agreement import refuse_other_tokenizers, refuse_tokenizer
from dist_lm.data.batches import Batches
from dist_lm.data.dataset import Dataset, open_dataset
from dist_lm.disk import open_own
from dist_lm.errors import CheckpointError, UserError
from dist_lm.metrics import Metrics, read_lines
from dist_lm.model import hf
from dist_lm.model.gpt import GPT
from dist_lm.model.init import flops_per_token, init_weights, parameter_shapes
from dist_lm.optim import make_optimizer
from dist_lm.pretrained import Pretrained, read_spec, refuse_disagreements
from dist_lm.runtime.device import describe_kernels
from dist_lm.runtime.world import Runtime
from dist_lm.spikes import STRETCH

_DATA = "data (its tokens, by hash)"  # compared like a setting


@dataclass(frozen=True)
class ResumePoint:
    """The step and the checkpoint at which a run goes on or begins."""

    data: Dataset
    steps: int | None  # None: the data says when it ends
    folder: Path | None  # the checkpoint to go on from; None: the run begins
    facts: Mapping[str, Any]  # its state.json


@dataclass
class Run:
    """A run while it trains: what build() makes and the loop uses."""

    config: Config
    runtime: Runtime
    data: Dataset
    layout: BatchLayout
    steps: int | None  # None: the data says when it ends
    model: GPT  # without a wrapper
    optimizer: torch.optim.Optimizer
    metrics: Metrics
    saver: Saver
    state: TrainState
    point: ResumePoint  # where this start of it began
    batches: Batches | None = None  # of training, while it lasts
    has_ended: bool = False  # its last step was made, and not only that of run.stop_after
    has_begun: bool = False  # to train, in this process
    is_spiking: bool = False  # the last step was far off, and was warned about

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)


# --- where the run stands


def find_resume_point(
    runtime: Runtime, config: Config, allowed: Sequence[str]
) -> ResumePoint | None:
    """Find where the run stands. Returns None, and says so, if nothing is left to do. All ranks.

    `allowed` names settings that may differ from those of the checkpoint.
    """
    is_beginning = config.run.resume in ("auto", "never")
    is_beginning &= not step_folders(Path(config.run.dir))
    if config.run.init_from and is_beginning:
        runtime.on_main(lambda: refuse_other_tokenizers(config))
    data = open_dataset(config, runtime.on_main)
    steps = data.steps(config)
    chosen = _choose_checkpoint(runtime, config)
    if chosen is None:
        return ResumePoint(data, steps, folder=None, facts={})
    facts = runtime.together(lambda: read_state(chosen))
    refuse_other_mathematics(runtime, config, data, facts, allowed)
    if facts["step"] >= _last_step(config, steps, facts):
        if chosen.parent == Path(config.run.dir):
            runtime.on_main(lambda: _retention(config).complete(chosen))
        runtime.say(_why_nothing_is_left(config, steps, facts))
        return None
    return ResumePoint(data, steps, folder=chosen, facts=facts)


def _choose_checkpoint(runtime: Runtime, config: Config) -> Path | None:
    """The folder to go on from, or None if the run begins. All ranks, which divide its files."""

    def check(folder: Path) -> None:
        def check_share() -> None:
            verify_state(folder, runtime.rank, runtime.world_size)

        runtime.on_all(check_share)

    run_dir = Path(config.run.dir)
    if config.run.resume not in ("auto", "never"):
        chosen = Path(config.run.resume)
        check(chosen)
        step = read_state(chosen)["step"]
        runtime.on_main(lambda: set_aside_newer(run_dir, step, runtime.say))
        return chosen
    # Rank 0 looks, because others may see the folder otherwise for a while.
    names = runtime.on_main(lambda: _checkpoints_to_try(config))
    newest, passed_over = newest_valid(run_dir, check, [Path(name) for name in names])
    for why in passed_over:
        runtime.say(f"warning: passed over a damaged checkpoint: {why}")
    return newest


def _checkpoints_to_try(config: Config) -> list[str]:
    """The step folders of the run, oldest first. Rank 0."""
    run_dir = Path(config.run.dir)
    folders = step_folders(run_dir)
    if config.run.resume == "never" and (folders or (run_dir / "metrics.jsonl").exists()):
        raise UserError(
            f"run.dir={run_dir} has a history and run.resume=never; rule: an empty folder; or"
            " run.resume=auto"
        )
    return [str(folder) for folder in folders]


def _why_nothing_is_left(config: Config, steps: int | None, facts: Mapping[str, Any]) -> str:
    run_dir = Path(config.run.dir)
    without = config.run.model_copy(update={"stop_after": None})
    if facts["step"] < _last_step(config.model_copy(update={"run": without}), steps, facts):
        return (
            f"{run_dir} is unfinished at step {facts['step']}, where"
            f" run.stop_after={config.run.stop_after} ends it; to go on leave run.stop_after out,"
            " or raise it"
        )
    return (
        f"{run_dir} is finished at step {facts['step']}; to go on raise run.steps={steps}, to start"
        " again choose another run.dir"
    )


def _last_step(config: Config, steps: int | None, facts: Mapping[str, Any]) -> int:
    """The step at which the run is finished, as far as it is known."""
    ends = [steps or sys.maxsize, config.run.stop_after or sys.maxsize]
    stepped_over = sum(stop - first for first, stop in facts.get("stepped_over", []))
    if steps and config.run.epochs:
        ends.append(steps - stepped_over)
    used_up = facts.get("streams", {}).get("end")  # the first position that streams do not fill
    if used_up:
        ends.append(ceil_div(used_up, config.data.global_batch) - stepped_over)
    return min(ends)


def refuse_other_mathematics(
    runtime: Runtime,
    config: Config,
    data: Dataset,
    facts: Mapping[str, Any],
    allowed: Sequence[str],
) -> None:
    """Refuse settings with which the resumed run would be another one.

    Only settings that do not touch its mathematics may differ from those it was started with.
    """
    old = {"run.exact": False, _DATA: facts["data"]}  # older versions had no such setting
    for section, fields in facts["config"].items():
        for name, value in fields.items():
            old[f"{section}.{name}"] = value
    new = {**config.flat(), _DATA: data.identity}
    changed = [name for name in new if name in old and old[name] != new[name]]
    for name in ("run.steps", "run.epochs"):
        if name in changed and _grows(old[name], new[name]):
            runtime.say(
                f"{name} grows from {old[name]} to {new[name]}: from here on the schedule is that"
                " of the longer run"
            )
            changed.remove(name)
    free = {*free_on_resume(config), *allowed}
    refused = [name for name in changed if name not in free]
    if refused:
        both = ", ".join(f"{name}: {old[name]!r} -> {new[name]!r}" for name in refused)
        raise UserError(
            f"run.dir={config.run.dir} was started with other settings ({both}); rule: a resumed"
            f" run keeps its mathematics; choose another run.dir, or --allow_change {refused[0]}"
        )


def _grows(before: object, after: int | None) -> bool:
    """Whether a number grows. The one before comes from state.json, and may be anything."""
    return type(before) is int and after is not None and after > before


# --- building


def build(runtime: Runtime, config: Config, point: ResumePoint) -> Run:
    """Model and optimizer on this rank's device, standing where the run does. All ranks."""
    spec = config.model_spec(point.data.tokenizer.vocab_size)
    with runtime.engine.construction():
        model = GPT(spec, config.run.activation_checkpointing)
    optimizer = make_optimizer(model, config.optim, config.run.precision)
    # What exists by now stays: collecting garbage need not look through torch's modules again.
    gc.freeze()
    runtime.engine.prepare(model, optimizer, parameter_shapes(spec), runtime.channel)
    run = Run(
        config=config,
        runtime=runtime,
        data=point.data,
        layout=batch_layout(config, runtime.world_size),
        steps=point.steps,
        model=model,
        optimizer=optimizer,
        metrics=_metrics(runtime, config, point),
        saver=_saver(runtime, config, point),
        state=TrainState(),
        point=point,
    )
    restore_or_init(run, point)
    is_on_gpu = runtime.device.type == "cuda"
    run.saver.make_ready(spec, runtime.engine.owned, make_memory=is_on_gpu)
    return run


def _metrics(runtime: Runtime, config: Config, point: ResumePoint) -> Metrics:
    spec = config.model_spec(point.data.tokenizer.vocab_size)
    return Metrics(
        config.run.dir,
        steps=point.steps,
        flops_per_token=flops_per_token(spec),
        device=runtime.device,
        world_size=runtime.world_size,
        is_main=runtime.is_main,
        track=runtime.track,
    )


def _retention(config: Config) -> Retention:
    run = config.run
    reach = STRETCH if run.on_spike == "act" else 0
    return Retention(Path(run.dir), run.keep_last, run.keep_every, reach)


def _saver(runtime: Runtime, config: Config, point: ResumePoint) -> Saver:
    return Saver(
        Path(config.run.dir),
        runtime.background,
        keep_last=config.run.keep_last,
        keep_every=config.run.keep_every,
        reach=STRETCH if config.run.on_spike == "act" else 0,
        resumed=point.folder,
        lost=runtime.attempt.lock.look,
    )


def restore_or_init(run: Run, point: ResumePoint) -> None:
    """Fill weights, moments and state from the checkpoint, or as a run begins. All ranks."""
    if point.folder is None:
        _init(run)
    else:
        _restore(run, point.folder, point.facts)


def _init(run: Run) -> None:
    """Weights of run.init_from, or new ones. All ranks."""
    config = run.config
    engine = run.runtime.engine
    if config.run.init_from:
        run.runtime.together(lambda: start_from(run, config.run.init_from or ""))
    else:
        parts = ((part.name, part.start, part.weight) for part in engine.to_fill())
        init_weights(run.model, config.run.seed, parts)
    engine.fill_others()
    engine.start_average()


def _restore(run: Run, folder: Path, facts: Mapping[str, Any]) -> None:
    """Everything as the checkpoint has it. All ranks."""
    runtime = run.runtime
    engine = runtime.engine
    spec = run.config.model_spec(run.data.tokenizer.vocab_size)
    runtime.together(lambda: restore(folder, spec, engine.to_fill(), optimizer=True))
    engine.fill_others()
    if engine.scaler.is_enabled():
        if facts["scaler"].keys() != engine.scaler.state_dict().keys():
            raise CheckpointError(f"{folder.name}/state.json: has no loss scale, which fp16 needs")
        engine.scaler.load_state_dict(facts["scaler"])
    run.state = TrainState.restored(facts)
    runtime.say(f"resuming {folder.name}, written by {facts['strategy']} x {facts['world_size']}")
    ours = describe_kernels(runtime.device)
    theirs = facts.get("kernels", ours)  # of run.exact only
    if theirs != ours:
        runtime.say(
            f"warning: run.exact: {folder.name} was computed by {theirs}, and this is {ours}; from"
            " here on the bits may be others than there"
        )


def go_back(run: Run, latest: int) -> None:
    """Everything as at the newest good checkpoint up to a step, or as the run began. All ranks.

    It happens in this process. Later checkpoints are renamed, because what follows is another
    trajectory.
    """
    chosen = run.runtime.on_main(lambda: _choose_for_going_back(run, latest))
    run.is_spiking = False
    run.runtime.engine.clear()
    if chosen is not None:
        folder = Path(chosen)
        _restore(run, folder, run.runtime.together(lambda: read_state(folder)))
        return
    run.runtime.engine.scaler = run.runtime.engine.new_scaler()
    run.state = TrainState()
    _init(run)


def _choose_for_going_back(run: Run, latest: int) -> str | None:
    """The newest valid checkpoint up to a step, or else the oldest. Rank 0.

    None is the beginning of the run, where nothing was to be saved so early.
    """
    run_dir = Path(run.config.run.dir)
    by_step = {step_of(folder): folder for folder in step_folders(run_dir)}
    begun = run.point.folder
    if begun and begun.is_dir():  # run.resume may name one elsewhere
        by_step.setdefault(run.point.facts["step"], begun)
    steps = sorted(by_step)
    early = [step for step in reversed(steps) if step <= latest]
    late = [step for step in steps if step > latest]
    is_young = latest < run.config.run.save_every and _has_begun_at_zero(run_dir)
    if not steps or (is_young and not early):
        set_aside_newer(run_dir, 0, run.runtime.say)
        return None
    for step in (*early, *late):
        if _is_valid(run, by_step[step]):
            set_aside_newer(run_dir, step, run.runtime.say)
            return str(by_step[step])
    raise CheckpointError(
        f"run.dir={run_dir} has no valid checkpoint to go back to; rule: never restart at step 0"
    )


def _has_begun_at_zero(run_dir: Path) -> bool:
    """Whether the run's first start is known to have made its first step."""
    try:
        starts = (line for line in read_lines(run_dir) if line.get("event") == "start")
        return next(starts, {}).get("step") == 0
    except CheckpointError:  # no history, which no run needs
        return False


def _is_valid(run: Run, folder: Path) -> bool:
    """Whether a run can go on from a checkpoint. Says so if it cannot."""
    try:
        verify_state(folder)
    except UserError as error:
        run.runtime.say(f"warning: passed over a damaged checkpoint: {error}")
        return False
    return True


def start_from(run: Run, name: str) -> None:
    """Take only the weights of a checkpoint or transformers folder."""
    config = run.config
    tokenizer = run.data.tokenizer
    folder = locate(name)
    model = Pretrained(name, folder, read_spec(folder))
    given = config.flat()
    del given["data.tokenizer"]  # the data says which one it has
    refuse_disagreements(model, given)
    refuse_tokenizer(model, tokenizer, f"data.input={config.data.title}")
    spec = config.model_spec(model.spec.vocab_size)
    restore(folder, spec, run.runtime.engine.to_fill(), optimizer=False)


# --- saying what is about to happen


def describe(run: Run) -> None:
    """Print what is about to happen, and write the resolved settings into the run folder.

    Rank 0 does both.
    """
    config = run.config
    runtime = run.runtime
    layout = run.layout
    _describe_size(run)
    for line in run.data.describe(config.data, run.steps, runtime.world_size):
        runtime.say(line)
    processes = count(runtime.world_size, "process", "processes")
    runtime.say(
        f"{runtime.strategy} on {processes} of {runtime.device.type},"
        f" {config.run.precision}; each step {layout.accumulation} x {layout.micro_batch} sequences"
        " a process"
    )
    _warn_of_settings(run)
    if runtime.is_main:
        path = run.dir / "config.yaml"
        with dispensable(path), open_own(path, "w", encoding="utf-8") as file:
            file.write(config.to_yaml())
    runtime.start_trackers(config, run.state.step)


def _warn_of_settings(run: Run) -> None:
    """Warn of settings that do not do all that they seem to. Rank 0."""
    config = run.config
    runtime = run.runtime
    layout = run.layout
    if layout.filler_percent > 0:
        runtime.say(
            "warning: rows without targets even out the processes and cost"
            f" {layout.filler_percent:.1f} % of each step"
        )
    if run.steps and config.optim.warmup_steps > run.steps:
        runtime.say(
            f"warning: optim.warmup_steps={config.optim.warmup_steps} is longer than the run of"
            f" {run.steps} steps"
        )
    if config.run.check_every and not runtime.engine.has_replicas:
        runtime.say(
            f"warning: run.check_every={config.run.check_every} compares nothing: no two processes"
            f" hold the same weights under {runtime.strategy}"
        )
    if families.family(config.model) is None:
        runtime.say(
            "warning: no transformers family has this model; only dist_lm reads its checkpoints"
        )


def _describe_size(run: Run) -> None:
    """Print the size of the model, of a step and of the run. Rank 0."""
    config = run.config
    size = hf.number_of_parameters(config.model_spec(run.data.tokenizer.vocab_size))
    if run.steps:
        length = count(run.steps, "step")
    else:
        length = count(config.run.epochs or 0, "pass", "passes")
    run.runtime.say(
        f"{size:,} parameters, sequences of {config.data.seq_len} tokens;"
        f" {run.layout.tokens_per_step:,} tokens a step, {length}"
    )
