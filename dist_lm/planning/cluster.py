"""The machines that a run is planned for. Imports nothing slow: plan's command line names them."""

import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

GpuKind = Literal["a100-40", "a100-80", "h100", "h200", "b200", "l40s", "rtx4090", "cpu"]
# For the CUDA context, buffers of NCCL and cuBLAS, and fragmentation: assumed, and printed as such.
OVERHEAD = 2.0e9
# The share of the links' data sheet that collectives reach: assumed, and printed as such.
REACHED = 0.8


class Gpu(NamedTuple):
    """A kind of device."""

    device: str  # the name that its driver gives, by which metrics.py knows its peak
    memory: float  # bytes, as torch sees them
    watts: float  # at full power
    link: float  # bytes a second to the other GPUs of a node, one way: NVLink or PCIe 4


GPUS: dict[GpuKind, Gpu] = {
    "a100-40": Gpu("A100", 39.4 * 2**30, 400, 300e9),
    "a100-80": Gpu("A100", 79.2 * 2**30, 400, 300e9),
    "h100": Gpu("H100", 79.2 * 2**30, 700, 450e9),
    "h200": Gpu("H200", 139.8 * 2**30, 700, 450e9),
    "b200": Gpu("B200", 178.4 * 2**30, 1000, 900e9),
    "l40s": Gpu("L40S", 44.4 * 2**30, 350, 32e9),
    "rtx4090": Gpu("RTX 4090", 23.5 * 2**30, 450, 32e9),
    "cpu": Gpu("cpu", 0, 0, 0),
}


@dataclass(frozen=True)
class Cluster:
    """Nodes alike: a process on each GPU, or processes that share this machine's processor."""

    kind: GpuKind = "h100"
    nodes: int = 1
    per_node: int = 8  # processes
    network: float = 50e9  # bytes a second between nodes, for each GPU, one way

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def on_gpu(self) -> bool:
        return self.kind != "cpu"

    @property
    def bandwidth(self) -> float:
        """Bytes a second that pass between two neighbours of a ring through all processes."""
        link = GPUS[self.kind].link
        if self.nodes > 1:
            link = min(link, self.network * self.per_node)
        return REACHED * link

    @property
    def room(self) -> float:
        """Bytes that a process may take: of its GPU, or of this machine's memory."""
        if self.on_gpu:
            return GPUS[self.kind].memory - OVERHEAD
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return memory / self.per_node
