"""model.dropout."""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64


def signed(value: int) -> int:
    """The int64 with the same low 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), in place on int64. Masks make the shifts logical."""
    x ^= (x >> 30) & (2**34 - 1)
    x *= signed(0xBF58476D1CE4E5B9)
    x ^= (x >> 27) & (2**37 - 1)
    x *= signed(0x94D049BB133111EB)
    x ^= (x >> 31) & (2**33 - 1)
    return x


def dropout(x_BTD: Tensor, keys_B: Tensor | None, place: int, rate: float) -> Tensor:
    """Drop elements by a hash of (row key, place, element): the same on any device, in any batch, when recomputed.

    Each 64-bit hash serves four elements, so a rate is met to 1/65536; the scale is that of the rate met.
    """
    if keys_B is None:
        return x_BTD
    size, dropped = x_BTD[0].numel(), min(round(rate * 65536), 65535)
    counter = torch.arange(-(-size // 4), device=x_BTD.device)
    # The sum is scaled, not the counter: torch.compile takes products of an arange for indices, which it cuts to size.
    hashes = mix((mix(keys_B + signed(place * GOLDEN))[:, None] + counter) * signed(GOLDEN)).view(
        torch.int16
    )
    keep_BTD = (hashes[:, :size] >= dropped - 32768).view(x_BTD.shape)
    return torch.where(keep_BTD, x_BTD * (65536 / (65536 - dropped)), 0)
