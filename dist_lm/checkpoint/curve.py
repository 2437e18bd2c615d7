"""The curve of a run, as its checkpoints carry it: few points, however long the run is.

metrics.jsonl has every step, but it belongs to the run folder. A checkpoint tells its own story, so
it carries points that are thinned out evenly. They depend on the steps alone, so a run that was
interrupted carries the same ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from dist_lm.outside import CheckedModel, Count, Text

MOST = 32  # points, and evaluations; an even number, because pairs are made one


@dataclass
class Curve:
    """Training losses in means over more and more steps, and evaluations."""

    every: int = 1  # steps between points
    loss_sum: float = 0.0  # of the steps after the last point
    steps: int = 0  # how many these are
    points: list[list[float]] = field(default_factory=list)  # step, tokens, mean loss, steps
    evaluations_every: int = 1  # evaluations between those that are kept
    evaluated: int = 0  # evaluations so far
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    newest: dict[str, Any] | None = None  # evaluation, kept or not

    def add_step(self, step: int, tokens: int, loss: float) -> None:
        """Take in the loss of a step; `tokens` are those of the run until its end."""
        if math.isfinite(loss):  # fp16 may overflow
            self.loss_sum += loss
            self.steps += 1
        if step % self.every or not self.steps:
            return
        self.points.append([step, tokens, self.loss_sum / self.steps, self.steps])
        self.loss_sum = 0.0
        self.steps = 0
        if len(self.points) == MOST:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [_joined(first, second) for first, second in pairs]
            self.every *= 2

    def add_evaluation(self, step: int, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Take in the figures of an evaluation, by validation set."""
        sets = {}
        for name, of_set in figures.items():
            sets[name] = [of_set["val_loss"], of_set["val_bits_per_byte"]]
        self.newest = {"step": step, "sets": sets}
        self.evaluated += 1
        if self.evaluated % self.evaluations_every:
            return
        self.evaluations.append(self.newest)
        if len(self.evaluations) == MOST:
            self.evaluations = self.evaluations[1::2]
            self.evaluations_every *= 2

    @classmethod
    def restored(cls, facts: Mapping[str, Any]) -> "Curve":
        """The curve that goes on from these facts, or a new one, if a run had none."""
        own = dict(facts)
        for name in ("points", "evaluations"):
            own[name] = list(own.get(name, []))
        return cls(**own)


def _joined(first: list[float], second: list[float]) -> list[float]:
    """Two points as one, at the place of the second."""
    steps = first[3] + second[3]
    mean = (first[2] * first[3] + second[2] * second[3]) / steps
    return [second[0], second[1], mean, steps]


Loss = Annotated[float, Field(allow_inf_nan=True)]
Point = Annotated[list[float], Field(min_length=4, max_length=4)]
Many = Annotated[int, Field(ge=1, le=2**48)]


class EvaluationFacts(CheckedModel):
    """An evaluation: the loss and the bits per byte of each validation set."""

    model_config = ConfigDict(extra="forbid")
    step: Count
    sets: dict[Text, Annotated[list[Loss], Field(min_length=2, max_length=2)]]


class CurveFacts(CheckedModel):
    """A curve as state.json has it."""

    model_config = ConfigDict(extra="forbid")
    every: Many = 1
    loss_sum: float = 0.0
    steps: Count = 0
    points: list[Point] = Field([], max_length=MOST)
    evaluations_every: Many = 1
    evaluated: Count = 0
    evaluations: list[EvaluationFacts] = Field([], max_length=MOST)
    newest: EvaluationFacts | None = None
