"""model.init."""

import hashlib
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.model.gpt import GPT


def initial(config: ModelConfig, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """The initial value of one parameter (vocabulary unpadded): CPU fp32, a function of the seed and its name."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    value = torch.empty(shape)
    if name in ("embed.weight", "positions.weight"):
        return value.normal_(0, 0.02, generator=generator)
    q, kv = config.width, config.kv_heads * config.width // config.heads
    parts = torch.split(value, [q, kv, kv]) if name.endswith("qkv.weight") else (value,)
    for part in parts:
        if config.init == "xavier":
            nn.init.xavier_uniform_(part, generator=generator)
        elif config.init == "orthogonal":
            nn.init.orthogonal_(part, generator=generator)
        elif config.init == "scaled":
            part.normal_(0, shape[1] ** -0.5, generator=generator)
        else:  # GPT-2, section 2.3: the sum of 2 x layers branches keeps its size
            onto_residual = name.endswith(("attn.out.weight", "ffn.down.weight"))
            part.normal_(
                0, 0.02 * (2 * config.layers) ** (-0.5 if onto_residual else 0), generator=generator
            )
    return value


@cache  # a GPT is built for it
def parameter_shapes(
    spec: ModelSpec,
) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, the vocabulary padded, without memory for them."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(spec).named_parameters()}


def unpadded(name: str, shape: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """The shape of what is saved of a parameter."""
    return (vocab_size, *shape[1:]) if name in ("embed.weight", "head.weight") else shape


@torch.no_grad()
def init_weights(
    model: GPT, seed: int, parts: Iterable[tuple[str, int, Tensor]] | None = None
) -> None:
    """Initial weights for all parameters, or for `parts` of them, flat: name, first element, where to put them."""
    shapes = parameter_shapes(model.spec)
    if parts is None:
        parts = ((name, 0, p.view(-1)) for name, p in model.named_parameters())
    for name, start, out in parts:
        whole = initial(model.config, seed, name, unpadded(name, shapes[name], model.vocab_size))
        value = whole.flatten()[start : start + len(out)]
        out.zero_()  # rows that pad the vocabulary stay so
        out[: len(value)] = value


def flops_per_token(spec: ModelSpec) -> float:
    """Forward and backward: 6 a matrix parameter and 12 x layers x width x length for attention (PaLM, appendix B)."""
    config = spec.config
    attention = 2 * config.width**2 * (1 + config.kv_heads / config.heads)
    feed_forward = (3 if config.activation == "swiglu" else 2) * config.width * config.ffn_width
    matrices = config.layers * (attention + feed_forward) + spec.vocab_size * config.width
    return 6.0 * matrices + 12.0 * config.layers * config.width * spec.seq_len
