"""Initial weights follow from seed and name; FLOPs count every matrix."""

import math

import pytest
import torch

from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.model.init import flops_per_token, initial_value
from tests.model.models import (
    T,
    V,
    every_model,
    make,
)


def test_initial_weights_follow_from_seed_and_name() -> None:
    first = make(seed=3)
    again = make(seed=3)
    other = make(seed=4)
    weights = dict(first.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
    assert not torch.equal(other.embed.weight, first.embed.weight)
    assert not torch.equal(weights["blocks.0.ffn.up.weight"], weights["blocks.1.ffn.up.weight"])
    for name, parameter in weights.items():  # one by one, as ZeRO-3 will ask for them
        rows = V if name == "embed.weight" else parameter.shape[0]
        value = initial_value(first.config, 3, name, (rows, *parameter.shape[1:]))
        assert torch.equal(value, parameter[:rows])
    shallow = make(seed=3, init="scaled")
    deeper = make(seed=3, layers=3, init="scaled")
    assert torch.equal(deeper.blocks[1].ffn.up.weight, shallow.blocks[1].ffn.up.weight)


@pytest.mark.parametrize(
    ("init", "std"), [("gpt2", 0.02), ("scaled", 16**-0.5), ("xavier", 16**-0.5)]
)
def test_initial_weights_have_their_size(init: str, std: float) -> None:
    config = ModelConfig(
        layers=8, heads=4, width=256, kv_heads=4, bias=True, norm="layernorm", init=init
    )
    for name, fan_in in (("attn.qkv", 256), ("attn.out", 256), ("ffn.down", 1024)):
        rows = 768 if name == "attn.qkv" else 256
        weight = initial_value(config, 1, f"blocks.0.{name}.weight", (rows, fan_in))
        expected = {
            "gpt2": 0.02 if name == "attn.qkv" else 0.02 / 4,
            "scaled": fan_in**-0.5,
            "xavier": math.sqrt(2 / (fan_in + 256)),
        }[init]
        assert abs(weight.std().item() / expected - 1) < 0.01
        assert abs(weight.mean().item()) < 0.01 * expected
    embedding = initial_value(config, 1, "embed.weight", (500, 256))
    assert abs(embedding.std().item() / 0.02 - 1) < 0.02
    assert not initial_value(config, 1, "blocks.0.norm1.bias", (256,)).any()
    assert (initial_value(config, 1, "blocks.0.norm1.weight", (256,)) == 1).all()


def test_orthogonal_weights_are_orthogonal_in_each_of_q_k_v() -> None:
    config = ModelConfig(heads=4, kv_heads=2, width=32, init="orthogonal")
    qkv = initial_value(config, 1, "blocks.0.attn.qkv.weight", (64, 32))
    for part in qkv.split([32, 16, 16]):
        assert torch.allclose(part @ part.T, torch.eye(len(part)), atol=1e-5)


@every_model
def test_flops_count_every_matrix_once(name: str) -> None:
    model = make(name)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    expected = 6 * (matrices + V * 32) + 12 * 2 * 32 * T
    assert flops_per_token(ModelSpec(model.config, V, T)) == expected
