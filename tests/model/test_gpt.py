"""The GPT: a forward is a pure function of its arguments, and every fast path equals a plain one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.model import gpt as model_module
from dist_lm.model.dropout import GOLDEN, dropout, mix, signed
from dist_lm.model.gpt import GPT, KVCache
from dist_lm.model.init import flops_per_token, init_weights, initial
from dist_lm.model.loss import _ChunkedCrossEntropySum, cross_entropy_sum

V, T, B = 101, 24, 3
CLASSIC = {
    "positions": "learned",
    "norm": "layernorm",
    "norm_placement": "post",
    "activation": "relu",
    "bias": True,
}
MODELS = {
    "llama": {},
    "gqa": {"kv_heads": 2, "qk_norm": True, "tie_embeddings": False},
    "gpt2": {**CLASSIC, "norm_placement": "pre", "activation": "gelu_tanh"},
    "classic": CLASSIC,
    "other": {"positions": "sinusoidal", "norm": "layernorm", "activation": "relu2", "kv_heads": 1},
    "none": {"positions": "none", "activation": "silu"},
}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str = "llama", seed: int = 1, checkpointing: bool = False, **changes: object) -> GPT:
    settings = {"layers": 2, "heads": 4, "width": 32, **MODELS[name], **changes}
    model = GPT(ModelSpec(ModelConfig(**settings), V, T), checkpointing)
    init_weights(model, seed)
    return model


def tokens(seed: int, rows: int = B) -> Tensor:
    return torch.randint(0, V, (rows, T), generator=torch.Generator().manual_seed(seed))


def some_targets(rows: int = B) -> Tensor:
    targets_BT = tokens(2, rows)
    targets_BT[0, 3:9] = -100
    return targets_BT


def gradients(model: GPT, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal within a part of the largest entry."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


# --- attention


@every_model
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_plain_path(
    name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name)
    segments_BT = torch.arange(T).expand(B, T) // 5 if masked else None
    fast_BTV = model(tokens(1), segments_BT=segments_BT)
    fast = gradients(model, model(tokens(1), some_targets(), segments_BT=segments_BT))
    calls = []
    monkeypatch.setattr(
        model_module, "attend", lambda *a: calls.append(a) or model_module.attend_plainly(*a)
    )
    assert close(model(tokens(1), segments_BT=segments_BT), fast_BTV)
    assert close(gradients(model, model(tokens(1), some_targets(), segments_BT=segments_BT)), fast)
    assert (
        len(calls) == 4 and (calls[0][3] is not None) == masked
    )  # the plain case never makes a mask


@every_model
def test_no_token_sees_a_later_one(name: str) -> None:
    model, changed_BT = make(name), tokens(1)
    changed_BT[:, 15:] = (changed_BT[:, 15:] + 1) % V
    before_BTV, after_BTV = model(tokens(1)), model(changed_BT)
    assert torch.allclose(before_BTV[:, :15], after_BTV[:, :15], atol=1e-6)
    assert not torch.allclose(before_BTV[:, 15:], after_BTV[:, 15:], atol=1e-3)


def test_documents_do_not_see_each_other() -> None:
    """A document in a packed row has the logits that it has alone (rope sees distances only)."""
    model, row_BT = make(), tokens(1, rows=1)
    segments_BT = torch.tensor([0] * 7 + [1] * 10 + [2] * 7)[None]
    packed_BTV = model(row_BT, segments_BT=segments_BT)
    for part in (slice(0, 7), slice(7, 17), slice(17, 24)):
        assert torch.allclose(packed_BTV[:, part], model(row_BT[:, part]), atol=1e-5)


def test_rope_sees_distances_only() -> None:
    cos_TE, sin_TE = (table[:, None] for table in model_module.rope_tables(64, 8, 10000.0))
    q_E, k_E = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    turn = [(model_module.rotate(x.expand(64, 1, 8), cos_TE, sin_TE)[:, 0]) for x in (q_E, k_E)]
    scores_TT = turn[0] @ turn[1].T
    for distance in (0, 1, 17):
        along_T = scores_TT.diagonal(-distance)
        assert torch.allclose(along_T, along_T[:1].expand_as(along_T), atol=1e-4)
    assert not torch.allclose(scores_TT[0, 0], scores_TT[5, 0], atol=1e-2)


def test_more_tokens_than_the_context_are_refused() -> None:
    model = make()
    with pytest.raises(AssertionError, match=r"0 \+ 25 tokens > 24"):
        model(torch.zeros(1, T + 1, dtype=torch.long))
    cache = KVCache(model, 1, T)
    with torch.no_grad(), pytest.raises(AssertionError, match=r"20 \+ 5 tokens > 24"):
        model(tokens(1, 1)[:, :20], cache=cache)
        model(tokens(1, 1)[:, :5], cache=cache)


def test_preferred_kernels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper cuDNN's attention comes first; on a CPU the same list falls through to its own."""
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(1))
    lists, sdpa_kernel = [], model_module.sdpa_kernel
    monkeypatch.setattr(
        model_module,
        "sdpa_kernel",
        lambda *a, **how: lists.append((a[0][0], how)) or sdpa_kernel(*a, **how),
    )
    for hopper in (False, True):
        monkeypatch.setattr(model_module, "is_hopper", lambda device, hopper=hopper: hopper)
        assert close(model_module.attend(q, k, v, None), model_module.attend_plainly(q, k, v, None))
        assert len(lists) == hopper
    assert lists == [(model_module.SDPBackend.CUDNN_ATTENTION, {"set_priority": True})]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_attention_on_cuda_equals_the_plain_path() -> None:
    q, k, v = (x.cuda().bfloat16() for x in torch.randn(3, 2, 4, 128, 64))
    assert close(
        model_module.attend(q, k, v, None), model_module.attend_plainly(q, k, v, None), 2e-2
    )


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant() -> None:
    for qk_norm in (True, False):
        model = make(qk_norm=qk_norm)
        before_BTV = model(tokens(1))
        model.blocks[0].attn.qkv.weight.data[:64] *= 30  # queries and keys
        assert torch.allclose(model(tokens(1)), before_BTV, atol=1e-4) == qk_norm


