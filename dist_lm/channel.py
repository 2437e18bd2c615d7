"""channel."""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LARGEST_MESSAGE = 64 * 2**20  # bytes of JSON a peer may send


class Channel:
    """Messages between ranks over one process group: JSON and tensors, never anything that is unpickled."""

    def __init__(self, rank: int, world_size: int, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.group: Any = None  # None: the group of training

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. All ranks."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(
            self.device
        )
        sizes = [
            torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)
        ]
        dist.all_gather(sizes, torch.tensor([len(message)], device=self.device), group=self.group)
        largest = int(max(int(size) for size in sizes))
        assert largest <= _LARGEST_MESSAGE, f"a rank sends {largest} bytes of JSON"
        padded = torch.zeros(largest, dtype=torch.uint8, device=self.device)
        padded[: len(message)] = message
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=self.group)
        return [
            json.loads(bytes(g[: int(n)].cpu().numpy()))
            for g, n in zip(gathered, sizes, strict=True)
        ]

    def send(self, tensor: Tensor, to: int, tag: int) -> Any:
        """Start sending; the tensor must stay as it is until wait() on what this returns."""
        return dist.isend(tensor, to, group=self.group, tag=tag)

    def receive(self, tensor: Tensor, sender: int, tag: int) -> None:
        dist.recv(tensor, sender, group=self.group, tag=tag)

    def exchange(self, parts: list[Tensor], lengths: list[int]) -> list[Tensor]:
        """Give parts[r] to rank r; what came from each rank, lengths[r] elements from rank r. All ranks."""
        received = parts[0].new_empty(sum(lengths))
        lengths_sent = [len(part) for part in parts]
        dist.all_to_all_single(received, torch.cat(parts), lengths, lengths_sent, group=self.group)
        return list(torch.split(received, lengths))
