"""Steps of a run made once more, and compared bit by bit with what the run recorded.

Under run.exact a step is the same on any number of processes. So a replay that gets other bits
proves that one of the two computed wrongly, or from other data, weights or settings. Nothing is
written into the run folder.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dist_lm.checkpoint.folder import step_folders, step_of
from dist_lm.checkpoint.layout import OwnedSlice
from dist_lm.checkpoint.load import restore
from dist_lm.checkpoint.state import read_state, verify_state
from dist_lm.config import Config
from dist_lm.console import count
from dist_lm.errors import CheckpointError, DataError, UserError
from dist_lm.history import open_data
from dist_lm.loop import Pending, begin, end_reading, make_step
from dist_lm.metrics import read_lines
from dist_lm.model import hf
from dist_lm.outcome import Attempt
from dist_lm.resume import ResumePoint, Run, build
from dist_lm.runtime.exact import saved_tensors
from dist_lm.runtime.fixed_point import spell
from dist_lm.runtime.late import Moment
from dist_lm.runtime.start import start
from dist_lm.runtime.world import Runtime
from dist_lm.spikes import Ranges, with_range

_SECONDS_BETWEEN = 5.0  # lines about the progress
_MOST_NAMES = 5  # tensors in a line


@dataclass(frozen=True)
class Step:
    """What a step's line in metrics.jsonl says, or its replay."""

    lr: float
    grad_hash: str
    batch_hash: str = ""  # with run.log_batch_hash
    unit_hashes: Sequence[str] = ()  # with run.log_unit_hashes
    world_size: int = 1  # on which it was made


@dataclass
class History:
    """What metrics.jsonl says of a run. Of a step that was made again, the last line stands."""

    steps: dict[int, Step] = field(default_factory=dict)
    first_start: int = 0  # updates before the first start
    stepped_over: Ranges = field(default_factory=list)  # after spikes


def verify(config: Config, first: int, last: int) -> bool:
    """Replay and compare the updates from `first` to `last`; whether all are equal. All ranks."""
    with tempfile.TemporaryDirectory() as elsewhere:  # how a replay ends is not the run's ending
        runtime = start(config, attempt=Attempt(Path(elsewhere)))
        try:
            found = _verify(runtime, config, first, last)
        except UserError:
            runtime.close()
            raise
        except Exception as error:
            runtime.give_up(error)
            raise
        if runtime.is_main:
            print("\n".join(found or [_all_equal(config, first, last)]), flush=True)
        runtime.close()
    return not found


def _all_equal(config: Config, first: int, last: int) -> str:
    what = f"step {first} is" if first == last else f"steps {first} to {last} are"
    return f"equal: {what} to the last bit what {config.run.dir} recorded"


def _verify(runtime: Runtime, config: Config, first: int, last: int) -> list[str]:
    """What differs first, in lines, or nothing. All ranks."""
    history = History()  # rank 0 reads it: the others may see the folder otherwise for a while
    stepped_over = runtime.on_main(lambda: _read_history(history, config, first, last))
    chosen = runtime.on_main(lambda: _choose_checkpoint(config, history, first))
    run = _stand_at(runtime, config, chosen)
    # A range begins behind all steps that were made before the run went back. So steps before it
    # are the same with it.
    run.state.stepped_over = stepped_over
    where = Path(chosen).name if chosen else "the beginning"
    runtime.say(
        f"replaying steps {run.state.step + 1} to {last} of {config.run.dir} from {where}, on"
        f" {count(runtime.world_size, 'process', 'processes')}"
    )
    found = _other_weights(run, chosen) or _compare_steps(run, history, last)
    end_reading(run)
    return found


# --- what the run recorded


