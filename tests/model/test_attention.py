"""Every fast path of attention equals the plain one."""

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

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

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        masks.append(mask)
        return attention.attend_plainly(q, k, v, mask)

    monkeypatch.setattr(model_module, "attend", attend)
    assert close(model(tokens(1), segments_BT=segments_BT), fast_BTV)
    assert close(gradients(model, model(tokens(1), some_targets(), segments_BT=segments_BT)), fast)
    # The plain case never makes a mask.
    assert len(masks) == 4 and (masks[0] is not None) == masked


def test_preferred_kernels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper cuDNN's attention comes first; on a CPU the same list falls through to its own."""
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(1))
    lists = []
    sdpa_kernel = attention.sdpa_kernel

    def record(kernels: list, **how: bool) -> AbstractContextManager:
        lists.append((kernels[0], how))
        return sdpa_kernel(kernels, **how)

    monkeypatch.setattr(attention, "sdpa_kernel", record)
    for hopper in (False, True):
        monkeypatch.setattr(attention, "is_hopper", lambda device, hopper=hopper: hopper)
        assert close(attention.attend(q, k, v, None), attention.attend_plainly(q, k, v, None))
        assert len(lists) == hopper
    assert lists == [(attention.SDPBackend.CUDNN_ATTENTION, {"set_priority": True})]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_attention_on_cuda_equals_the_plain_path() -> None:
    q, k, v = (x.cuda().bfloat16() for x in torch.randn(3, 2, 4, 128, 64))
    assert close(attention.attend(q, k, v, None), attention.attend_plainly(q, k, v, None), 2e-2)
