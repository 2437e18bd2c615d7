"""The chunked loss equals the plain one, and when it is taken."""

import math

import pytest
import torch
import torch.nn.functional as F

from dist_lm.model import gpt as model_module
from dist_lm.model.gpt import Block
from dist_lm.model.loss import (
    ChunkedCrossEntropySum,
    LossOfChunk,
    cross_entropy_sum,
    equal_chunks,
    loss_by_kernels,
    loss_in_one_pass,
)
from tests.model.models import (
    close,
    gradients,
    make,
    some_targets,
    tokens,
)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 30])
@pytest.mark.parametrize("form", [loss_by_kernels, loss_in_one_pass])
def test_chunked_loss_equals_the_plain_one(
    dtype: torch.dtype | None, rows: int, form: LossOfChunk
) -> None:
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
                loss = apply(x_ND, weight_VD, padding_V, targets_N, rows, True, form)
            else:
                loss = cross_entropy_sum(x_ND, weight_VD, padding_V, targets_N)
        (3 * loss).backward()
        found.append((loss.detach(), x_ND.grad, weight_VD.grad))
    tolerance = 1e-6 if dtype is None else 2e-2
    for plain, chunked in zip(*found, strict=True):
        assert close(chunked, plain, tolerance) and chunked.dtype == torch.float32
    assert not found[1][1][3:9].any() and not found[1][2][20:].any()
    with torch.no_grad():
        loss = apply(x_ND, weight_VD, padding_V, targets_N, rows, False, form)
    assert torch.allclose(loss, found[1][0], rtol=1e-2)


def test_chunked_loss_refuses_a_second_backward() -> None:
    """Its gradients are scaled in place: silently scaling them twice would be worse."""
    x_ND = torch.randn(5, 3, requires_grad=True)
    weight_VD = torch.randn(4, 3, requires_grad=True)
    targets_N = torch.tensor([0, 2, -100, 1, 1])
    loss = ChunkedCrossEntropySum.apply(x_ND, weight_VD, None, targets_N, 2, True, loss_by_kernels)
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


@pytest.mark.parametrize("form", [loss_by_kernels, loss_in_one_pass])
def test_gradients_are_those_of_fp64(form: LossOfChunk) -> None:
    """Of logits as large as they get, at a vocabulary of GPT-2's size."""
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(16, 32, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(50_304, 32, generator=generator, dtype=torch.float64)
    targets_N = torch.randint(0, 50_257, (16,), generator=generator)
    targets_N[5] = -100
    padding_V = torch.zeros(50_304, dtype=torch.float64)
    padding_V[50_257:] = -math.inf
    exact = [x_ND.requires_grad_(), weight_VD.requires_grad_()]
    logits_NV = F.linear(x_ND, weight_VD, padding_V)
    loss = F.cross_entropy(logits_NV, targets_N, reduction="sum")
    expected = [loss.detach(), *torch.autograd.grad(loss, exact)]
    ours = [tensor.detach().float().requires_grad_() for tensor in exact]
    loss = ChunkedCrossEntropySum.apply(*ours, padding_V.float(), targets_N, 8, True, form)
    found = [loss.detach(), *torch.autograd.grad(loss, ours)]
    for right, got in zip(expected, found, strict=True):
        assert close(got, right.float(), 3e-6)


@pytest.mark.parametrize(
    ("rows", "at_least", "chunks"), [(32_768, 7, 8), (12, 1, 1), (12, 5, 6), (13, 2, 2)]
)
def test_chunks_of_equal_size(rows: int, at_least: int, chunks: int) -> None:
    assert equal_chunks(rows, at_least) == chunks


def test_a_compiled_model_has_its_loss_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all chunks of a step, and one where no gradient is wanted."""
    monkeypatch.setitem(model_module.LOGITS_AT_A_TIME, "cpu", 1500)  # five chunks: six divide
    model = make(layers=1)
    plain = model(tokens(1), some_targets())
    expected = gradients(model, plain)
    from torch._dynamo.testing import CompileCounter  # slow

    graphs = CompileCounter()
    monkeypatch.setattr(Block, "compile_for_training", lambda block, **options: None)
    model.compile_for_training(loss=True, backend=graphs)
    loss = model(tokens(1), some_targets())
    assert torch.allclose(loss, plain, rtol=1e-6)
    assert close(gradients(model, loss), expected, 1e-5)
    assert graphs.frame_count == 1
    with torch.no_grad():
        assert torch.allclose(model(tokens(1), some_targets()), plain, rtol=1e-6)
    assert graphs.frame_count == 2
