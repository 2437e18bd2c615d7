"""Softmax attention over given queries, keys and values, by the fastest kernel of the device.

Shapes: B rows, H heads, K key/value heads, T queries, S keys, E head width.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HOPPER = (9, 0)  # the compute capability of H100 and H200


def attend(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over the keys that `mask` allows.

    Without a mask it is causal, and a single query sees all keys.
    """
    causal = mask is None
    # A branch, because under torch.compile a comparison of lengths is a symbol and not a bool.
    if q_BHTE.shape[2] == 1:
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
    """The same attention written out. Tests compare `attend` with it."""
    groups = q_BHTE.shape[1] // k_BKSE.shape[1]
    k_BHSE = k_BKSE.repeat_interleave(groups, 1)
    v_BHSE = v_BKSE.repeat_interleave(groups, 1)
    T, E = q_BHTE.shape[2:]
    S = k_BHSE.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BHTE.device)
        if T > 1:
            mask = mask.tril()
    scores_BHTS = q_BHTE @ k_BHSE.transpose(2, 3) / math.sqrt(E)
    return scores_BHTS.masked_fill(~mask, -math.inf).softmax(-1) @ v_BHSE


def attention_kernels(x: Tensor) -> AbstractContextManager[Any]:
    """On H100 and H200 prefer cuDNN's attention, about twice as fast there (pytorch #142132)."""
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
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER


# torch.compile asks once, when it traces, and keeps the answer. The decorator
# torch.compiler.assume_constant_result does the same, but its import takes a second.
is_hopper._dynamo_marked_constant = True  # type: ignore[attr-defined]
