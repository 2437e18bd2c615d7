"""Softmax attention over given queries, keys and values, by the fastest kernel of the device.

Shapes: B rows, H heads, K key/value heads, T queries, S keys, E head width.
"""

import inspect
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HOPPER = (9, 0)  # the compute capability of H100 and H200
BOUNDS_DTYPE = torch.int32  # of where documents begin
# cuDNN up to this version is wrong where the length is no multiple of 128 (pytorch #169849).
LAST_FAULTY_CUDNN = 91500


def attend(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, cached: bool = False
) -> Tensor:
    """Attention over the keys that `mask` allows, or to whose scores it adds.

    Without a mask it is causal, and a single query sees all keys. `cached` says that keys and
    values come from a cache, so that their number changes from call to call.
    """
    causal = mask is None
    # A branch, because under torch.compile a comparison of lengths is a symbol and not a bool.
    if q_BHTE.shape[2] == 1:
        causal = False
    has_groups = q_BHTE.shape[1] != k_BKSE.shape[1]
    if has_groups and mask is not None and is_gpu(q_BHTE.device):
        # Of the fused kernels only flash attention knows groups in all versions of torch, and it
        # takes no mask. What is left would write out the scores, T x S for each head.
        groups = q_BHTE.shape[1] // k_BKSE.shape[1]
        k_BKSE = k_BKSE.repeat_interleave(groups, 1)
        v_BKSE = v_BKSE.repeat_interleave(groups, 1)
        has_groups = False
    with attention_kernels(q_BHTE.device, is_plain=mask is None and not cached):
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=causal, enable_gqa=has_groups
        )


def attend_documents(
    q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, bounds_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """Causal attention inside of documents, (B, T, H, E), by flash attention without a mask.

    `bounds_N` says where documents begin in the rows laid end to end; the last entries are where
    the rows end.
    """
    from torch.nn.attention.varlen import varlen_attn  # not in all versions of torch

    T = q_BTHE.shape[1]
    # Autocast does not know this kernel.
    q, k, v = (x.flatten(0, 1).to(dtype) for x in (q_BTHE, k_BTKE, v_BTKE))
    y = varlen_attn(
        q,
        k,
        v,
        bounds_N,
        bounds_N,
        max_q=T,
        max_k=T,
        window_size=(-1, 0),  # no later token
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(y, Tensor)  # alone, because nothing else was asked for
    return y.view(q_BTHE.shape)


def knows_documents(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether attend_documents() runs here."""
    if not is_gpu(device) or dtype not in (torch.bfloat16, torch.float16):
        return False
    return head_width % 8 == 0 and head_width <= 256 and _has_varlen_kernel(device)


def _has_varlen_kernel(device: torch.device) -> bool:
    """Flash attention needs an A100 or newer; torch 2.10 has it with other arguments."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of bools as what is added to scores: 0 or -inf, in the type of the products.

    torch makes it of a mask of bools in every call, and keeps it for every backward.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


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


def attention_kernels(device: torch.device, is_plain: bool) -> AbstractContextManager[Any]:
    """The kernels that torch may choose from.

    cuDNN's attention is about twice as fast as the others on H100 and H200 (pytorch #142132), so it
    comes first in plain causal attention. It is left out with a mask, where its gradients were NaN
    at some lengths (pytorch #196678), and with a cache, because it builds a plan for each new
    length, which takes longer than generating the token.
    """
    if not is_gpu(device):
        return nullcontext()
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if not is_plain:
        return sdpa_kernel(others)
    if prefers_cudnn(device):
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *others], set_priority=True)
    return nullcontext()  # torch's own order


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def prefers_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's attention is right and the fastest here."""
    is_hopper = torch.cuda.get_device_capability(device) == HOPPER
    version = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    return is_hopper and version > LAST_FAULTY_CUDNN


# torch.compile asks once, when it traces, and keeps the answer. The decorator
# torch.compiler.assume_constant_result does the same, but its import takes a second.
prefers_cudnn._dynamo_marked_constant = True  # type: ignore[attr-defined]
