"""The flags of doctor."""

from pydantic import Field

from dist_lm.cli import ALL_SETTINGS, Command, ConfigFlags


class DoctorFlags(ConfigFlags):
    """Are these machines fit for the run.

    Started as train.py would be (torchrun, accelerate launch, srun, alone) with the same
    arguments. One page, each line ok, warn or fail, with what to do; nothing is trained and nothing
    stays in the run folder. Exit code 0 when nothing fails, else that of the first failure: 2
    settings, 65 data, 70 machines. Every check ends in bounded time; when a rank dies or is silent,
    all others report it.
    """

    launch: str | None = Field(
        None, description="The strategy that train.py will get: a file of launch/."
    )
    as_json: bool = Field(False, alias="json", description="Print one JSON object.")
    timeout_seconds: int = Field(
        60,
        ge=1,
        examples=[60],
        description="How long to wait for a silent rank or a hanging folder.",
    )


DOCTOR = Command(
    "torchrun --nproc-per-node 8 -m dist_lm.doctor --config FILE [--launch zero3]",
    DoctorFlags,
    settings=ALL_SETTINGS,
)
