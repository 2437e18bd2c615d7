"""Whether the replicas of the weights are still equal: under DDP every rank has all of them.

A bit that flips in the memory of one device changes the weights of its rank alone. Gradients are
averaged, so the damage spreads slowly and without an error. A bit that flips in the arithmetic of a
gradient reaches all ranks at once, and their weights stay equal. So each rank can also compute a
gradient of its neighbour's again.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_MULTIPLIER = 0x2545F4914F6CDD1D  # odd, so that no bit of a sum gets lost


def hash_of_bits(tensors: Iterable[Tensor]) -> Tensor:
    """A 64-bit number that any one flipped bit changes, without a host sync.

    It is a sum of the elements' bits as integers, so their order of addition does not matter.
    """
    total: Tensor | None = None
    for tensor in tensors:
        bits = tensor.detach().view(torch.int32).sum(dtype=torch.int64)
        total = bits if total is None else total * _MULTIPLIER + bits
    assert total is not None, "a model has weights"
    return total


def who_computes_otherwise(own: Sequence[int], of_neighbour: Sequence[int]) -> list[int]:
    """The ranks whose gradients are not those that another rank computes from the same rows.

    `own` has each rank's hash of its gradient, `of_neighbour` its hash of that of the rank before
    it. A rank that differs from both of its neighbours is wrong; of a pair alone nobody can tell.
    """
    world = len(own)
    suspicions = Counter[int]()
    for rank in range(world):
        neighbour = (rank + 1) % world
        if own[rank] != of_neighbour[neighbour]:
            suspicions.update([rank, neighbour])
    surely = [rank for rank, number in suspicions.items() if number == 2]
    return sorted(surely if world > 2 and surely else suspicions)


def who_differs(hashes: Sequence[int]) -> list[int]:
    """The ranks that differ from the majority; all ranks where there is none, or no rank."""
    if len(set(hashes)) == 1:
        return []
    common, number = Counter(hashes).most_common(1)[0]
    if 2 * number <= len(hashes):
        return list(range(len(hashes)))
    return [rank for rank, value in enumerate(hashes) if value != common]
