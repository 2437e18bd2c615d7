"""lm-eval on a run's checkpoints; the command line, judged before torch is imported."""

from typing import Annotated, Literal

from pydantic import Field

from dist_lm.cli import Command, read_flags
from dist_lm.config import Positive, Section
from dist_lm.errors import UserError, run_entry


class HarnessFlags(Section):
    """Measure checkpoints with EleutherAI's lm-eval.

    Of a run the newest checkpoint, or with --follow each one as it appears, beside the training
    that goes on. The results go to RUN/evals.jsonl and, under the step of the checkpoint, to the
    run's TensorBoard. Report and publish show them. What was measured already is not measured
    again.

    One process, which reads the network as generate does: any model of dist_lm, and folders in the
    layout of transformers.
    """

    ckpt: str = Field(
        description="A run folder, a step folder or a folder in transformers' layout."
    )
    tasks: str = Field(min_length=1, description="Tasks of lm-eval, separated by commas.")
    follow: bool = Field(False, description="Go on with each new checkpoint until the run ends.")
    include_path: str | None = Field(None, description="A folder with task files of your own.")
    num_fewshot: Annotated[int, Field(ge=0, le=10_000)] | None = Field(
        None, description="Examples before each question; unset: as the task has it."
    )
    limit: float | None = Field(
        None, gt=0, description="Documents of a task at most, or below 1 a share of them."
    )
    batch_size: Positive = Field(16, le=2**16, description="Texts in one forward.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if torch sees one."
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Arithmetic of the model.")
    as_json: bool = Field(False, alias="json", description="Print one JSON object a checkpoint.")


HARNESS = Command(
    "python -m dist_lm.harness --ckpt RUN --tasks arc_easy,hellaswag [--follow]", HarnessFlags
)


def main(argv: list[str]) -> None:
    flags = read_flags(argv or ["--help"], HARNESS)
    tasks = [name.strip() for name in flags.tasks.split(",") if name.strip()]
    if not tasks:
        raise UserError(f"--tasks={flags.tasks!r} names none; nearest: --tasks arc_easy")
    from dist_lm.measuring import Wanted, measure  # torch, which is slow to import

    wanted = Wanted(
        tasks=tasks,
        include_path=flags.include_path,
        shots=flags.num_fewshot,
        limit=flags.limit,
        batch_size=flags.batch_size,
        device=flags.device,
        dtype=flags.dtype,
    )
    measure(flags.ckpt, wanted, follow=flags.follow, as_json=flags.as_json)


if __name__ == "__main__":
    run_entry(main)
