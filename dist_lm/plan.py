"""Will it fit, how long, at what cost; the command line, judged before torch is imported.

Needs no GPU and never makes the model; planning/ derives all figures from shapes and fake tensors.
"""

import json

from pydantic import Field

from dist_lm.cli import ALL_SETTINGS, Command, ConfigFlags, load
from dist_lm.errors import run_entry
from dist_lm.planning.cluster import Cluster, GpuKind


class PlanFlags(ConfigFlags):
    """Will it fit, how long, at what cost. Needs no GPU.

    What a process holds under each strategy, the largest micro-batch that fits, and at a stated
    MFU the time, the energy and the room that checkpoints need.
    """

    launch: str | None = Field(
        None, description="The strategy to mark: a file of launch/; unset: single or ddp."
    )
    nodes: int = Field(1, ge=1, description="Machines.")
    gpus_per_node: int = Field(8, ge=1, description="GPUs, and processes, of each.")
    gpu: GpuKind = Field("h100", description="Kind of GPU; cpu: this machine's processor.")
    network: float = Field(
        50.0,
        gt=0,
        le=10000,
        examples=[50.0],
        description="GB/s between nodes, for each GPU, one way; 50 is 400 Gb/s.",
    )
    mfu: float = Field(
        0.4,
        gt=0,
        le=1,
        examples=[0.4],
        description="Share of the peak that training reaches without a network; a guess until"
        " measured.",
    )
    vocab_size: int | None = Field(
        None,
        ge=1,
        description="Tokens of the vocabulary, where neither data.input nor data.tokenizer says.",
    )
    as_json: bool = Field(False, alias="json", description="Print one JSON object.")
    table: bool = Field(
        False, description="Print all recipes of configs/ under every strategy instead."
    )


PLAN = Command(
    "python -m dist_lm.plan --config FILE [--launch zero3] [--nodes 8] [--gpu h100]",
    PlanFlags,
    settings=ALL_SETTINGS,
)


def main(argv: list[str]) -> None:
    config, flags = load(argv, PLAN)
    cluster = Cluster(flags.gpu, flags.nodes, flags.gpus_per_node, 1e9 * flags.network)
    from dist_lm.planning.estimate import estimate  # torch, which is slow to import
    from dist_lm.planning.page import describe, table
    from dist_lm.size import vocabulary

    if flags.table:
        print(table(cluster), end="")
        return
    vocab_size = flags.vocab_size or vocabulary(config)
    figures = estimate(config, vocab_size, flags.launch, cluster, flags.mfu)
    source = flags.config[-1] if flags.config else "defaults"
    if flags.as_json:
        print(json.dumps(figures, indent=1))
    else:
        print(describe(figures, source))


if __name__ == "__main__":
    run_entry(main)
