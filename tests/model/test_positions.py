"""What positions are: rotations that see distances only, and the table of the paper."""

import math

import torch

from dist_lm.model.positions import rope_tables, rotate, sinusoid


def test_rope_sees_distances_only() -> None:
    cos_TE, sin_TE = (table[:, None] for table in rope_tables(64, 8, 10000.0))
    q_E, k_E = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    q_TE = rotate(q_E.expand(64, 1, 8), cos_TE, sin_TE)[:, 0]
    k_TE = rotate(k_E.expand(64, 1, 8), cos_TE, sin_TE)[:, 0]
    scores_TT = q_TE @ k_TE.T
    for distance in (0, 1, 17):
        along_T = scores_TT.diagonal(-distance)
        assert torch.allclose(along_T, along_T[:1].expand_as(along_T), atol=1e-4)
    assert not torch.allclose(scores_TT[0, 0], scores_TT[5, 0], atol=1e-2)


def test_sinusoids_are_those_of_the_paper() -> None:
    table_TD = sinusoid(50, 16)
    for position, pair in ((0, 0), (3, 2), (49, 7)):
        angle = position / 10000 ** (2 * pair / 16)
        expected = torch.tensor([math.sin(angle), math.cos(angle)])
        assert torch.allclose(table_TD[position, 2 * pair :][:2], expected)
