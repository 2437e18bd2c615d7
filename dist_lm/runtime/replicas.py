"""Whether the replicas of the weights are still equal: under DDP every rank has all of them.

A bit that flips in the memory or in the arithmetic of one device changes the weights of its rank
alone. Gradients are averaged, so the damage spreads slowly and without an error.
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


def who_differs(hashes: Sequence[int]) -> list[int]:
    """The ranks that differ from the majority; all ranks where there is none, or no rank."""
    if len(set(hashes)) == 1:
        return []
    common, number = Counter(hashes).most_common(1)[0]
    if 2 * number <= len(hashes):
        return list(range(len(hashes)))
    return [rank for rank, value in enumerate(hashes) if value != common]
