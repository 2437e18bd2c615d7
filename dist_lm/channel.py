"""Messages between ranks: JSON and tensors over one process group. Nothing is ever unpickled."""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LARGEST_MESSAGE = 64 * 2**20  # bytes of JSON that a peer may send


class Channel:
    """A process group, and what this project sends over one. Without peers nothing is sent."""

    def __init__(self, rank: int, world_size: int, device: torch.device):
        self.rank = rank
        self.world_size = world_size
        self.device = device  # where tensors must lie for the group's backend
        self.group: Any = None  # None: the group of training

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; it travels as JSON. All ranks."""
        data = json.dumps(value).encode()
        if self.world_size == 1:
            return [json.loads(data)]
        message = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        sizes = self._gather_sizes(len(message))
        largest = max(sizes)
        assert largest <= _LARGEST_MESSAGE, f"a rank sends {largest} bytes of JSON"
        padded = torch.zeros(largest, dtype=torch.uint8, device=self.device)
        padded[: len(message)] = message
        received = self.collect(padded).cpu().numpy().reshape(self.world_size, largest)
        return [json.loads(bytes(row[:size])) for row, size in zip(received, sizes, strict=True)]

    def _gather_sizes(self, size: int) -> list[int]:
        """Every rank's size, by rank. All ranks."""
        return self.collect(torch.tensor([size], device=self.device)).tolist()

    def send(self, tensor: Tensor, to: int, tag: int) -> Any:
        """Start sending; the tensor must stay as it is until wait() on what this returns."""
        return dist.isend(tensor, to, group=self.group, tag=tag)

    def receive(self, tensor: Tensor, sender: int, tag: int) -> None:
        """Fill the tensor with what the sender sends under this tag; waits for it."""
        dist.recv(tensor, sender, group=self.group, tag=tag)

    def exchange(self, parts: list[Tensor], lengths: list[int]) -> list[Tensor]:
        """Give parts[r] to rank r; returns lengths[r] elements that came from rank r. All ranks."""
        received = parts[0].new_empty(sum(lengths))
        lengths_sent = [len(part) for part in parts]
        dist.all_to_all_single(received, torch.cat(parts), lengths, lengths_sent, group=self.group)
        return list(torch.split(received, lengths))

    def collect(self, part: Tensor) -> Tensor:
        """Every rank's tensor, of equal shape, one after another in rank order. All ranks."""
        whole = part.new_empty((self.world_size * len(part), *part.shape[1:]))
        dist.all_gather(list(whole.chunk(self.world_size)), part, group=self.group)
        return whole
