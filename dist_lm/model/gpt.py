"""The GPT: token numbers in, a summed loss or logits out.

One network covers GPT-2, Llama and the classic post-norm transformer. It knows no rank, no file and
no optimizer, and it carries no random generator: initial weights are a function of (seed, parameter
name), dropout masks are a function of (row key, place, element). So a forward is a pure function of
its arguments.

Names of tensors end in their shape:
    B rows                  H heads                  F hidden width of the feed-forward
    T tokens                K key/value heads        V vocabulary (padded in memory)
    D width                 E head width             S tokens attended to
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_lm.arithmetic import round_up
from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.model.attention import (
    BOUNDS_DTYPE,
    attend,
    attend_documents,
    bias_of,
    knows_documents,
)
from dist_lm.model.cache import KVCache
from dist_lm.model.dropout import dropout, keys_of_places
from dist_lm.model.layers import Embedding, Linear, compute_dtype, make_norm
from dist_lm.model.loss import (
    LOGITS_AT_A_TIME,
    LossOfChunk,
    cross_entropy_sum,
    loss_in_one_pass,
)
from dist_lm.model.positions import rope_tables, rotate, sinusoid

Rope = tuple[Tensor, Tensor]  # cosines and signed sines, (T, 1, E) or (B, T, 1, E)


class GPT(nn.Module):
    """Tokens to logits, or with targets to the fp32 sum of their cross-entropies."""

    # Tables, registered as buffers.
    rope_cos: Tensor
    rope_sin: Tensor
    sinusoid: Tensor
    vocab_padding: Tensor | None

    def __init__(self, spec: ModelSpec, activation_checkpointing: bool = False):
        super().__init__()
        config = spec.config
        self.spec = spec
        self.config = config
        self.vocab_size = spec.vocab_size
        self.seq_len = spec.seq_len  # the longest context
        self.activation_checkpointing = activation_checkpointing
        self._compiled_loss: LossOfChunk | None = None
        self.device_type = ""  # a caller that only plans for a GPU writes its type here

        rows = padded_vocab(spec.vocab_size)
        self.embed = Embedding(rows, config.width)
        self._register_tables(rows)
        if config.positions == "learned":
            self.positions = Embedding(spec.seq_len, config.width)
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
        bounds_N: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Loss sum over targets other than -100; without targets fp32 logits (B, T, vocabulary).

        `last_only` makes logits of the last token alone. `cache` is appended to. `segments_BT`
        numbers each token's document and bars attention across documents. If `bounds_N` also says
        where documents begin in the rows laid end to end, a kernel without a mask does so where
        there is one; else it is a dense (B, T, T) mask, made once a forward and slower than plain
        causal attention.
        """
        x_BTD = self.embed(tokens_BT)
        index, mask = self._index_and_mask(tokens_BT, cache)
        if segments_BT is not None:
            mask = self._mask_of_documents(x_BTD, segments_BT, bounds_N)
        x_BTD, rope = self._add_positions(x_BTD, index)
        # The embeddings have the first place. Each branch of each layer has a place, and so a mask,
        # of its own.
        keys_PB: Sequence[Tensor | None] = [None] * (1 + 2 * self.config.layers)
        if dropout_keys_B is not None:
            keys_PB = keys_of_places(dropout_keys_B, len(keys_PB)).unbind()
        x_BTD = dropout(x_BTD, keys_PB[0], self.config.dropout)

        for layer, block in enumerate(self.blocks):
            keys = keys_PB[2 * layer + 1 : 2 * layer + 3]
            x_BTD = self._run_block(block, x_BTD, rope, mask, keys, cache)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        if last_only:
            x_BTD = x_BTD[:, -1:]
        if self.config.norm_placement == "pre":
            x_BTD = self.norm(x_BTD)

        weight_VD = self.embed.weight if self.config.tie_embeddings else self.head.weight
        if targets_BT is None:
            return F.linear(x_BTD, weight_VD)[..., : self.vocab_size].float()
        return cross_entropy_sum(
            x_BTD.flatten(0, 1),
            weight_VD,
            self.vocab_padding,
            targets_BT.flatten(),
            LOGITS_AT_A_TIME[self.device_type or x_BTD.device.type],
            self._compiled_loss,
        )

    def compile_for_training(self, loss: bool, **options: Any) -> None:
        """Compile each block, once for all of them, and if asked the loss.

        `options` are torch.compile's.
        """
        options = {"fullgraph": True, "dynamic": False, **options}
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compile_for_training(**options)
        if loss:
            self._compiled_loss = torch.compile(loss_in_one_pass, **options)

    def new_cache(
        self, batch: int, capacity: int, pad_B: Tensor | None = None, static: bool = False
    ) -> KVCache:
        """An empty cache for `batch` texts of at most `capacity` tokens.

        `pad_B` says how many tokens of padding each text has on its left.
        """
        return KVCache(
            self.config,
            self.embed.weight,
            batch=batch,
            capacity=capacity,
            pad_B=pad_B,
            static=static,
        )

    def _index_and_mask(
        self, tokens_BT: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """The position of each token (T, or B and T), and the attention mask.

        The mask is None where causal attention is enough.
        """
        T = tokens_BT.shape[1]
        seen = 0 if cache is None else cache.length
        # The length of a static cache is a tensor, and looking at it would cost a host sync.
        is_known = not isinstance(seen, Tensor)
        assert not is_known or seen + T <= self.seq_len, f"{seen} + {T} tokens > {self.seq_len}"
        index_T = torch.arange(T, device=tokens_BT.device)
        if cache is not None:
            return cache.positions_and_mask(index_T)
        return index_T, None

    def _add_positions(self, x_BTD: Tensor, index: Tensor) -> tuple[Tensor, Rope | None]:
        """The embeddings with their positions, or the tables by which attention rotates."""
        if self.config.positions == "learned":
            return x_BTD + self.positions(index), None
        if self.config.positions == "sinusoidal":
            return x_BTD + self.sinusoid[index], None
        if self.config.positions == "rope":
            rope = (self.rope_cos[index].unsqueeze(-2), self.rope_sin[index].unsqueeze(-2))
            return x_BTD, rope
        return x_BTD, None

    def _mask_of_documents(
        self, x_BTD: Tensor, segments_BT: Tensor, bounds_N: Tensor | None
    ) -> Tensor:
        """The mask that bars attention across documents: their bounds, or numbers to add to scores.

        They differ in their type. One argument has both, because DeepSpeed's hooks take tensors.
        """
        dtype = compute_dtype(x_BTD)
        head_width = self.config.width // self.config.heads
        if bounds_N is not None and knows_documents(x_BTD.device, dtype, head_width):
            return bounds_N
        is_same_document = segments_BT[:, :, None] == segments_BT[:, None, :]
        return bias_of(is_same_document.tril_()[:, None], dtype)

    def _run_block(
        self,
        block: nn.Module,
        x_BTD: Tensor,
        rope: Rope | None,
        mask: Tensor | None,
        dropout_keys: Sequence[Tensor | None],
        cache: KVCache | None,
    ) -> Tensor:
        """Run a block.

        Under activation checkpointing nothing inside it is kept: the backward runs it again.
        """
        out_BTD: Tensor
        if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
            out_BTD = checkpoint(
                block,
                x_BTD,
                rope,
                mask,
                *dropout_keys,
                use_reentrant=False,
                preserve_rng_state=False,  # no generator is used
            )
        else:
            out_BTD = block(x_BTD, rope, mask, *dropout_keys, cache)
        return out_BTD

    def _register_tables(self, rows: int) -> None:
        """Tables that follow from the config. They are no weights and are not saved."""
        # -inf for the rows that pad the vocabulary, so that they have no probability and no
        # gradient. It is added to logits as a bias, which costs nothing.
        padding_V = torch.zeros(rows, device="cpu")  # the device by name, as in positions.py
        padding_V[self.vocab_size :] = -math.inf
        is_padded = rows > self.vocab_size
        self.register_buffer("vocab_padding", padding_V if is_padded else None, persistent=False)

        config = self.config
        if config.positions == "sinusoidal":
            table_TD = sinusoid(self.seq_len, config.width)
            self.register_buffer("sinusoid", table_TD, persistent=False)
        elif config.positions == "rope":
            head_width = config.width // config.heads
            cos_TE, sin_TE = rope_tables(self.seq_len, head_width, config.rope_theta)
            self.register_buffer("rope_cos", cos_TE, persistent=False)
            self.register_buffer("rope_sin", sin_TE, persistent=False)


class Block(nn.Module):
    """Attention and feed-forward, each on a residual branch.

    The norm comes before the branch (pre) or after the sum (post).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.pre = config.norm_placement == "pre"
        self.dropout = config.dropout
        self.norm1 = make_norm(config)
        self.attn = Attention(config, layer)
        self.norm2 = make_norm(config)
        self.ffn = FeedForward(config)
        self._compiled: Callable[..., Tensor] | None = None

    def compile_for_training(self, **options: Any) -> None:
        """Compile the computation without a cache, whose shapes do not change.

        All blocks share one graph, so nothing in it may depend on the number of the layer. It is
        not the module that is compiled but what is inside its hooks, because a graph cannot contain
        those of ZeRO-3. `options` are torch.compile's.
        """
        options = {"fullgraph": True, "dynamic": False, **options}
        self._compiled = torch.compile(self.compute, **options)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope | None,
        mask: Tensor | None,
        keys1_B: Tensor | None,
        keys2_B: Tensor | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """`keys1_B` and `keys2_B` are the dropout keys of the two branches."""
        compute = self.compute
        if self._compiled and cache is None:
            compute = self._compiled
        return compute(x_BTD, rope, mask, keys1_B, keys2_B, cache)

    def compute(
        self,
        x_BTD: Tensor,
        rope: Rope | None,
        mask: Tensor | None,
        keys1_B: Tensor | None,
        keys2_B: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        if self.pre:
            branch_BTD = self.attn(self.norm1(x_BTD), rope, mask, cache)
            x_BTD = x_BTD + dropout(branch_BTD, keys1_B, self.dropout)
            branch_BTD = self.ffn(self.norm2(x_BTD))
            return x_BTD + dropout(branch_BTD, keys2_B, self.dropout)
        branch_BTD = self.attn(x_BTD, rope, mask, cache)
        x_BTD = self.norm1(x_BTD + dropout(branch_BTD, keys1_B, self.dropout))
        branch_BTD = self.ffn(x_BTD)
        x_BTD = self.norm2(x_BTD + dropout(branch_BTD, keys2_B, self.dropout))
        return x_BTD


class Attention(nn.Module):
    """Causal self-attention. Several heads may share one key/value head (grouped queries)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.head_width = config.width // config.heads
        qkv_width = (self.heads + 2 * self.kv_heads) * self.head_width
        self.qkv = Linear(config.width, qkv_width, bias=config.bias)
        self.out = Linear(config.width, config.width, bias=config.bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_width, eps=config.norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope | None,
        mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, self.head_width))
        heads = [self.heads, self.kv_heads, self.kv_heads]
        q_BTHE, k_BTKE, v_BTKE = torch.split(qkv, heads, dim=-2)
        if self.qk_norm:
            q_BTHE = self.q_norm(q_BTHE)
            k_BTKE = self.k_norm(k_BTKE)
        if rope is not None:
            q_BTHE = rotate(q_BTHE, *rope)
            k_BTKE = rotate(k_BTKE, *rope)
        if mask is not None and mask.dtype == BOUNDS_DTYPE:
            y_BTHE = attend_documents(q_BTHE, k_BTKE, v_BTKE, mask, compute_dtype(x_BTD))
            y_BTD: Tensor = self.out(y_BTHE.flatten(2))
            return y_BTD
        q_BHTE = q_BTHE.transpose(1, 2)
        k_BKSE = k_BTKE.transpose(1, 2)
        v_BKSE = v_BTKE.transpose(1, 2)
        if cache is not None:
            k_BKSE, v_BKSE = cache.append(self.layer, k_BKSE, v_BKSE)
        y_BHTE = attend(q_BHTE, k_BKSE, v_BKSE, mask, cached=cache is not None)
        out_BTD: Tensor = self.out(y_BHTE.transpose(1, 2).flatten(2))
        return out_BTD


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": squared_relu,
    "silu": F.silu,
    "swiglu": F.silu,
}


class FeedForward(nn.Module):
    """Two matrices with an activation between them; swiglu's is multiplied by a third."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.activation == "swiglu"
        self.up = Linear(config.width, config.ffn_width, bias=config.bias)
        if self.gated:
            self.gate = Linear(config.width, config.ffn_width, bias=config.bias)
        self.down = Linear(config.ffn_width, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gated:
            h_BTF = self.activation(self.gate(x_BTD)) * self.up(x_BTD)
        else:
            h_BTF = self.activation(self.up(x_BTD))
        out_BTD: Tensor = self.down(h_BTF)
        return out_BTD


def padded_vocab(vocab_size: int) -> int:
    """Rows of the embedding.

    GPUs want multiples of 64. A small vocabulary on a CPU should not pay for that.
    """
    multiple = 64 if vocab_size >= 4096 else 8
    return round_up(vocab_size, multiple)
