"""Prints the tables of docs/scaling.md: what a step waits for by the model of planning/network.py.

python -m benchmarks.scaling
"""

from dataclasses import dataclass

from dist_lm.cli import load
from dist_lm.config import Config, batch_layout
from dist_lm.model.init import flops_per_token
from dist_lm.outcome import TRAIN
from dist_lm.planning.cluster import Cluster
from dist_lm.planning.estimate import peak, with_changes
from dist_lm.planning.network import efficiency, seconds_waiting
from dist_lm.runtime.strategy import choose_strategy

WORLDS = (8, 64, 256, 1024)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
MFU = 0.4
# Tokens of the vocabulary, and in how many backward passes a process makes a step.
RECIPES = {"gpt2-124m": (50257, 2), "gpt2-1558m": (50257, 2), "llama-7b": (32000, 4)}


@dataclass(frozen=True)
class PeerRow:
    """What torchtitan published of Llama 3.1 8B on H100, in tokens a second for each GPU."""

    name: str
    of_8: float  # GPUs, in one node
    of_128: float


# github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3
PEERS = (
    PeerRow("FSDP", 5762, 5605),
    PeerRow("FSDP, torch.compile", 6667, 6514),
    PeerRow("FSDP, torch.compile, Float8", 8532, 8380),
)
PEERS_TOKENS = 2 * 8192  # of a GPU in a step
PEERS_PARAMETERS = 8.03e9


def waiting_of(name: str, strategy: str, world: int) -> float:
    """The share of a step that waits, where each process has the same work on any number."""
    vocab_size, passes = RECIPES[name]
    config, _ = load(["--config", f"configs/{name}.yaml"], TRAIN)
    batch = (config.data.micro_batch or 1) * passes * world
    config = with_changes(config, "data", global_batch=batch)
    cluster = Cluster("h100", world // 8, 8)
    layout = batch_layout(config, world)
    return 1 - efficiency(
        config,
        choose_strategy(strategy),
        cluster,
        layout,
        vocab_size=vocab_size,
        seconds=seconds_of_step(config, vocab_size, cluster),
    )


def seconds_of_step(config: Config, vocab_size: int, cluster: Cluster) -> float:
    flops = flops_per_token(config.model_spec(vocab_size))
    tokens = config.data.global_batch * config.data.seq_len
    return tokens * flops / (MFU * peak(cluster) * cluster.world)


def predicted(row: PeerRow) -> float:
    """Tokens a second of a GPU among 128, from those among 8.

    All is sent as fp32, which is twice what FSDP gathers.
    """
    layout = batch_layout(load([], TRAIN)[0], 1)
    assert layout.accumulation == 1
    seconds = {}
    for world in (8, 128):
        cluster = Cluster("h100", world // 8, 8)
        one_way = 4 * PEERS_PARAMETERS * (world - 1) / world / cluster.bandwidth
        # Compute that takes as long as the step of 8 GPUs: they wait for next to nothing.
        compute = PEERS_TOKENS / row.of_8
        seconds[world] = compute + seconds_waiting(3, layout, one_way, one_way / 32, compute)
    return row.of_8 * seconds[8] / seconds[128]


def tables() -> str:
    lines = [
        "| GPUs | " + " | ".join(f"{name}, {s}" for name in RECIPES for s in STRATEGIES) + " |"
    ]
    lines.append("|---" * (1 + len(RECIPES) * len(STRATEGIES)) + "|")
    for world in WORLDS:
        cells = []
        for name in RECIPES:
            cells += [f"{waiting_of(name, strategy, world):.1%}" for strategy in STRATEGIES]
        lines.append(f"| {world:,} | " + " | ".join(cells) + " |")
    lines += ["", "| torchtitan, Llama 3.1 8B | 8 GPUs | 128 GPUs | by the model | off by |"]
    lines.append("|---|---|---|---|---|")
    for row in PEERS:
        by_model = predicted(row)
        off = by_model / row.of_128 - 1
        cells = [row.name, f"{row.of_8:,}", f"{row.of_128:,}", f"{by_model:,.0f}", f"{off:+.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(tables(), end="")
