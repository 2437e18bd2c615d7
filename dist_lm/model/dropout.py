"""Dropout without a generator: a mask is a hash of (row key, place, element).

So it is the same on any device, in any batch, and when a block is computed again in the backward.
All arithmetic is on int64, which wraps around.

Shapes: B rows, T tokens, D width; P places in the network; W words of 64 bits, each the hash of
four elements.
"""

import torch
from torch import Tensor

from dist_lm.arithmetic import ceil_div

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64
LEVELS = 2**16  # of the 16 bits that decide on an element


def keys_of_places(row_keys_B: Tensor, places: int) -> Tensor:
    """A key for each of the places 0, 1, ... and each row.

    They are a tensor, and not a number in each place, so that torch.compile makes one graph for all
    layers.
    """
    offsets = [signed(place * GOLDEN) for place in range(places)]
    keys = [mix(row_keys_B + offset) for offset in offsets]
    return torch.stack(keys)


def dropout(x_BTD: Tensor, keys_B: Tensor | None, rate: float) -> Tensor:
    """Drop elements of each row by its key of this place; without keys, drop nothing.

    A rate is met to 1/65536; the scale is that of the rate met.
    """
    if keys_B is None:
        return x_BTD
    size = x_BTD[0].numel()
    dropped = min(round(rate * LEVELS), LEVELS - 1)
    counter_W = torch.arange(ceil_div(size, 4), device=x_BTD.device)
    # The sum is scaled, not the counter: torch.compile takes products of an arange for indices,
    # which it cuts to size.
    hashes_BW = mix((keys_B[:, None] + counter_W) * signed(GOLDEN))
    levels = levels_of(hashes_BW)
    keep_BTD = (levels[:, :size] >= dropped - LEVELS // 2).view(x_BTD.shape)
    scale = LEVELS / (LEVELS - dropped)
    return torch.where(keep_BTD, x_BTD * scale, 0)


def levels_of(hashes_BW: Tensor) -> Tensor:
    """The four numbers of 16 bits in each word, lowest first, from -LEVELS / 2 on."""
    if not torch.compiler.is_compiling():
        return hashes_BW.view(torch.int16)
    # torch.compile would write all hashes to memory for such a view. Shifts become part of the
    # kernel that drops.
    shifts_4 = torch.arange(48, -1, -16, device=hashes_BW.device)
    return ((hashes_BW[..., None] << shifts_4) >> 48).flatten(1)


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), in place on int64.

    Masks make the shifts logical.
    """
    x ^= (x >> 30) & (2**34 - 1)
    x *= signed(0xBF58476D1CE4E5B9)
    x ^= (x >> 27) & (2**37 - 1)
    x *= signed(0x94D049BB133111EB)
    x ^= (x >> 31) & (2**33 - 1)
    return x


def signed(value: int) -> int:
    """The int64 with the same low 64 bits."""
    return (value + 2**63) % 2**64 - 2**63