# --- cache


@every_model
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_cache_equals_the_whole_forward(name: str, static: bool, padded: bool) -> None:
    """Rows of different lengths, padded on the left, have the logits that they have alone."""
    model, pads = make(name), [0, 2, 5] if padded else [0, 0, 0]
    rows = [tokens(1)[b, : T - pad] for b, pad in enumerate(pads)]
    tokens_BT = torch.stack(
        [F.pad(row, (pad, 0), value=7) for row, pad in zip(rows, pads, strict=True)]
    )
    cache = KVCache(model, B, T, torch.tensor(pads) if padded else None, static)
    pieces = [tokens_BT[:, :9], tokens_BT[:, 9:12], *tokens_BT[:, 12:].split(1, dim=1)]
    logits_BTV = torch.cat([model(piece, cache=cache) for piece in pieces], 1)
    for row, pad, logits_TV in zip(rows, pads, logits_BTV, strict=True):
        assert torch.allclose(logits_TV[pad:], model(row[None])[0], atol=1e-5)


@torch.no_grad()
def test_padding_stays_finite_on_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some kernels make NaN of a row that sees no key, which would spread to all that come after."""
    monkeypatch.setattr(model_module, "attend", model_module.attend_plainly)
    assert make()(tokens(1), cache=KVCache(make(), B, T, torch.tensor([0, 2, 5]))).isfinite().all()


@torch.no_grad()
def test_last_only_is_the_last() -> None:
    model = make()
    assert torch.allclose(model(tokens(1), last_only=True), model(tokens(1))[:, -1:], atol=1e-6)


# --- loss


@every_model
def test_loss_is_the_sum_over_targets(name: str) -> None:
    model, targets_BT = make(name), some_targets()
    logits_BTV = model(tokens(1))
    assert logits_BTV.shape == (B, T, V) and model.embed.weight.shape[0] == 104
    expected = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    loss = model(tokens(1), targets_BT)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert close(gradients(model, loss), gradients(model, expected))
    for weight_VD in (
        model.embed.weight,
        None if model.config.tie_embeddings else model.head.weight,
    ):
        assert weight_VD is None or not (
            weight_VD[V:].any() or weight_VD.grad[V:].any()
        )  # padding stays out


def test_loss_of_a_batch_is_the_sum_over_its_rows() -> None:
    model, targets_BT, keys_B = make(dropout=0.2), some_targets(), torch.tensor([5, -6, 7])
    whole = gradients(model, model(tokens(1), targets_BT, dropout_keys_B=keys_B))
    parts = [
        gradients(
            model,
            model(tokens(1)[b : b + 1], targets_BT[b : b + 1], dropout_keys_B=keys_B[b : b + 1]),
        )
        for b in range(B)
    ]
    assert close(torch.stack(parts).sum(0), whole)
    assert (
        model(tokens(1), torch.full((B, T), -100)).item() == 0
    )  # rows that only fill a micro-batch


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 30])
def test_chunked_loss_equals_the_plain_one(dtype: torch.dtype | None, rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x_ND, weight_VD = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (30, 24))
    padding_V = torch.tensor([0.0] * 20 + [-math.inf] * 4)
    targets_N = torch.randint(0, 20, (30,), generator=generator)
    targets_N[3:9] = -100
    apply = _ChunkedCrossEntropySum.apply
    found = []
    for chunked in (False, True):
        x_ND.grad = weight_VD.grad = None
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            plain = cross_entropy_sum(x_ND, weight_VD, padding_V, targets_N)
            loss = apply(x_ND, weight_VD, padding_V, targets_N, rows, True) if chunked else plain
        (3 * loss).backward()
        found.append((loss.detach(), x_ND.grad, weight_VD.grad))
    tolerance = 1e-6 if dtype is None else 2e-2
    assert all(
        close(own, plain, tolerance) and own.dtype == torch.float32
        for plain, own in zip(*found, strict=True)
    )
    assert not found[1][1][3:9].any() and not found[1][2][20:].any()
    with torch.no_grad():
        assert torch.allclose(
            apply(x_ND, weight_VD, padding_V, targets_N, rows, False), found[1][0], rtol=1e-2
        )


def test_chunked_loss_refuses_a_second_backward() -> None:
    """Its gradients are scaled in place: silently scaling them twice would be worse."""
    x_ND, weight_VD = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    arguments = x_ND, weight_VD, None, torch.tensor([0, 2, -100, 1, 1]), 2, True
    loss = _ChunkedCrossEntropySum.apply(*arguments)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_large_batches_take_the_chunked_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    apply = _ChunkedCrossEntropySum.apply
    monkeypatch.setattr(_ChunkedCrossEntropySum, "apply", lambda *a: rows.append(a[4]) or apply(*a))
    x_ND, weight_VD, targets_N = (
        torch.randn(34, 2),
        torch.randn(2**19, 2),
        torch.randint(0, 9, (34,)),
    )
    loss = cross_entropy_sum(x_ND, weight_VD, None, targets_N)
    assert rows == [17]  # two equal parts of at most 2^24 logits
    assert torch.allclose(
        loss, F.cross_entropy(x_ND @ weight_VD.T, targets_N, reduction="sum"), rtol=1e-5
    )


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


# --- dropout


def splitmix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


def test_hash_is_splitmix64() -> None:
    """The published numbers of seed 1234567 (Rosetta Code), and negative inputs, whose shifts must be logical."""
    states = [1234567 + n * GOLDEN for n in (1, 2, 3)]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix(s % 2**64) for s in states] == published
    inputs = [*states, -1, -(2**63), 2**63 - 1, 0]
    found = mix(torch.tensor([signed(s) for s in inputs])).tolist()
    assert [n % 2**64 for n in found] == [splitmix(s % 2**64) for s in inputs]


def mask_of(
    keys: list[int], place: int = 1, rate: float = 0.1, shape: tuple[int, int] = (64, 48)
) -> Tensor:
    return dropout(torch.ones(len(keys), *shape), torch.tensor(keys), place, rate)


def test_dropout_mask_follows_from_the_key_by_hand() -> None:
    mask_TD = mask_of([-3], place=2, rate=0.25, shape=(3, 3))[0]
    start = splitmix((-3 + 2 * GOLDEN) % 2**64)
    words = [splitmix((start + n) * GOLDEN % 2**64) for n in range(3)]
    lanes = [(word >> shift) % 2**16 for word in words for shift in (0, 16, 32, 48)]
    signed_lanes = [lane - 2**16 if lane >= 2**15 else lane for lane in lanes]
    expected = [4 / 3 if lane >= 0.25 * 2**16 - 2**15 else 0.0 for lane in signed_lanes[:9]]
    assert torch.allclose(mask_TD.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_dropout_drops_its_rate_and_keeps_the_mean(rate: float) -> None:
    mask_BTD = mask_of(list(range(64)), rate=rate)
    sigma = math.sqrt(rate * (1 - rate) / mask_BTD.numel())
    dropped = (mask_BTD == 0).float().mean().item()
    assert abs(dropped - rate) <= 4 * sigma + 2**-16
    assert torch.allclose(mask_BTD[mask_BTD > 0], torch.tensor(1 / (1 - rate)), rtol=1e-3)


def test_dropout_masks_are_independent() -> None:
    """Between rows, places and neighbouring elements, of consecutive keys too: correlations are those of chance."""
    keys = [*range(20), *(splitmix(n) - 2**63 for n in range(20))]
    masks = torch.cat([mask_of(keys, place).flatten(1) for place in (0, 1, 2, 8)])  # 160 masks
    centred = (masks > 0).double() - 0.9
    n = centred.shape[1]
    correlation = centred @ centred.T / (0.09 * n)
    apart = correlation[~torch.eye(len(correlation), dtype=torch.bool)]
    assert abs(apart.mean().item()) < 1e-3
    assert apart.abs().max().item() < 5.5 / math.sqrt(n)  # of 12,720 pairs
    assert abs(apart.std().item() * math.sqrt(n) - 1) < 0.05
    for lag in (1, 2, 3, 4, 48):
        along = (centred[:, :-lag] * centred[:, lag:]).mean().item() / 0.09
        assert abs(along) < 5 / math.sqrt(centred.numel())


def test_dropout_follows_rows_not_batches() -> None:
    whole, keys = mask_of([1, 2, 3, 4]), [1, 2, 3, 4]
    assert torch.equal(whole, torch.cat([mask_of(keys[:1]), mask_of(keys[1:])]))
    assert torch.equal(mask_of([4, 1]), whole[[3, 0]])


def test_dropout_acts_only_with_keys_and_a_rate() -> None:
    model, keys_B = make("classic", dropout=0.3), torch.tensor([1, 2, 3])
    plain = make("classic")
    assert torch.equal(model(tokens(1)), plain(tokens(1)))
    assert torch.equal(plain(tokens(1), dropout_keys_B=keys_B), plain(tokens(1)))
    first, second = (model(tokens(1), dropout_keys_B=keys) for keys in (keys_B, keys_B + 1))
    assert not torch.equal(first, second) and not torch.equal(first, plain(tokens(1)))


def test_dropout_has_its_own_mask_at_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    monkeypatch.setattr(
        model_module, "dropout", lambda x, keys, place, rate: places.append((place, rate)) or x
    )
    make(dropout=0.3)(tokens(1), dropout_keys_B=torch.tensor([1, 2, 3]))
    assert places == [
        (0, 0.3),
        (1, 0.3),
        (2, 0.3),
        (3, 0.3),
        (4, 0.3),
    ]  # embeddings, then each branch of each block


@every_model
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    found, calls = [], []
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
    plain, compiled = gradients(model, loss), torch.compile(model, fullgraph=True, dynamic=dynamic)
    again = compiled(tokens(1), some_targets(), dropout_keys_B=keys_B)
    assert torch.allclose(again, loss, rtol=1e-5)
    assert close(gradients(model, again), plain)


# --- initial weights and size


def test_initial_weights_follow_from_seed_and_name() -> None:
    first, again, other = make(seed=3), make(seed=3), make(seed=4)
    weights = dict(first.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
    assert not torch.equal(other.embed.weight, first.embed.weight)
    assert not torch.equal(weights["blocks.0.ffn.up.weight"], weights["blocks.1.ffn.up.weight"])
    for name, parameter in weights.items():  # one by one, as ZeRO-3 will ask for them
        rows = V if name == "embed.weight" else parameter.shape[0]
        assert torch.equal(
            initial(first.config, 3, name, (rows, *parameter.shape[1:])), parameter[:rows]
        )
    deeper = dict(make(seed=3, layers=3, init="scaled").named_parameters())
    assert torch.equal(
        deeper["blocks.1.ffn.up.weight"], make(seed=3, init="scaled").blocks[1].ffn.up.weight
    )


@pytest.mark.parametrize(
    ("init", "std"), [("gpt2", 0.02), ("scaled", 16**-0.5), ("xavier", 16**-0.5)]
)
def test_initial_weights_have_their_size(init: str, std: float) -> None:
    config = ModelConfig(
        layers=8, heads=4, width=256, kv_heads=4, bias=True, norm="layernorm", init=init
    )
    for name, fan_in in (("attn.qkv", 256), ("attn.out", 256), ("ffn.down", 1024)):
        rows = 768 if name == "attn.qkv" else 256
        weight = initial(config, 1, f"blocks.0.{name}.weight", (rows, fan_in))
        expected = {
            "gpt2": 0.02 if name == "attn.qkv" else 0.02 / 4,
            "scaled": fan_in**-0.5,
            "xavier": math.sqrt(2 / (fan_in + 256)),
        }[init]
        assert (
            abs(weight.std().item() / expected - 1) < 0.01
            and abs(weight.mean().item()) < 0.01 * expected
        )
    assert abs(initial(config, 1, "embed.weight", (500, 256)).std().item() / 0.02 - 1) < 0.02
    assert not initial(config, 1, "blocks.0.norm1.bias", (256,)).any()
    assert (initial(config, 1, "blocks.0.norm1.weight", (256,)) == 1).all()


def test_orthogonal_weights_are_orthogonal_in_each_of_q_k_v() -> None:
    config = ModelConfig(heads=4, kv_heads=2, width=32, init="orthogonal")
    for part in initial(config, 1, "blocks.0.attn.qkv.weight", (64, 32)).split([32, 16, 16]):
        assert torch.allclose(part @ part.T, torch.eye(len(part)), atol=1e-5)


def test_sinusoids_are_those_of_the_paper() -> None:
    table_TD = model_module.sinusoid(50, 16)
    for position, pair in ((0, 0), (3, 2), (49, 7)):
        angle = position / 10000 ** (2 * pair / 16)
        assert torch.allclose(
            table_TD[position, 2 * pair :][:2], torch.tensor([math.sin(angle), math.cos(angle)])
        )


@every_model
def test_flops_count_every_matrix_once(name: str) -> None:
    model = make(name)
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks.")
    )
    assert (
        flops_per_token(ModelSpec(model.config, V, T)) == 6 * (matrices + V * 32) + 12 * 2 * 32 * T
    )


def test_vocabulary_is_padded_for_the_device_that_pays() -> None:
    assert [model_module.padded_vocab(n) for n in (65, 256, 2048, 4095, 4096, 50257)] == [
        72,
        256,
        2048,
        4096,
        4096,
        50304,
    ]


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
    model, keys_B = make(name, dropout=0.1), torch.tensor([11, 12, 13])
    for parameter in model.parameters():  # larger weights, so that every part shows
        parameter.data *= 3
    loss = model(tokens(1), some_targets(), dropout_keys_B=keys_B)
    norm = gradients(model, loss).norm()
    assert (loss.item(), norm.item()) == pytest.approx(GOLDEN_NUMBERS[name], rel=1e-5)
