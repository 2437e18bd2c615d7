"""A small model of each kind, with inputs for it."""

import pytest
import torch
from torch import Tensor

from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights

V = 101  # vocabulary, 104 in memory
T = 24  # tokens of the context
B = 3  # rows of a batch

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
