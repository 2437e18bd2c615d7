"""state.json: everything of a step that is not a tensor.

It is composed here and read here. A run goes on from it, and `show` and `score` read the config and
the data's identity.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field

from dist_lm import __version__
from dist_lm.checkpoint.curve import Curve, CurveFacts
from dist_lm.checkpoint.folder import damaged, read_json, verify
from dist_lm.config import Config
from dist_lm.outside import CheckedModel, Count, Text, check
from dist_lm.revision import git_commit

_LONGEST_RANGE = 1000  # batches that are stepped over in one place; a run has at most 24
_MOST_RANGES = 10_000


@dataclass
class TrainState:
    """All that a run carries from step to step besides tensors."""

    step: int = 0  # updates made
    tokens: int = 0  # targets trained on
    skipped_updates: int = 0  # fp16 overflows
    val_loss: float | None = None  # of the evaluation at this step, if there was one
    streams: dict[str, Any] = field(default_factory=dict)  # where this rank's raw sources stand
    # Loss and gradient norm of the last steps, with which the next one is compared.
    recent: list[list[float]] = field(default_factory=list)
    # Ranges of global batches that the run steps over, as data/order.py means them.
    stepped_over: list[list[int]] = field(default_factory=list)
    curve: Curve = field(default_factory=Curve)

    def advance(self, streams: dict[str, Any]) -> None:
        """An update was made; the raw sources stand at `streams` now."""
        self.step += 1
        self.val_loss = None
        self.streams = streams

    @classmethod
    def restored(cls, facts: Mapping[str, Any]) -> "TrainState":
        """The state of a run that goes on from these facts."""
        return cls(
            step=facts["step"],
            tokens=facts["tokens"],
            skipped_updates=facts["skipped_updates"],
            streams=facts.get("streams", {}),
            recent=[list(figures) for figures in facts.get("recent", [])],
            stepped_over=[list(part) for part in facts.get("stepped_over", [])],
            curve=Curve.restored(facts.get("curve", {})),
        )


def compose_state(
    state: TrainState,
    streams: Mapping[str, Any],
    strategy: str,
    world_size: int,
    scaler: Mapping[str, Any],
    config: Config,
    data_identity: str,
    facts_of_bits: Mapping[str, str],
) -> dict[str, Any]:
    """The content of state.json. `streams` are of all ranks; `state` has only this rank's."""
    return {
        **asdict(state),
        "streams": streams,
        "strategy": strategy,
        "world_size": world_size,
        "scaler": scaler,
        "config": config.model_dump(mode="json"),
        "data": data_identity,
        "versions": {"dist_lm": __version__, "torch": torch.__version__},
        "commit": git_commit(),
        **facts_of_bits,
    }


# --- reading it back


class Cursor(CheckedModel):
    """The cursor of a lane, as lane.py means it."""

    passed: Count = Field(alias="pass")
    block: Count
    part: Count
    row: Count
    document: Count
    offset: Count
    skipped: dict[str, Count] = Field({})
    left_out: dict[str, Count] = Field({})


class StreamFacts(CheckedModel):
    """The state of a source of raw text, as stream.py means it."""

    passed: Count = Field(alias="pass")
    turn: Count
    done: list[Count]
    lanes: dict[str, Cursor]


class StreamsFacts(CheckedModel):
    """The state of all sources, as mix.py means it."""

    streams: dict[str, StreamFacts]
    ended: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]
    end: Count | None


def _check_range(part: list[int]) -> list[int]:
    """A range of batches that a reader may have to read through."""
    if not 0 < part[1] - part[0] <= _LONGEST_RANGE:
        raise ValueError(f"must have 1 to {_LONGEST_RANGE} batches")
    return part


Range = Annotated[list[Count], Field(min_length=2, max_length=2), AfterValidator(_check_range)]
LossAndNorm = Annotated[list[float], Field(min_length=2, max_length=2)]


class StateFacts(CheckedModel):
    """The other parts of a state.json."""

    step: Count
    tokens: Count
    skipped_updates: Count
    val_loss: Annotated[float, Field(allow_inf_nan=True)] | None
    streams: dict[str, Any] = Field({})
    recent: list[LossAndNorm] = Field([])
    stepped_over: Annotated[list[Range], Field(max_length=_MOST_RANGES)] = Field([])
    curve: CurveFacts = CurveFacts()
    strategy: Text
    world_size: Count
    scaler: dict[str, float]
    config: dict[str, dict[str, Any]]
    data: Text
    weights_hash: Text = Field("")  # these two are of run.exact
    kernels: Text = Field("")


def read_state(folder: Path) -> dict[str, Any]:
    """The facts of a step. Damaged ones are refused with a UserError."""
    path = folder / "state.json"
    facts = read_json(path)
    refuse = partial(damaged, path)
    check(facts, StateFacts, refuse)
    if facts.get("streams"):  # prepared shards have none
        check(facts["streams"], StreamsFacts, refuse)
    return facts


def verify_state(folder: Path, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """The facts of a checkpoint from which a run can go on: all its files are right.

    Several ranks divide the files among them; each must call this.
    """
    manifest = verify(folder, rank, world_size)
    facts = read_state(folder)
    if facts["step"] != manifest["step"]:
        raise damaged(folder / "state.json", f"is of step {facts['step']}")
    return facts
