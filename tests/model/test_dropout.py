"""Masks are a hash of (row key, place, element), and look like chance."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dist_lm.model.dropout import GOLDEN, dropout, keys_of_places, mix, signed


def splitmix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


def test_hash_is_splitmix64() -> None:
    """The published numbers of seed 1234567 (Rosetta Code), and negative inputs.

    Shifts of negative inputs must be logical.
    """
    states = [1234567 + n * GOLDEN for n in (1, 2, 3)]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix(s % 2**64) for s in states] == published
    inputs = [*states, -1, -(2**63), 2**63 - 1, 0]
    found = mix(torch.tensor([signed(s) for s in inputs])).tolist()
    assert [n % 2**64 for n in found] == [splitmix(s % 2**64) for s in inputs]


def mask_of(
    keys: list[int], place: int = 1, rate: float = 0.1, shape: tuple[int, int] = (64, 48)
) -> Tensor:
    place_keys_B = keys_of_places(torch.tensor(keys), place + 1)[place]
    return dropout(torch.ones(len(keys), *shape), place_keys_B, rate)


def test_dropout_mask_follows_from_the_key_by_hand() -> None:
    mask_TD = mask_of([-3], place=2, rate=0.25, shape=(3, 3))[0]
    start = splitmix((-3 + 2 * GOLDEN) % 2**64)
    words = [splitmix((start + n) * GOLDEN % 2**64) for n in range(3)]
    expected = []
    for word in words:
        for shift in (0, 16, 32, 48):
            level = (word >> shift) % 2**16
            level_from_lowest = (level + 2**15) % 2**16  # of a signed number of 16 bits
            expected.append(4 / 3 if level_from_lowest >= 0.25 * 2**16 else 0.0)
    assert torch.allclose(mask_TD.flatten(), torch.tensor(expected[:9]))


def test_compiled_it_drops_the_same_without_a_view_of_other_bits() -> None:
    """torch.compile does not fuse a view of 64 bits as 16."""
    codes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        codes.append(graph.code)
        return graph

    keys_B = keys_of_places(torch.tensor([5, -7]), 2)[1]
    x_BTD = torch.randn(2, 9, 7)
    compiled = torch.compile(dropout, backend=backend, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x_BTD, keys_B, 0.3), dropout(x_BTD, keys_B, 0.3))
    assert len(codes) == 1
    assert "int16" not in codes[0]


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_dropout_drops_its_rate_and_keeps_the_mean(rate: float) -> None:
    mask_BTD = mask_of(list(range(64)), rate=rate)
    sigma = math.sqrt(rate * (1 - rate) / mask_BTD.numel())
    dropped = (mask_BTD == 0).float().mean().item()
    assert abs(dropped - rate) <= 4 * sigma + 2**-16
    assert torch.allclose(mask_BTD[mask_BTD > 0], torch.tensor(1 / (1 - rate)), rtol=1e-3)


def test_dropout_masks_are_independent() -> None:
    """Correlations are those of chance, of consecutive keys too.

    Between rows, between places and between neighbouring elements.
    """
    keys = [*range(20), *(splitmix(n) - 2**63 for n in range(20))]
    masks = torch.cat([mask_of(keys, place).flatten(1) for place in (0, 1, 2, 8)])  # 160 masks
    centred = (masks > 0).double() - 0.9
    n = centred.shape[1]
    correlation = centred @ centred.T / (0.09 * n)
    apart = correlation[~torch.eye(len(correlation), dtype=torch.bool)]
    assert abs(apart.mean().item()) < 1e-3
    assert apart.abs().max().item() < 5.5 / math.sqrt(n)  # of 12,720 pairs
    assert abs(apart.std().item() * math.sqrt(n) - 1) < 0.05
    for lag in (1, 2, 3, 4, 48):
        along = (centred[:, :-lag] * centred[:, lag:]).mean().item() / 0.09
        assert abs(along) < 5 / math.sqrt(centred.numel())


def test_dropout_follows_rows_not_batches() -> None:
    keys = [1, 2, 3, 4]
    whole = mask_of(keys)
    assert torch.equal(whole, torch.cat([mask_of(keys[:1]), mask_of(keys[1:])]))
    assert torch.equal(mask_of([4, 1]), whole[[3, 0]])
