"""Positions of tokens: rotations of queries and keys, and the table of sines.

Shapes: T positions, D width, E head width, H heads. Tables are made on the CPU by name: under
torch.device("meta") the same functions would import half of torch.compile, which takes 1 s.
"""

import math

import torch
from torch import Tensor


def rope_tables(seq_len: int, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines (T, E) and signed sines (T, E) for `rotate`.

    RoFormer, arXiv 2104.09864, in the layout of transformers' Llama: element i turns with element i
    + E/2.
    """
    evens = torch.arange(0, head_width, 2, device="cpu").float()
    frequencies = 1.0 / theta ** (evens / head_width)
    angles = torch.arange(seq_len, device="cpu").float()[:, None] * frequencies
    cos_TE = torch.cat([angles.cos(), angles.cos()], -1)
    sin_TE = torch.cat([-angles.sin(), angles.sin()], -1)
    return cos_TE, sin_TE


def rotate(x_BTHE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
    """Turn each pair (element i, element i + E/2) by the angle of its position."""
    half = x_BTHE.shape[-1] // 2
    turned_BTHE = x_BTHE * cos_T1E + x_BTHE.roll(half, -1) * sin_T1E
    return turned_BTHE.to(x_BTHE.dtype)


def sinusoid(seq_len: int, width: int) -> Tensor:
    """The table (T, D) of "Attention Is All You Need", section 3.5.

    Sines are in even columns, cosines in odd ones.
    """
    positions_T = torch.arange(seq_len, device="cpu")
    evens = torch.arange(0, width, 2, device="cpu")
    angles = positions_T[:, None] * torch.exp(evens * (-math.log(10000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