def _read_history(history: History, config: Config, first: int, last: int) -> Ranges:
    """Fill in what is recorded of a run; the batches that it stepped over. Rank 0."""
    world_size = 1
    has_started = False
    for line in read_lines(config.run.dir):
        event = line.get("event")
        if event == "start":
            world_size = line.get("world_size", 1)
            if not has_started:
                history.first_start = line["step"]
            has_started = True
        elif event == "spike" and line.get("back") is not None:
            begin, end = line["batches"]
            history.stepped_over = with_range(history.stepped_over, begin, end + 1)
        elif "grad_hash" in line:
            history.steps[line["step"]] = _recorded(line, world_size)
    for step in range(first, last + 1):
        if step not in history.steps:
            newest = max(history.steps, default=0)
            raise CheckpointError(
                f"{config.run.dir}: no grad_hash of step {step} in metrics.jsonl; rule: steps that"
                f" the run has made; the newest is {newest}"
            )
    return history.stepped_over


def _recorded(line: Mapping[str, Any], world_size: int) -> Step:
    return Step(
        lr=line.get("lr", 0.0),
        grad_hash=line["grad_hash"],
        batch_hash=line.get("batch_hash", ""),
        unit_hashes=line.get("unit_hashes", ()),
        world_size=world_size,
    )


# --- standing where the replay begins


def _choose_checkpoint(config: Config, history: History, first: int) -> str | None:
    """The newest valid checkpoint before an update; None is the beginning of the run. Rank 0."""
    for folder in reversed(step_folders(Path(config.run.dir))):
        if step_of(folder) < first:
            try:
                verify_state(folder)
            except UserError:
                continue
            return str(folder)
    if history.first_start > 0:
        raise CheckpointError(
            f"{config.run.dir} has no valid checkpoint before step {first}, and began at step"
            f" {history.first_start}; rule: one before the step; run.keep_every keeps some"
        )
    return None


def _stand_at(runtime: Runtime, config: Config, chosen: str | None) -> Run:
    """The run with weights and state of a checkpoint, or of its beginning. All ranks."""
    data = runtime.together(lambda: open_data(config))
    folder = None
    facts: Mapping[str, Any] = {}
    if chosen:
        folder = Path(chosen)
        facts = runtime.together(lambda: read_state(Path(chosen)))
        if facts["data"] != data.identity:
            raise DataError(f"{chosen}: its data was not what {config.data.title} holds")
    return build(runtime, config, ResumePoint(data, data.steps(config), folder, facts))


# --- one step after another


def replay(run: Run) -> Iterator[tuple[int, Step]]:
    """Make step after step: its number from 1, and what it was. All ranks."""
    runtime = run.runtime
    run.has_begun = True  # a replay is no start of the run, so none is recorded
    batch, targets, _ = begin(run)
    while True:
        pending, next_batch, targets = make_step(run, batch, targets, Moment(runtime.device))
        *_, are_refusing = pending.figures.read()
        runtime.refuse_together(are_refusing)
        run.state.advance(batch.after)
        yield pending.step, _made(pending)
        batch = next_batch


def _made(pending: Pending) -> Step:
    assert pending.gradient_hashes, "run.exact has hashes"
    of_sum, *of_units = map(spell, pending.gradient_hashes.read())
    of_batch = ""
    if pending.batch_hash:
        of_batch = spell(*pending.batch_hash.read())
    return Step(lr=pending.lr, grad_hash=of_sum, batch_hash=of_batch, unit_hashes=of_units)


def _compare_steps(run: Run, history: History, last: int) -> list[str]:
    """Replay up to an update; what differs first, or nothing. All ranks."""
    runtime = run.runtime
    folders = runtime.on_main(lambda: [str(folder) for folder in step_folders(run.dir)])
    checkpoints = {step_of(Path(folder)): folder for folder in folders}
    said_at = time.monotonic()
    steps = replay(run)
    for step, made in steps:
        found = runtime.channel.gather(differences(step, history.steps.get(step), made))[0]
        found += _other_weights(run, checkpoints.get(step))
        if found:
            return [*found, *_name_tensors(run, steps, checkpoints)]
        if step >= last:
            break
        if time.monotonic() - said_at > _SECONDS_BETWEEN:
            said_at = time.monotonic()
            runtime.say(f"step {step} of {last}: equal so far")
    return []


# --- what differs


