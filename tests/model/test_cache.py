"""A forward through the cache equals the whole forward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lm.model import attention
from dist_lm.model import gpt as model_module
from tests.model.models import (
    B,
    T,
    every_model,
    make,
    tokens,
)


@every_model
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_cache_equals_the_whole_forward(name: str, static: bool, padded: bool) -> None:
    """Rows of different lengths, padded on the left, have the logits that they have alone."""
    model = make(name)
    pads = [0, 2, 5] if padded else [0, 0, 0]
    rows = [tokens(1)[b, : T - pad] for b, pad in enumerate(pads)]
    padded_rows = [F.pad(row, (pad, 0), value=7) for row, pad in zip(rows, pads, strict=True)]
    tokens_BT = torch.stack(padded_rows)
    cache = model.new_cache(B, T, torch.tensor(pads) if padded else None, static)
    pieces = [tokens_BT[:, :9], tokens_BT[:, 9:12], *tokens_BT[:, 12:].split(1, dim=1)]
    logits_BTV = torch.cat([model(piece, cache=cache) for piece in pieces], 1)
    for row, pad, logits_TV in zip(rows, pads, logits_BTV, strict=True):
        assert torch.allclose(logits_TV[pad:], model(row[None])[0], atol=1e-5)


@torch.no_grad()
def test_padding_stays_finite_on_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some kernels make NaN of a row that sees no key. It would spread to all that come after."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cached: bool) -> Tensor:
        return attention.attend_plainly(q, k, v, mask)

    monkeypatch.setattr(model_module, "attend", attend)
    model = make()
    cache = model.new_cache(B, T, torch.tensor([0, 2, 5]))
    assert model(tokens(1), cache=cache).isfinite().all()
