"""The GPT: token numbers in, a summed loss or logits out.

One network covers GPT-2, Llama and the classic post-norm transformer. It knows no rank, no file and no optimizer, and
carries no random generator: initial weights are a function of (seed, parameter name), dropout masks one of (row key,
place, element), so a forward is a pure function of its arguments.

Shapes: B rows, T tokens, D width, H heads, K key/value heads, E head width, F hidden width of the feed-forward,
V vocabulary (padded in memory), S tokens attended to, N = B*T, C rows of a chunk of N.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.model.dropout import dropout
from dist_lm.model.loss import LOGITS_AT_A_TIME, compute_dtype, cross_entropy_sum


class GPT(nn.Module):
    """Tokens to logits, or with targets to the fp32 sum of their cross-entropies."""

    rope_cos: Tensor
    rope_sin: Tensor
    sinusoid: Tensor
    vocab_padding: Tensor | None

    def __init__(
        self,
        spec: ModelSpec,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        config, vocab_size, seq_len = spec.config, spec.vocab_size, spec.seq_len
        self.spec, self.config = spec, config
        self.vocab_size, self.seq_len = vocab_size, seq_len
        self.activation_checkpointing, self.device_type = activation_checkpointing, ""
        rows = padded_vocab(vocab_size)
        self.embed = Embedding(rows, config.width)
        # Added to logits, as a bias that costs nothing: what pads the vocabulary has no probability and no gradient.
        # (Tables name their device: made under torch.device("meta"), they would import half of torch.compile, 1 s.)
        padding_V = torch.zeros(rows, device="cpu")
        padding_V[vocab_size:] = -math.inf
        self.register_buffer(
            "vocab_padding", padding_V if rows > vocab_size else None, persistent=False
        )
        if config.positions == "learned":
            self.positions = Embedding(seq_len, config.width)
        elif config.positions == "sinusoidal":
            self.register_buffer("sinusoid", sinusoid(seq_len, config.width), persistent=False)
        elif config.positions == "rope":
            cos_TE, sin_TE = rope_tables(seq_len, config.width // config.heads, config.rope_theta)
            self.register_buffer("rope_cos", cos_TE, persistent=False)
            self.register_buffer("rope_sin", sin_TE, persistent=False)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.layers)])
        if config.norm_placement == "pre":
            self.norm = make_norm(config)
        if not config.tie_embeddings:
            self.head = Linear(config.width, rows, bias=False)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        dropout_keys_B: Tensor | None = None,
        segments_BT: Tensor | None = None,
        cache: "KVCache | None" = None,
        last_only: bool = False,
    ) -> Tensor:
        """Loss sum over targets != -100, or fp32 logits (B, T, vocabulary), with `last_only` of the last token alone.

        `segments_BT` numbers each token's document and bars attention across documents by a dense (B, T, T) mask: made
        once a forward, but slower than plain causal attention, whose kernels need none. `cache` is appended to.
        """
        T, seen = tokens_BT.shape[1], 0 if cache is None else cache.length
        assert isinstance(seen, Tensor) or seen + T <= self.seq_len, (
            f"{seen} + {T} tokens > {self.seq_len}"
        )
        index, mask = torch.arange(T, device=tokens_BT.device), None
        if cache is not None:
            index, mask = cache.place(index)
        elif segments_BT is not None:
            mask = (segments_BT[:, :, None] == segments_BT[:, None, :]).tril_()[:, None]

        x_BTD = self.embed(tokens_BT)
        rope = None
        if self.config.positions == "learned":
            x_BTD = x_BTD + self.positions(index)
        elif self.config.positions == "sinusoidal":
            x_BTD = x_BTD + self.sinusoid[index]
        elif self.config.positions == "rope":
            rope = (self.rope_cos[index].unsqueeze(-2), self.rope_sin[index].unsqueeze(-2))
        x_BTD = dropout(x_BTD, dropout_keys_B, 0, self.config.dropout)
        for block in self.blocks:
            if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
                x_BTD = checkpoint(
                    block,
                    x_BTD,
                    rope,
                    mask,
                    dropout_keys_B,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x_BTD = block(x_BTD, rope, mask, dropout_keys_B, cache)
        if cache is not None:
            cache.length += T
        if last_only:
            x_BTD = x_BTD[:, -1:]
        if self.config.norm_placement == "pre":
            x_BTD = self.norm(x_BTD)

        weight_VD = self.embed.weight if self.config.tie_embeddings else self.head.weight
        if targets_BT is None:
            return F.linear(x_BTD, weight_VD)[..., : self.vocab_size].float()
        at_a_time = LOGITS_AT_A_TIME[self.device_type or x_BTD.device.type]
        return cross_entropy_sum(
            x_BTD.flatten(0, 1), weight_VD, self.vocab_padding, targets_BT.flatten(), at_a_time
        )


class Block(nn.Module):
    """Attention and feed-forward, each on a residual branch, normalised before (pre) or after the sum (post)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.pre, self.dropout = layer, config.norm_placement == "pre", config.dropout
        self.norm1, self.attn = make_norm(config), Attention(config, layer)
        self.norm2, self.ffn = make_norm(config), FeedForward(config)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        dropout_keys_B: Tensor | None,
        cache: "KVCache | None" = None,
    ) -> Tensor:
        branch = self.attn(self.norm1(x_BTD) if self.pre else x_BTD, rope, mask, cache)
        x_BTD = x_BTD + dropout(branch, dropout_keys_B, 2 * self.layer + 1, self.dropout)
        if not self.pre:
            x_BTD = self.norm1(x_BTD)
        branch = self.ffn(self.norm2(x_BTD) if self.pre else x_BTD)
        x_BTD = x_BTD + dropout(branch, dropout_keys_B, 2 * self.layer + 2, self.dropout)
        return x_BTD if self.pre else self.norm2(x_BTD)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.kv_heads = layer, config.heads, config.kv_heads
        self.head_width = config.width // config.heads
        self.qkv = Linear(
            config.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=config.bias
        )
        self.out = Linear(config.width, config.width, bias=config.bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_width, eps=config.norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: "KVCache | None",
    ) -> Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, self.head_width))
        q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=-2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q_BHTE, k_BKSE, v_BKSE = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k_BKSE, v_BKSE = cache.append(self.layer, k_BKSE, v_BKSE)
        return self.out(attend(q_BHTE, k_BKSE, v_BKSE, mask).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "silu": F.silu,
    "swiglu": F.silu,
}


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation, self.gated = ACTIVATIONS[config.activation], config.activation == "swiglu"
        self.up = Linear(config.width, config.ffn_width, bias=config.bias)
        if self.gated:
            self.gate = Linear(config.width, config.ffn_width, bias=config.bias)
        self.down = Linear(config.ffn_width, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = (
            self.activation(self.gate(x_BTD)) * self.up(x_BTD)
            if self.gated
            else self.activation(self.up(x_BTD))
        )
        return self.down(h_BTF)  # type: ignore[no-any-return]


class Linear(nn.Linear):
    """Zero until init_weights or a checkpoint fills it: torch's own random filling costs seconds and is thrown away."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.width, eps=config.norm_eps)


# --- attention


def attend(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over the keys that `mask` allows; without one causal, or for a single query over all keys."""
    causal = mask is None
    if (
        q_BHTE.shape[2] == 1
    ):  # a branch, because under torch.compile a comparison of lengths is a symbol, not a bool
        causal = False
    with attention_kernels(q_BHTE):
        return F.scaled_dot_product_attention(
            q_BHTE,
            k_BKSE,
            v_BKSE,
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
        )


def attend_plainly(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None) -> Tensor:
    """The same, written out, to test `attend` against."""
    groups, (T, E) = q_BHTE.shape[1] // k_BKSE.shape[1], q_BHTE.shape[2:]
    k_BHSE, v_BHSE = k_BKSE.repeat_interleave(groups, 1), v_BKSE.repeat_interleave(groups, 1)
    if mask is None:
        mask = torch.ones(T, k_BHSE.shape[2], dtype=torch.bool, device=q_BHTE.device)
        mask = mask.tril() if T > 1 else mask
    scores_BHTS = q_BHTE @ k_BHSE.transpose(2, 3) / math.sqrt(E)
    return scores_BHTS.masked_fill(~mask, -math.inf).softmax(-1) @ v_BHSE


def attention_kernels(x: Tensor) -> AbstractContextManager[Any]:
    """On H100 and H200 cuDNN's attention is about twice as fast as the default (pytorch #142132)."""
    if not is_hopper(x.device):
        return nullcontext()
    kernels = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(kernels, set_priority=True)


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


# torch.compile asks once, when it traces: torch.compiler.assume_constant_result, without its import of a second.
is_hopper._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rope_tables(seq_len: int, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for `rotate` (RoFormer, arXiv 2104.09864, in the layout of transformers' Llama)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_width, 2, device="cpu").float() / head_width)
    angles = torch.arange(seq_len, device="cpu").float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.cos()], -1), torch.cat([-angles.sin(), angles.sin()], -1)


def rotate(x_BTHE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
    """Turn each pair (element i, element i + E/2) by its position's angle."""
    return (x_BTHE * cos_T1E + x_BTHE.roll(x_BTHE.shape[-1] // 2, -1) * sin_T1E).to(x_BTHE.dtype)


def sinusoid(seq_len: int, width: int) -> Tensor:
    """The position table of "Attention Is All You Need" (section 3.5): sines in even columns, cosines in odd ones."""
    places_T, evens = torch.arange(seq_len, device="cpu"), torch.arange(0, width, 2, device="cpu")
    angles = places_T[:, None] * torch.exp(evens * (-math.log(10000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


class KVCache:
    """Keys and values of the tokens so far. Rows of different lengths are padded on the left by `pad_B` tokens.

    A static cache attends over its whole capacity through a mask, so that shapes never change under torch.compile;
    otherwise slices grow with the text, and rows without padding need no mask.
    """

    def __init__(
        self,
        model: GPT,
        batch: int,
        capacity: int,
        pad_B: Tensor | None = None,
        static: bool = False,
    ):
        weight, config = model.embed.weight, model.config
        shape = (batch, config.kv_heads, capacity, config.width // config.heads)
        self.keys = [
            weight.new_zeros(shape, dtype=compute_dtype(weight)) for _ in range(config.layers)
        ]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.length: Any = torch.zeros((), dtype=torch.long, device=weight.device) if static else 0
        self.pad_B, self.static, self.capacity = pad_B, static, capacity

    def place(self, index_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positions (T, or B and T) and the attention mask of the next T tokens."""
        T, index_T = len(index_T), index_T + self.length
        if self.pad_B is None and not self.static and (T == 1 or self.length == 0):
            return index_T, None
        slots_S = torch.arange(
            self.capacity if self.static else self.length + T, device=index_T.device
        )
        mask = slots_S <= index_T[:, None]
        if self.pad_B is None:
            return index_T, mask
        # A padding token sees itself, so that no row of the softmax is empty.
        mask = (mask & (slots_S >= self.pad_B[:, None, None])) | (slots_S == index_T[:, None])
        return (index_T - self.pad_B[:, None]).clamp(min=0), mask[:, None]

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next tokens of a layer; returns all it holds."""
        keys, values, T = self.keys[layer], self.values[layer], k_BKTE.shape[2]
        if self.static:
            slots_T = torch.arange(T, device=keys.device) + self.length
            return keys.index_copy_(2, slots_T, k_BKTE), values.index_copy_(2, slots_T, v_BKTE)
        end = self.length + T
        keys[:, :, self.length : end] = k_BKTE
        values[:, :, self.length : end] = v_BKTE
        return keys[:, :, :end], values[:, :, :end]


# --- dropout without a generator


# --- loss


# --- initial weights and size


def padded_vocab(vocab_size: int) -> int:
    """Rows of the embedding: GPUs want multiples of 64; small vocabularies on CPUs should not pay for it."""
    multiple = 64 if vocab_size >= 4096 else 8
    return -(-vocab_size // multiple) * multiple
