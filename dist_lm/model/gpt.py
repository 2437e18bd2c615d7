"""The GPT: token numbers in, a summed loss or logits out.

One network covers GPT-2, Llama and the classic post-norm transformer. It knows no rank, no file and no optimizer, and
carries no random generator: initial weights are a function of (seed, parameter name), dropout masks one of (row key,
place, element), so a forward is a pure function of its arguments.

Shapes: B rows, T tokens, D width, H heads, K key/value heads, E head width, F hidden width of the feed-forward,
V vocabulary (padded in memory), S tokens attended to, N = B*T, C rows of a chunk of N.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dist_lm.config import ModelConfig

NO_TARGET = -100
# The loss makes so many logits at once, by the type of device (a caller that only plans for a GPU names it).
LOGITS_AT_A_TIME = {"cpu": 2**24, "cuda": 2**28}


class GPT(nn.Module):
    """Tokens to logits, or with targets to the fp32 sum of their cross-entropies."""

    rope_cos: Tensor
    rope_sin: Tensor
    sinusoid: Tensor
    vocab_padding: Tensor | None

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int, activation_checkpointing: bool = False):
        super().__init__()
        self.config, self.vocab_size, self.seq_len = config, vocab_size, seq_len
        self.activation_checkpointing, self.device_type = activation_checkpointing, ""
        rows = padded_vocab(vocab_size)
        self.embed = Embedding(rows, config.width)
        # Added to logits, as a bias that costs nothing: what pads the vocabulary has no probability and no gradient.
        # (Tables name their device: made under torch.device("meta"), they would import half of torch.compile, 1 s.)
        padding_V = torch.zeros(rows, device="cpu")
        padding_V[vocab_size:] = -math.inf
        self.register_buffer("vocab_padding", padding_V if rows > vocab_size else None, persistent=False)
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
        assert isinstance(seen, Tensor) or seen + T <= self.seq_len, f"{seen} + {T} tokens > {self.seq_len}"
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
                    block, x_BTD, rope, mask, dropout_keys_B, use_reentrant=False, preserve_rng_state=False
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
        return cross_entropy_sum(x_BTD.flatten(0, 1), weight_VD, self.vocab_padding, targets_BT.flatten(), at_a_time)


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
        self.qkv = Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=config.bias)
        self.out = Linear(config.width, config.width, bias=config.bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_width, eps=config.norm_eps)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: "KVCache | None"
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
        h_BTF = self.activation(self.gate(x_BTD)) * self.up(x_BTD) if self.gated else self.activation(self.up(x_BTD))
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
    if q_BHTE.shape[2] == 1:  # a branch, because under torch.compile a comparison of lengths is a symbol, not a bool
        causal = False
    with attention_kernels(q_BHTE):
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=causal,
            enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
        )  # fmt: skip


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
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
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

    def __init__(self, model: GPT, batch: int, capacity: int, pad_B: Tensor | None = None, static: bool = False):
        weight, config = model.embed.weight, model.config
        shape = (batch, config.kv_heads, capacity, config.width // config.heads)
        self.keys = [weight.new_zeros(shape, dtype=compute_dtype(weight)) for _ in range(config.layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.length: Any = torch.zeros((), dtype=torch.long, device=weight.device) if static else 0
        self.pad_B, self.static, self.capacity = pad_B, static, capacity

    def place(self, index_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positions (T, or B and T) and the attention mask of the next T tokens."""
        T, index_T = len(index_T), index_T + self.length
        if self.pad_B is None and not self.static and (T == 1 or self.length == 0):
            return index_T, None
        slots_S = torch.arange(self.capacity if self.static else self.length + T, device=index_T.device)
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

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64


def signed(value: int) -> int:
    """The int64 with the same low 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), in place on int64. Masks make the shifts logical."""
    x ^= (x >> 30) & (2**34 - 1)
    x *= signed(0xBF58476D1CE4E5B9)
    x ^= (x >> 27) & (2**37 - 1)
    x *= signed(0x94D049BB133111EB)
    x ^= (x >> 31) & (2**33 - 1)
    return x


