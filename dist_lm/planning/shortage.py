"""The error for a device with too little memory: plan's figures, and what would fit."""

from dataclasses import dataclass

import torch

from dist_lm.config import Config, batch_layout
from dist_lm.console import gigabytes
from dist_lm.planning.cluster import OVERHEAD, Cluster
from dist_lm.planning.estimate import largest_micro_batch, with_changes
from dist_lm.planning.memory import Memory, memory
from dist_lm.runtime.strategy import Strategy

_PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


@dataclass(frozen=True)
class ThisCluster(Cluster):
    """The processes of a run that goes on, and the memory of this one's device."""

    processes: int = 1
    device: str = "cpu"

    @property
    def world(self) -> int:
        return self.processes

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def room(self) -> float:
        if self.on_gpu:
            return torch.cuda.get_device_properties(self.device).total_memory - OVERHEAD
        return Cluster("cpu", per_node=self.processes).room


def explain_shortage(
    config: Config, strategy: Strategy, vocab_size: int, world: int, device: torch.device
) -> str:
    """One line for a run whose device had too little memory."""
    cluster = ThisCluster(processes=world, device=str(device))
    micro_batch = batch_layout(config, world).micro_batch
    figures = memory(config, strategy, world, vocab_size, cluster.on_gpu)
    return (
        f"data.micro_batch={micro_batch} did not fit into the memory of {device}; by plan"
        f" {strategy.name(world)} takes {gigabytes(figures.peak)} GB of"
        f" {gigabytes(cluster.room)} GB ({_spell(figures)});"
        f" nearest: the same command with {_remedy(config, strategy, vocab_size, cluster)}"
    )


def _spell(figures: Memory) -> str:
    """The parts of the memory, as plan's table has them."""
    return ", ".join(f"{part} {gigabytes(getattr(figures, part))}" for part in _PARTS)


def _remedy(config: Config, strategy: Strategy, vocab_size: int, cluster: Cluster) -> str:
    """The flags with which the run fits. The plan's own micro-batch did not fit, so it is halved.

    Recomputation comes where not even one sequence fits, and then another strategy.
    """
    micro_batch = batch_layout(config, cluster.world).micro_batch
    most = largest_micro_batch(config, strategy, cluster, vocab_size)
    fitting = min(most, micro_batch // 2)
    if fitting:
        return f"--data.micro_batch {fitting}"
    spared = with_changes(config, "run", activation_checkpointing=True)
    most = min(largest_micro_batch(spared, strategy, cluster, vocab_size), micro_batch)
    if most and not config.run.activation_checkpointing:
        return f"--run.activation_checkpointing true --data.micro_batch {most}"
    return "--launch zero3, or on more GPUs"
