"""Every fast path of attention equals the plain one."""

import itertools
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lm.data.batches import document_bounds
from dist_lm.model import attention
from dist_lm.model import gpt as model_module
from tests.model.models import (
    B,
    T,
    close,
    every_model,
    gradients,
    make,
    some_targets,
    tokens,
)


@every_model
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_plain_path(
    name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name)
    segments_BT = torch.arange(T).expand(B, T) // 5 if masked else None
    fast_BTV = model(tokens(1), segments_BT=segments_BT)
    fast = gradients(model, model(tokens(1), some_targets(), segments_BT=segments_BT))
    masks = []

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cached: bool) -> Tensor:
        masks.append(bias)
        mask = None if bias is None else bias == 0
        return attention.attend_plainly(q, k, v, mask)

    monkeypatch.setattr(model_module, "attend", attend)
    assert close(model(tokens(1), segments_BT=segments_BT), fast_BTV)
    assert close(gradients(model, model(tokens(1), some_targets(), segments_BT=segments_BT)), fast)
    # The plain case never makes a mask.
    assert len(masks) == 4 and (masks[0] is not None) == masked


def test_a_bias_is_a_mask_to_the_last_bit() -> None:
    """Forward and gradients, made once for all layers instead of in each."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=generator).requires_grad_()
    mask = torch.rand(2, 1, 16, 16, generator=generator).tril() > 0.2
    mask |= torch.eye(16, dtype=torch.bool)
    found = []
    for given in (mask, attention.bias_of(mask, torch.float32)):
        out = attention.attend(q, k, v, given)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


FALL_BACK = [
    attention.SDPBackend.FLASH_ATTENTION,
    attention.SDPBackend.EFFICIENT_ATTENTION,
    attention.SDPBackend.MATH,
]
CUDNN_FIRST = [attention.SDPBackend.CUDNN_ATTENTION, *FALL_BACK]


@pytest.mark.parametrize(
    ("hopper", "cudnn", "masked", "cached", "expected"),
    [
        (True, 91900, False, False, (CUDNN_FIRST, {"set_priority": True})),
        (True, 91500, False, False, None),
        (True, None, False, False, None),
        (False, 91900, False, False, None),
        (True, 91900, True, False, (FALL_BACK, {})),
        (True, 91900, False, True, (FALL_BACK, {})),
        (False, 91900, True, True, (FALL_BACK, {})),
    ],
)
def test_kernels_of_a_gpu(
    hopper: bool,
    cudnn: int | None,
    masked: bool,
    cached: bool,
    expected: tuple[list, dict] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cuDNN for plain causal attention alone, where its version is right; None is torch's order.

    On a CPU the same lists fall through to its own kernel, with the same result.
    """
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 16, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 16, 8, generator=generator)
    mask = torch.ones(16, 16, dtype=torch.bool).tril() if masked else None
    plain = attention.attend_plainly(q, k, v, mask)
    capability = (9, 0) if hopper else (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(attention, "is_gpu", lambda device: True)
    lists = []
    sdpa_kernel = attention.sdpa_kernel

    def record(kernels: list, **how: bool) -> AbstractContextManager:
        lists.append((kernels, how))
        return sdpa_kernel(kernels, **how)

    monkeypatch.setattr(attention, "sdpa_kernel", record)
    assert close(attention.attend(q, k, v, mask, cached), plain)
    assert lists == ([expected] if expected else [])


@pytest.mark.parametrize("masked", [False, True])
def test_groups_are_repeated_for_a_mask_on_a_gpu(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.randn(2, 4, 16, 8)
    k, v = torch.randn(2, 2, 2, 16, 8)
    mask = torch.ones(16, 16, dtype=torch.bool).tril() if masked else None
    calls = []
    kernel = F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor, **how: object) -> Tensor:
        calls.append((k.shape[1], how["enable_gqa"]))
        return kernel(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(attention, "prefers_cudnn", lambda device: False)
    on_cpu = attention.attend(q, k, v, mask)
    monkeypatch.setattr(attention, "is_gpu", lambda device: True)
    assert close(attention.attend(q, k, v, mask), on_cpu)
    assert calls == [(2, True), (4, False) if masked else (2, True)]


def test_the_model_says_when_it_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def record(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cached: bool) -> Tensor:
        told.append(cached)
        return attention.attend(q, k, v, mask, cached)

    monkeypatch.setattr(model_module, "attend", record)
    model = make(layers=1)
    model(tokens(1))
    model(tokens(1), cache=model.new_cache(B, T))
    assert told == [False, True]


def test_the_mask_of_documents_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers get the same tensor, in the type of the products."""
    masks = []

    def record(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cached: bool) -> Tensor:
        masks.append(mask)
        return attention.attend(q, k, v, mask, cached)

    monkeypatch.setattr(model_module, "attend", record)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        make()(tokens(1), some_targets(), segments_BT=torch.arange(T).expand(B, T) // 5)
    assert len(masks) == 2
    assert masks[0] is masks[1]
    assert masks[0].dtype == torch.bfloat16


varlen_dtypes: list[torch.dtype] = []  # of the calls


def varlen_by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch.nn.attention.varlen says it computes, document by document."""
    assert q.dtype == k.dtype == v.dtype
    varlen_dtypes.append(q.dtype)
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
    assert window_size == (-1, 0)  # causal
    assert enable_gqa == (q.shape[1] != k.shape[1])
    bounds = cu_seq_q.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(q)
    parts = []
    for begin, end in itertools.pairwise(bounds):
        assert 0 <= end - begin <= max_q == max_k
        if begin < end:
            one = [x[None, begin:end].transpose(1, 2) for x in (q, k, v)]
            parts.append(attention.attend_plainly(*one, None)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's, of norms in bf16
@every_model
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_documents_by_their_bounds_are_documents_by_a_mask(
    name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients; a row begins a document whatever the number of the one before."""
    rows = [[0] * 7 + [1] * 10 + [2] * 7, [2] * 24, [0] + [1] * 23]
    segments_BT = torch.tensor(rows)
    bounds_N = torch.from_numpy(document_bounds(segments_BT.numpy()))
    assert bounds_N[:6].tolist() == [0, 7, 17, 24, 48, 49]
    assert bounds_N[6:].unique().tolist() == [72]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    varlen_dtypes.clear()
    model = make(name)
    found = []
    for is_known in (False, True):
        monkeypatch.setattr(model_module, "knows_documents", lambda *a, known=is_known: known)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens(1), some_targets(), segments_BT=segments_BT, bounds_N=bounds_N)
        found.append((loss.detach()[None], gradients(model, loss)))
    (masked, masked_grad), (bounded, bounded_grad) = found
    assert close(bounded, masked, tolerance)
    assert close(bounded_grad, masked_grad, tolerance)
    assert varlen_dtypes == [dtype] * 2  # in each layer once, and never for the mask


@pytest.mark.parametrize(
    ("dtype", "head_width", "capability", "expected"),
    [
        (torch.bfloat16, 64, (9, 0), True),
        (torch.float16, 256, (8, 0), True),
        (torch.float32, 64, (9, 0), False),
        (torch.bfloat16, 20, (9, 0), False),
        (torch.bfloat16, 264, (9, 0), False),
        (torch.bfloat16, 64, (7, 5), False),
    ],
)
def test_where_documents_are_known_by_their_bounds(
    dtype: torch.dtype,
    head_width: int,
    capability: tuple[int, int],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert attention.knows_documents(gpu, dtype, head_width) == expected
    assert not attention.knows_documents(torch.device("cpu"), dtype, head_width)


def test_another_signature_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of torch 2.10, which has no window."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, k, v, is_causal=False: q)
    assert not attention.knows_documents(torch.device("cuda", 0), torch.bfloat16, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_attention_on_cuda_equals_the_plain_path() -> None:
    q, k, v = (x.cuda().bfloat16() for x in torch.randn(3, 2, 4, 128, 64))
    assert close(attention.attend(q, k, v, None), attention.attend_plainly(q, k, v, None), 2e-2)


class Traced(Exception):
    """Ends a compilation whose graph is all that a test wants: its kernel needs a GPU."""


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
def test_documents_by_their_bounds_are_one_graph_with_torch_s_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's own function, in the version at hand, takes these arguments."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> None:
        graphs.append(graph.code)
        raise Traced

    monkeypatch.setattr(model_module, "knows_documents", lambda *arguments: True)
    model = make("gqa", qk_norm=False)
    model.compile_for_training(loss=False, backend=backend)
    segments_BT = torch.arange(T).expand(B, T) // 5
    bounds_N = torch.from_numpy(document_bounds(segments_BT.numpy()))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception, match="Traced"):
        model(tokens(1), some_targets(), segments_BT=segments_BT, bounds_N=bounds_N)
    assert len(graphs) == 1
    assert graphs[0].count("torch_attn__varlen_attn") + graphs[0].count("torch_attn._varlen") >= 1
