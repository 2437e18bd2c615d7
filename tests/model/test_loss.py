"""The chunked loss equals the plain one, and when it is taken."""

import math

import pytest
import torch
import torch.nn.functional as F

from dist_lm.model.loss import ChunkedCrossEntropySum, cross_entropy_sum
from tests.model.models import (
    close,
)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 30])
def test_chunked_loss_equals_the_plain_one(dtype: torch.dtype | None, rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(30, 8, generator=generator).requires_grad_()
    weight_VD = torch.randn(24, 8, generator=generator).requires_grad_()
    padding_V = torch.tensor([0.0] * 20 + [-math.inf] * 4)
    targets_N = torch.randint(0, 20, (30,), generator=generator)
    targets_N[3:9] = -100
    apply = ChunkedCrossEntropySum.apply
    found = []
    for chunked in (False, True):
        x_ND.grad = weight_VD.grad = None
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            if chunked:
                loss = apply(x_ND, weight_VD, padding_V, targets_N, rows, True)
            else:
                loss = cross_entropy_sum(x_ND, weight_VD, padding_V, targets_N)
        (3 * loss).backward()
        found.append((loss.detach(), x_ND.grad, weight_VD.grad))
    tolerance = 1e-6 if dtype is None else 2e-2
    for plain, chunked in zip(*found, strict=True):
        assert close(chunked, plain, tolerance) and chunked.dtype == torch.float32
    assert not found[1][1][3:9].any() and not found[1][2][20:].any()
    with torch.no_grad():
        loss = apply(x_ND, weight_VD, padding_V, targets_N, rows, False)
    assert torch.allclose(loss, found[1][0], rtol=1e-2)


def test_chunked_loss_refuses_a_second_backward() -> None:
    """Its gradients are scaled in place: silently scaling them twice would be worse."""
    x_ND = torch.randn(5, 3, requires_grad=True)
    weight_VD = torch.randn(4, 3, requires_grad=True)
    targets_N = torch.tensor([0, 2, -100, 1, 1])
    loss = ChunkedCrossEntropySum.apply(x_ND, weight_VD, None, targets_N, 2, True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_large_batches_take_the_chunked_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    apply = ChunkedCrossEntropySum.apply
    monkeypatch.setattr(ChunkedCrossEntropySum, "apply", lambda *a: rows.append(a[4]) or apply(*a))
    x_ND = torch.randn(34, 2)
    weight_VD = torch.randn(2**19, 2)
    targets_N = torch.randint(0, 9, (34,))
    loss = cross_entropy_sum(x_ND, weight_VD, None, targets_N)
    assert rows == [17]  # two equal parts of at most 2^24 logits
    expected = F.cross_entropy(x_ND @ weight_VD.T, targets_N, reduction="sum")
    assert torch.allclose(loss, expected, rtol=1e-5)