def dropout(x_BTD: Tensor, keys_B: Tensor | None, place: int, rate: float) -> Tensor:
    """Drop elements by a hash of (row key, place, element): the same on any device, in any batch, when recomputed.

    Each 64-bit hash serves four elements, so a rate is met to 1/65536; the scale is that of the rate met.
    """
    if keys_B is None:
        return x_BTD
    size, dropped = x_BTD[0].numel(), min(round(rate * 65536), 65535)
    counter = torch.arange(-(-size // 4), device=x_BTD.device)
    # The sum is scaled, not the counter: torch.compile takes products of an arange for indices, which it cuts to size.
    hashes = mix((mix(keys_B + signed(place * GOLDEN))[:, None] + counter) * signed(GOLDEN)).view(torch.int16)
    keep_BTD = (hashes[:, :size] >= dropped - 32768).view(x_BTD.shape)
    return torch.where(keep_BTD, x_BTD * (65536 / (65536 - dropped)), 0)


# --- loss


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's type, or the tensor's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cross_entropy_sum(
    x_ND: Tensor, weight_VD: Tensor, padding_V: Tensor | None, targets_N: Tensor, logits_at_a_time: int = 2**24
) -> Tensor:
    """Sum of -log softmax(x W' + padding)[target] over targets != -100, in fp32."""
    parts = -(-len(x_ND) * len(weight_VD) // logits_at_a_time)
    if parts == 1:
        logits_NV = F.linear(x_ND, weight_VD, padding_V).float()
        return F.cross_entropy(logits_NV, targets_N, ignore_index=NO_TARGET, reduction="sum")
    rows = -(-len(x_ND) // parts)
    return _ChunkedCrossEntropySum.apply(  # type: ignore[no-any-return,no-untyped-call]
        x_ND, weight_VD, padding_V, targets_N, rows, torch.is_grad_enabled()
    )


class _ChunkedCrossEntropySum(torch.autograd.Function):
    """Makes the logits of a few rows at a time and their gradients at once, so N x V logits never exist together.

    As fast as the plain loss or faster, in half its memory at V = 50,304 and N = 2,048. Gradients are unscaled until
    the backward, summed in the weights' own precision.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, padding_V: Tensor | None, targets_N: Tensor, rows: int, grad: bool
    ) -> Tensor:
        dtype = compute_dtype(x_ND)
        w_VD, padding_V = weight_VD.to(dtype), None if padding_V is None else padding_V.to(dtype)
        # A row without a target is blanked at both ends, where it is D wide, so the logits between need no mask.
        counts_N1 = (targets_N != NO_TARGET)[:, None]
        masked_ND, labels_N1 = (x_ND * counts_N1).to(dtype), targets_N[:, None] * counts_N1
        loss = torch.zeros((), device=x_ND.device)
        if grad:
            grad_x_ND, grad_w_VD = torch.empty_like(x_ND), torch.zeros_like(weight_VD)
            minus_one_C1 = torch.full((rows, 1), -1.0, device=x_ND.device)
        for start in range(0, len(x_ND), rows):
            x_CD, labels_C1 = masked_ND[start : start + rows], labels_N1[start : start + rows]
            logp_CV = F.linear(x_CD, w_VD, padding_V).log_softmax(-1, dtype=torch.float)
            loss += F.nll_loss(logp_CV, targets_N[start : start + rows], ignore_index=NO_TARGET, reduction="sum")
            if grad:  # softmax - one-hot
                grad_CV = logp_CV.exp_().scatter_add_(1, labels_C1, minus_one_C1[: len(x_CD)]).to(dtype)
                grad_x_ND[start : start + rows] = grad_CV @ w_VD
                if dtype == grad_w_VD.dtype:
                    grad_w_VD.addmm_(grad_CV.T, x_CD)
                else:
                    grad_w_VD += grad_CV.T @ x_CD
        if grad:
            ctx.save_for_backward(grad_x_ND.mul_(counts_N1), grad_w_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_x_ND, grad_w_VD = ctx.saved_tensors
        return grad_x_ND.mul_(grads[0]), grad_w_VD.mul_(grads[0]), None, None, None, None


# --- initial weights and size


def padded_vocab(vocab_size: int) -> int:
    """Rows of the embedding: GPUs want multiples of 64; small vocabularies on CPUs should not pay for it."""
    multiple = 64 if vocab_size >= 4096 else 8
    return -(-vocab_size // multiple) * multiple


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
            part.normal_(0, 0.02 * (2 * config.layers) ** (-0.5 if onto_residual else 0), generator=generator)
    return value


@cache  # a GPT is built for it
def parameter_shapes(config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, the vocabulary padded, without memory for them."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(config, vocab_size, seq_len).named_parameters()}


def unpadded(name: str, shape: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """The shape of what is saved of a parameter."""
    return (vocab_size, *shape[1:]) if name in ("embed.weight", "head.weight") else shape


@torch.no_grad()
def init_weights(model: GPT, seed: int, parts: Iterable[tuple[str, int, Tensor]] | None = None) -> None:
    """Initial weights for all parameters, or for `parts` of them, flat: name, first element, where to put them."""
    shapes = parameter_shapes(model.config, model.vocab_size, model.seq_len)
    if parts is None:
        parts = ((name, 0, p.view(-1)) for name, p in model.named_parameters())
    for name, start, out in parts:
        whole = initial(model.config, seed, name, unpadded(name, shapes[name], model.vocab_size))
        value = whole.flatten()[start : start + len(out)]
        out.zero_()  # rows that pad the vocabulary stay so
        out[: len(value)] = value


def flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """Forward and backward: 6 a matrix parameter and 12 x layers x width x length for attention (PaLM, appendix B)."""
    attention = 2 * config.width**2 * (1 + config.kv_heads / config.heads)
    feed_forward = (3 if config.activation == "swiglu" else 2) * config.width * config.ffn_width
    matrices = config.layers * (attention + feed_forward) + vocab_size * config.width
    return 6.0 * matrices + 12.0 * config.layers * config.width * seq_len