def differences(step: int, recorded: Step | None, made: Step) -> list[str]:
    """What differs between what a run recorded of a step and its replay, in lines."""
    if recorded is None:  # of a step before those that were asked for
        return []
    lines = []
    if recorded.lr != made.lr:
        lines.append(f"the rate was {recorded.lr!r}, and is {made.lr!r} here")
    if recorded.batch_hash and made.batch_hash and recorded.batch_hash != made.batch_hash:
        lines.append("the data was other: the hashes of its batch differ")
    if recorded.grad_hash != made.grad_hash:
        lines.append(f"the gradient had the hash {recorded.grad_hash}, and has {made.grad_hash}")
        if made.unit_hashes:
            lines.append(_other_units(recorded, made))
    return [f"step {step} differs: {line}" for line in lines]


def _other_units(recorded: Step, made: Step) -> str:
    """Which units differ, and who computed them."""
    units = len(made.unit_hashes)
    if len(recorded.unit_hashes) != units:
        return "its line in metrics.jsonl has no hashes of units"
    pairs = zip(recorded.unit_hashes, made.unit_hashes, strict=True)
    other = [number for number, (then, now) in enumerate(pairs) if then != now]
    if not other:
        return "no unit differs, so the sum was wrong: the exchange, or the memory of rank 0"
    world = recorded.world_size
    numbers = ", ".join(map(str, other))
    ranks = ", ".join(str(rank) for rank in sorted({unit % world for unit in other}))
    if len(other) == units > 1:
        return f"all {units} units do: the weights did on all ranks, or all computed otherwise"
    return f"of {units} units, {numbers} do, which rank {ranks} of {world} computed"


def _other_weights(run: Run, folder: str | None) -> list[str]:
    """Whether the weights are not those that the run had when it saved a checkpoint. All ranks."""
    if not folder:
        return []
    spec = run.config.model_spec(run.data.tokenizer.vocab_size)
    here = run.runtime.engine.facts_of_bits(hf.shapes(spec))["weights_hash"]
    facts = run.runtime.together(lambda: read_state(Path(folder)))
    there = facts.get("weights_hash", here)
    if here == there:
        return []
    return [f"{Path(folder).name} differs: its weights have the hash {there}, and here {here}"]


def _name_tensors(
    run: Run, steps: Iterator[tuple[int, Step]], checkpoints: dict[int, str]
) -> list[str]:
    """The first tensors that differ in the next checkpoint. All ranks."""
    runtime = run.runtime
    later = [step for step in checkpoints if step >= run.state.step]
    if not later:
        return ["no checkpoint lies behind it, which would show the tensors"]
    target = min(later)
    runtime.say(f"replaying on to {Path(checkpoints[target]).name}, which shows the tensors")
    while run.state.step < target:
        next(steps)
    lines: list[str] = runtime.on_main(lambda: _compare_tensors(run, Path(checkpoints[target])))
    return lines


@torch.no_grad()
def _compare_tensors(run: Run, folder: Path) -> list[str]:
    """The first tensors that are not those of a checkpoint. Rank 0."""
    spec = run.config.model_spec(run.data.tokenizer.vocab_size)
    shapes = hf.shapes(spec)
    owned = list(run.runtime.engine.owned())
    copies = [_like(part) for part in owned]
    restore(folder, spec, copies, optimizer=True)
    here = saved_tensors(owned, shapes)
    there = saved_tensors(copies, shapes)
    different = []
    for name, tensor in here.items():
        elements = int((tensor.view(torch.int32) != there[name].view(torch.int32)).sum())
        if elements:
            different.append(f"{name} ({elements:,} of {len(tensor):,} elements)")
    if not different:
        return [f"{folder.name}: no tensor differs"]
    first = ", ".join(different[:_MOST_NAMES])
    return [f"{folder.name}: {len(different)} of {len(here)} tensors differ, the first: {first}"]


def _like(part: OwnedSlice) -> OwnedSlice:
    """Memory for the same part."""
    state = {key: torch.empty_like(value) for key, value in part.state.items()}
    extra = {key: torch.empty_like(value) for key, value in part.extra.items()}
    return replace(part, weight=torch.empty_like(part.weight), state=state, extra=extra)
