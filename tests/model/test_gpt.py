"""The GPT: a forward is a pure function of its arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lm.model import gpt as model_module
from dist_lm.model.dropout import keys_of_places
from dist_lm.model.gpt import padded_vocab
from tests.model.models import (
    B,
    T,
    V,
    close,
    every_model,
    gradients,
    make,
    some_targets,
    tokens,
)


@every_model
def test_no_token_sees_a_later_one(name: str) -> None:
    model = make(name)
    changed_BT = tokens(1)
    changed_BT[:, 15:] = (changed_BT[:, 15:] + 1) % V
    before_BTV = model(tokens(1))
    after_BTV = model(changed_BT)
    assert torch.allclose(before_BTV[:, :15], after_BTV[:, :15], atol=1e-6)
    assert not torch.allclose(before_BTV[:, 15:], after_BTV[:, 15:], atol=1e-3)


def test_documents_do_not_see_each_other() -> None:
    """A document in a packed row has the logits that it has alone (rope sees distances only)."""
    model = make()
    row_BT = tokens(1, rows=1)
    segments_BT = torch.tensor([0] * 7 + [1] * 10 + [2] * 7)[None]
    packed_BTV = model(row_BT, segments_BT=segments_BT)
    for part in (slice(0, 7), slice(7, 17), slice(17, 24)):
        assert torch.allclose(packed_BTV[:, part], model(row_BT[:, part]), atol=1e-5)


def test_more_tokens_than_the_context_are_refused() -> None:
    model = make()
    with pytest.raises(AssertionError, match=r"0 \+ 25 tokens > 24"):
        model(torch.zeros(1, T + 1, dtype=torch.long))
    cache = model.new_cache(1, T)
    with torch.no_grad(), pytest.raises(AssertionError, match=r"20 \+ 5 tokens > 24"):
        model(tokens(1, 1)[:, :20], cache=cache)
        model(tokens(1, 1)[:, :5], cache=cache)


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant() -> None:
    for qk_norm in (True, False):
        model = make(qk_norm=qk_norm)
        before_BTV = model(tokens(1))
        model.blocks[0].attn.qkv.weight.data[:64] *= 30  # queries and keys
        assert torch.allclose(model(tokens(1)), before_BTV, atol=1e-4) == qk_norm


@torch.no_grad()
def test_last_only_is_the_last() -> None:
    model = make()
    assert torch.allclose(model(tokens(1), last_only=True), model(tokens(1))[:, -1:], atol=1e-6)


@every_model
def test_loss_is_the_sum_over_targets(name: str) -> None:
    model = make(name)
    targets_BT = some_targets()
    logits_BTV = model(tokens(1))
    assert logits_BTV.shape == (B, T, V) and model.embed.weight.shape[0] == 104
    expected = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    loss = model(tokens(1), targets_BT)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert close(gradients(model, loss), gradients(model, expected))
    # What pads the vocabulary stays out.
    assert not model.embed.weight[V:].any() and not model.embed.weight.grad[V:].any()
    if not model.config.tie_embeddings:
        assert not model.head.weight[V:].any() and not model.head.weight.grad[V:].any()


def test_loss_of_a_batch_is_the_sum_over_its_rows() -> None:
    model = make(dropout=0.2)
    targets_BT = some_targets()
    keys_B = torch.tensor([5, -6, 7])
    whole = gradients(model, model(tokens(1), targets_BT, dropout_keys_B=keys_B))
    parts = []
    for b in range(B):
        row = slice(b, b + 1)
        loss = model(tokens(1)[row], targets_BT[row], dropout_keys_B=keys_B[row])
        parts.append(gradients(model, loss))
    assert close(torch.stack(parts).sum(0), whole)
    # Rows that only fill a micro-batch.
    assert model(tokens(1), torch.full((B, T), -100)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_loss_and_gradients_in_fp32(dtype: torch.dtype) -> None:
    model = make(dropout=0.1)
    keys_B = torch.arange(B)
    exact = gradients(model, model(tokens(1), some_targets(), dropout_keys_B=keys_B))
    with torch.autocast("cpu", dtype):
        loss = model(tokens(1), some_targets(), dropout_keys_B=keys_B)
    assert loss.dtype == torch.float32
    assert close(gradients(model, loss), exact, 3e-2)
    if dtype == torch.bfloat16:  # also when the weights themselves are in half precision
        assert model.bfloat16()(tokens(1), some_targets()).dtype == torch.float32


def test_dropout_acts_only_with_keys_and_a_rate() -> None:
    model = make("classic", dropout=0.3)
    plain = make("classic")
    keys_B = torch.tensor([1, 2, 3])
    assert torch.equal(model(tokens(1)), plain(tokens(1)))
    assert torch.equal(plain(tokens(1), dropout_keys_B=keys_B), plain(tokens(1)))
    first = model(tokens(1), dropout_keys_B=keys_B)
    second = model(tokens(1), dropout_keys_B=keys_B + 1)
    assert not torch.equal(first, second) and not torch.equal(first, plain(tokens(1)))


def test_dropout_has_its_own_mask_at_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[list[int], float]] = []

    def record(x: Tensor, keys: Tensor, rate: float) -> Tensor:
        used.append((keys.tolist(), rate))
        return x

    monkeypatch.setattr(model_module, "dropout", record)
    row_keys_B = torch.tensor([1, 2, 3])
    make(dropout=0.3)(tokens(1), dropout_keys_B=row_keys_B)
    # Of the embeddings, then of each branch of each block.
    expected = keys_of_places(row_keys_B, 5).tolist()
    assert used == [(keys, 0.3) for keys in expected]
    assert len({key for keys in expected for key in keys}) == 15


@every_model
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    found = []
    calls = []
    for checkpointing in (False, True):
        model = make(name, checkpointing=checkpointing, dropout=0.2)
        model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        loss = model(tokens(1), some_targets(), dropout_keys_B=torch.tensor([1, 2, 3]))
        found.append((loss.detach(), gradients(model, loss)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert len(calls) == 3  # the second model ran its block again in the backward


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
# dynamic: what torch turns to by itself once lengths have varied
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.campaign), True])
def test_compiled_model_is_the_same(dynamic: bool) -> None:
    torch.compiler.reset()  # what earlier tests compiled
    model = make(layers=1, dropout=0.2, checkpointing=True)
    keys_B = torch.tensor([1, 2, 3])
    loss = model(tokens(1), some_targets(), dropout_keys_B=keys_B)
    plain = gradients(model, loss)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    again = compiled(tokens(1), some_targets(), dropout_keys_B=keys_B)
    assert torch.allclose(again, loss, rtol=1e-5)
    assert close(gradients(model, again), plain)


def test_vocabulary_is_padded_for_the_device_that_pays() -> None:
    padded = {65: 72, 256: 256, 2048: 2048, 4095: 4096, 4096: 4096, 50257: 50304}
    assert {size: padded_vocab(size) for size in padded} == padded


GOLDEN_NUMBERS = {
    "llama": (345.142517, 888.447388),
    "gqa": (358.919128, 2014.048706),
    "gpt2": (330.375153, 538.167786),
    "classic": (349.019531, 237.711487),
    "other": (336.355164, 329.490631),
    "none": (340.146637, 561.871338),
}


@every_model
def test_one_step_has_golden_numbers(name: str) -> None:
    """A change here is a change of the mathematics of every run."""
    model = make(name, dropout=0.1)
    keys_B = torch.tensor([11, 12, 13])
    for parameter in model.parameters():  # larger weights, so that every part shows
        parameter.data *= 3
    loss = model(tokens(1), some_targets(), dropout_keys_B=keys_B)
    norm = gradients(model, loss).norm()
    assert (loss.item(), norm.item()) == pytest.approx(GOLDEN_NUMBERS[name], rel=1e-5)
