"""Schedules and updates against values worked out by hand, and what a checkpoint relies on."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dist_lm.config import ModelConfig, ModelSpec, OptimConfig
from dist_lm.model.gpt import GPT
from dist_lm.optim import create_state, lr_at, make_optimizer, param_groups, set_lr
from dist_lm.own_optimizers import muon_update, newton_schulz, qkv_parts

NAMES = ["adamw", "sgd", "adafactor", "lion", "muon"]
MATRICES = ["blocks.0.qkv.weight", "blocks.0.up.weight"]
NO_DECAY = ["embed.weight", "positions.weight", "blocks.0.up.bias", "blocks.0.norm.weight"]


def tiny(seed=0):
    """The kinds of parameters that a GPT has; keys and values are narrower than queries (GQA)."""
    torch.manual_seed(seed)
    block = nn.ModuleDict(
        {"qkv": nn.Linear(4, 8, bias=False), "up": nn.Linear(4, 12), "norm": nn.RMSNorm(4)}
    )
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(6, 4),
            "positions": nn.Embedding(5, 4),
            "blocks": nn.ModuleList([block]),
            "head": nn.Linear(4, 6, bias=False),
        }
    )


def give_grads(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def snapshot(optimizer):
    states = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            states.append({key: tensor.clone() for key, tensor in optimizer.state[p].items()})
    return states


def assert_same_weights(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


# --- schedules

# lr 1, min_lr 0.1, warm-up of 4 in 12 updates.
COSINE = [0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254]
GOLDEN = {
    "cosine": [0.25, 0.5, 0.75, 1, 1, *COSINE],
    "linear": [0.25, 0.5, 0.75, 1, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125],
    "constant": [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    # ceil(20% of 12) = 3 decay, the first from lr itself.
    "wsd": [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 0.7, 0.4],
    "inverse_sqrt": [0.25, 0.5, 0.75, 1, *(math.sqrt(4 / n) for n in range(5, 13))],
}


@pytest.mark.parametrize("schedule", GOLDEN)
def test_schedule_golden(schedule):
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4, schedule=schedule)
    assert [lr_at(optim, step, 12) for step in range(12)] == pytest.approx(
        GOLDEN[schedule], abs=1e-6
    )


@pytest.mark.parametrize("schedule", GOLDEN)
def test_schedule_edges(schedule):
    no_warmup = OptimConfig(lr=0.5, warmup_steps=0, schedule=schedule)
    assert lr_at(no_warmup, 0, 1) == 0.5  # a run of one update
    assert all(0 < lr_at(no_warmup, step, 7) <= 0.5 for step in range(7))
    # A warm-up longer than the run is warned about, not refused.
    longer = OptimConfig(lr=0.5, warmup_steps=20, schedule=schedule)
    assert [lr_at(longer, step, 10) for step in (0, 9)] == [0.025, 0.25]
    fits = OptimConfig(lr=0.5, warmup_steps=10, schedule=schedule)
    assert lr_at(fits, 9, 10) == 0.5


def test_inverse_sqrt_stays_above_min_lr():
    optim = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=1, schedule="inverse_sqrt")
    assert lr_at(optim, 999, 1000) == 0.2


# --- which parameters decay


def test_decay_spares_norms_biases_embeddings():
    model = tiny()
    decayed, spared = param_groups(model.named_parameters(), 0.1)
    names = {p: name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert [names[p] for p in decayed["params"]] == [*MATRICES, "head.weight"]
    assert sorted(names[p] for p in spared["params"]) == sorted(NO_DECAY)
    lone_matrix = nn.Linear(2, 2, bias=False)
    (group,) = param_groups(lone_matrix.named_parameters(), 0.1)
    assert len(group["params"]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_one_group(name):
    model = tiny()
    optimizer = make_optimizer(model, OptimConfig(name=name), "fp32")
    in_groups = []
    decayed = set()
    for group in optimizer.param_groups:
        in_groups += [id(p) for p in group["params"]]
        if group["weight_decay"]:
            decayed |= {id(p) for p in group["params"]}
    assert sorted(in_groups) == sorted(id(p) for p in model.parameters())
    assert decayed == {id(p) for n, p in model.named_parameters() if n not in NO_DECAY}


# --- updates against a reference in numpy, float64

BETAS, EPS, DECAY, RATES = (0.9, 0.95), 1e-8, 0.1, (0.01, 0.02)


def adamw(x, g, s, t, lr, wd):
    s["m"] = BETAS[0] * s.get("m", 0) + (1 - BETAS[0]) * g
    s["v"] = BETAS[1] * s.get("v", 0) + (1 - BETAS[1]) * g**2
    m = s["m"] / (1 - BETAS[0] ** t)
    v = s["v"] / (1 - BETAS[1] ** t)
    return x * (1 - lr * wd) - lr * m / (np.sqrt(v) + EPS)


def sgd(x, g, s, t, lr, wd):
    s["m"] = BETAS[0] * s.get("m", 0) + g + wd * x
    return x - lr * s["m"]


def lion(x, g, s, t, lr, wd):
    m = s.get("m", np.zeros_like(x))
    s["m"] = BETAS[1] * m + (1 - BETAS[1]) * g
    return x * (1 - lr * wd) - lr * np.sign(BETAS[0] * m + (1 - BETAS[0]) * g)


def rms(a):
    return np.sqrt((a**2).mean())


def adafactor(x, g, s, t, lr, wd):
    beta2 = 1 - t**-0.8
    if x.ndim == 2:
        s["r"] = beta2 * s.get("r", 0) + (1 - beta2) * (g**2).mean(1, keepdims=True)
        s["c"] = beta2 * s.get("c", 0) + (1 - beta2) * (g**2).mean(0, keepdims=True)
        v = s["r"] * s["c"] / s["r"].mean()
    else:
        v = s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g**2
    update = g / np.sqrt(v)
    alpha = max(1e-3, rms(x)) * min(lr, 1 / np.sqrt(t))
    return x * (1 - lr * wd) - alpha * update / max(1, rms(update))


def muon(x, g, s, t, lr, wd):
    s["m"] = 0.95 * s.get("m", 0) + 0.05 * g
    nesterov = 0.95 * s["m"] + 0.05 * g
    new = []
    # Of a merged matrix q has 4 rows, k and v have 2.
    for part in np.split(nesterov, [4, 6]) if len(x) == 8 else [nesterov]:
        z = part / np.linalg.norm(part)
        for _ in range(5):
            a = z @ z.T
            z = 3.4445 * z + (-4.7750 * a + 2.0315 * a @ a) @ z
        new.append(0.2 * math.sqrt(max(part.shape)) * z)
    return x * (1 - lr * wd) - lr * np.concatenate(new)


RULES = {"adamw": adamw, "sgd": sgd, "adafactor": adafactor, "lion": lion, "muon": muon}


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_golden(name):
    model = tiny()
    config = OptimConfig(name=name, betas=BETAS, eps=EPS, weight_decay=DECAY)
    optimizer = make_optimizer(model, config, "fp32")
    expected = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    remembered = {n: {} for n in expected}
    for t, lr in enumerate(RATES, 1):
        give_grads(model, seed=t)
        for n, p in model.named_parameters():
            rule = RULES[name]
            if name == "muon" and n not in MATRICES:
                rule = adamw
            wd = 0 if n in NO_DECAY else DECAY
            expected[n] = rule(expected[n], p.grad.double().numpy(), remembered[n], t, lr, wd)
        set_lr(optimizer, lr)
        optimizer.step()
    for n, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), expected[n], rtol=2e-5, atol=2e-6, err_msg=n)


# --- Muon's parts


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 64, 24), (2, 24, 64)])
def test_newton_schulz_is_nearly_orthogonal(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(matrices, torch.float32))
    assert values.min() > 0.5 and values.max() < 1.25
    # It points where the exact answer does.
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    exact = (u @ v).flatten()
    rough = newton_schulz(matrices, torch.float32).flatten()
    assert nn.functional.cosine_similarity(rough, exact, dim=0) > 0.97


def test_newton_schulz_dtype_follows_precision():
    assert make_optimizer(tiny(), OptimConfig(name="muon"), "fp32").ns_dtype == torch.float32
    assert make_optimizer(tiny(), OptimConfig(name="muon"), "bf16").ns_dtype == torch.bfloat16
    matrices = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = muon_update(matrices, torch.float32)
    rough = muon_update(matrices, torch.bfloat16)
    assert exact.dtype == rough.dtype == torch.float32
    assert 1e-4 < (exact - rough).abs().max() < 0.05


def test_newton_schulz_of_zero_is_zero():
    assert newton_schulz(torch.zeros(1, 4, 8), torch.float32).abs().max() == 0


def test_muon_does_not_depend_on_how_matrices_are_batched(monkeypatch):
    results = []
    for batch in (2**24, 1):
        monkeypatch.setattr("dist_lm.own_optimizers.NS_BATCH", batch)
        model = tiny()
        optimizer = make_optimizer(model, OptimConfig(name="muon"), "fp32")
        give_grads(model, seed=3)
        optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_qkv_parts():
    assert [len(part) for part in qkv_parts(torch.zeros(12, 4))] == [4, 4, 4]
    assert [len(part) for part in qkv_parts(torch.zeros(16, 8))] == [8, 4, 4]


# --- state


@pytest.mark.parametrize("name", NAMES)
def test_created_state_is_the_state_before_the_first_update(name):
    model = tiny()
    twin = tiny()
    optimizer = make_optimizer(model, OptimConfig(name=name), "fp32")
    untouched = make_optimizer(twin, OptimConfig(name=name), "fp32")
    give_grads(model, seed=1)
    before = [(p.clone(), p.grad) for p in model.parameters()]
    create_state(optimizer)
    for p, (value, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and p.grad is grad
    assert {group["lr"] for group in optimizer.param_groups} == {OptimConfig().lr}
    for state in snapshot(optimizer):
        assert state
        for tensor in state.values():
            assert isinstance(tensor, torch.Tensor) and not tensor.any()
    for seed in (1, 2):
        for m, o in ((model, optimizer), (twin, untouched)):
            give_grads(m, seed)
            o.step()
    assert_same_weights(model, twin)
    with pytest.raises(AssertionError, match="would erase"):
        create_state(optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_loaded_state_continues_bit_for_bit(name):
    model = tiny()
    optimizer = make_optimizer(model, OptimConfig(name=name), "fp32")
    for seed in range(3):
        give_grads(model, seed)
        optimizer.step()
    resumed = tiny(seed=9)
    resumed.load_state_dict(model.state_dict())
    restored = make_optimizer(resumed, OptimConfig(name=name), "fp32")
    create_state(restored)
    saved = {n: optimizer.state[p] for n, p in model.named_parameters()}
    for n, p in resumed.named_parameters():
        assert saved[n].keys() == restored.state[p].keys()
        for key, tensor in restored.state[p].items():
            assert tensor.shape == saved[n][key].shape and tensor.dtype == saved[n][key].dtype
            tensor.copy_(saved[n][key])
    for m, o in ((model, optimizer), (resumed, restored)):
        set_lr(o, 1e-3)
        give_grads(m, seed=7)
        o.step()
    assert_same_weights(model, resumed)


@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler_skips_an_overflow_and_steps_on(name):
    model = tiny()
    optimizer = make_optimizer(model, OptimConfig(name=name), "fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weights = [p.detach().clone() for p in model.parameters()]

    def update(poison):
        optimizer.zero_grad()
        scaler.scale(sum((p.sum() ** 2 for p in model.parameters()), torch.tensor(0.0))).backward()
        if poison:
            model["head"].weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    update(poison=True)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert scaler.get_scale() == 512.0
    assert not any(tensor.any() for state in snapshot(optimizer) for tensor in state.values())
    update(poison=False)
    assert not any(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_gradient_stay(name):
    model = tiny()
    optimizer = make_optimizer(model, OptimConfig(name=name), "fp32")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_groups_by_name_are_those_by_shape(bias: bool) -> None:
    """ZeRO-3 hides shapes, so names decide.

    Matrices other than embeddings decay; matrices inside blocks are Muon's.
    """
    config = ModelConfig(
        layers=2,
        heads=2,
        width=16,
        bias=bias,
        qk_norm=True,
        positions="learned",
        norm="layernorm",
        tie_embeddings=False,
    )
    model = GPT(ModelSpec(config, 50, 8))
    shape = {id(p): (p.ndim, name) for name, p in model.named_parameters()}
    for group in param_groups(model.named_parameters(), 0.1):
        for p in group["params"]:
            ndim, name = shape[id(p)]
            decays = ndim == 2 and not name.startswith(("embed", "positions"))
            assert (group["weight_decay"] > 0) == decays, name
    for group in make_optimizer(model, OptimConfig(name="muon"), "fp32").param_groups:
        for p in group["params"]:
            ndim, name = shape[id(p)]
            is_muons = ndim == 2 and name.startswith("blocks.")
            assert ("merged_qkv" in group) == is_muons, name
