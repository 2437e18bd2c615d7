"""A checkpoint's validation figures; the command line, judged before torch is imported."""

import tempfile

from pydantic import Field

from dist_lm.cli import Command, read_flags_and_settings
from dist_lm.config import FIELDS, Section
from dist_lm.errors import run_entry
from dist_lm.launcher import die_with_launcher


def _may_differ(name: str) -> bool:
    """Whether a setting may differ from that of the run; the rest comes with the checkpoint."""
    if name in ("data.tokenizer", "run.dir"):
        return False
    return name.startswith("data.") or name in ("run.precision", "run.eval_batches")


class ScoreFlags(Section):
    """A checkpoint's validation figures.

    Without --data.input: the number that training prints at an evaluation, of the run's own
    held-out documents; of a run with several validation sets all by name. With it: of that text's
    (or prepared folder's) held-out documents, chosen as training would; --data.val_fraction 0
    scores the whole text.

    One process; nothing is trained, and the run's folder is only read. The settings start as the
    run's, not at the values shown here.
    """

    ckpt: str = Field(
        description="A run folder, a step folder or a folder in transformers' layout."
    )
    ema: bool = Field(
        False, description="Score the moving average of the weights that a run with run.ema kept."
    )
    as_json: bool = Field(False, alias="json", description="Print one JSON object.")


SCORE = Command(
    "python -m dist_lm.score --ckpt RUN_OR_STEP_OR_HF_FOLDER [--data.input TEXT]",
    ScoreFlags,
    settings={name: name for name in FIELDS if _may_differ(name)},
    refusal="score takes it from --ckpt; rule: data.*, run.precision, run.eval_batches",
)


def main(argv: list[str]) -> None:
    die_with_launcher()
    flags, settings = read_flags_and_settings(argv or ["--help"], SCORE)
    from dist_lm.scoring import score  # torch, which is slow to import

    with tempfile.TemporaryDirectory(prefix="dist_lm-score-") as scratch:
        score(flags.ckpt, settings, scratch, average=flags.ema, as_json=flags.as_json)


if __name__ == "__main__":
    run_entry(main)
