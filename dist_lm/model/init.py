"""Initial weights, and what follows from a spec without any weights: shapes, and FLOPs a token."""

import hashlib
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.model.gpt import GPT

GPT2_STD = 0.02


@torch.no_grad()
def init_weights(
    model: GPT, seed: int, parts: Iterable[tuple[str, int, Tensor]] | None = None
) -> None:
    """Fill all parameters, or flat `parts`: name, first element, where to put the values."""
    shapes = parameter_shapes(model.spec)
    if parts is None:
        parts = ((name, 0, p.view(-1)) for name, p in model.named_parameters())
    for name, start, out in parts:
        shape = unpadded(name, shapes[name], model.vocab_size)
        whole = initial_value(model.config, seed, name, shape)
        values = whole.flatten()[start : start + len(out)]
        out.zero_()  # rows that pad the vocabulary stay zero
        out[: len(values)] = values


def initial_value(config: ModelConfig, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """The initial value of one parameter, on the CPU in fp32: a function of the seed and its name.

    The shape has an unpadded vocabulary.
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    value = torch.empty(shape)
    if name in ("embed.weight", "positions.weight"):
        return value.normal_(0, GPT2_STD, generator=generator)
    matrices = [value]
    if name.endswith("qkv.weight"):
        queries = config.width
        keys = config.kv_heads * config.width // config.heads
        matrices = list(torch.split(value, [queries, keys, keys]))
    for matrix in matrices:
        _fill_matrix(matrix, config, name, generator)
    return value


def _fill_matrix(
    matrix: Tensor, config: ModelConfig, name: str, generator: torch.Generator
) -> None:
    if config.init == "xavier":
        nn.init.xavier_uniform_(matrix, generator=generator)
    elif config.init == "orthogonal":
        nn.init.orthogonal_(matrix, generator=generator)
    elif config.init == "scaled":
        fan_in = matrix.shape[1]
        matrix.normal_(0, fan_in**-0.5, generator=generator)
    else:
        std = GPT2_STD
        # GPT-2, section 2.3: so the sum of 2 x layers branches keeps its size.
        if name.endswith(("attn.out.weight", "ffn.down.weight")):
            std = GPT2_STD * (2 * config.layers) ** -0.5
        matrix.normal_(0, std, generator=generator)


@cache  # because it builds a GPT, on the meta device
def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, the vocabulary padded, without memory for them."""
    with torch.device("meta"):
        model = GPT(spec)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def unpadded(name: str, shape: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """The shape of a parameter as it is saved, without the rows that pad the vocabulary."""
    if name in ("embed.weight", "head.weight"):
        return (vocab_size, *shape[1:])
    return shape


def flops_per_token(spec: ModelSpec) -> float:
    """Forward and backward of a token (PaLM, appendix B).

    6 for each parameter of a matrix, and 12 x layers x width x length for attention.
    """
    config = spec.config
    attention = 2 * config.width**2 * (1 + config.kv_heads / config.heads)
    feed_forward_matrices = 3 if config.activation == "swiglu" else 2
    feed_forward = feed_forward_matrices * config.width * config.ffn_width
    matrices = config.layers * (attention + feed_forward) + spec.vocab_size * config.width
    return 6.0 * matrices + 12.0 * config.layers * config.width * spec.seq_len
