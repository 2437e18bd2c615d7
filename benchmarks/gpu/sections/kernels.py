"""C7: attention and the loss against plain references in fp64, over shapes and masks.

Shapes: B rows, H heads, K key/value heads, T tokens, E head width, N tokens, D width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.context import Context
from dist_lm.config import NO_TARGET, ModelConfig, ModelSpec
from dist_lm.model.attention import attend, attend_plainly
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.model.loss import cross_entropy_sum, loss_in_one_pass

TOLERANCE = 1e-2  # bf16 keeps 8 bits, and rounds a few times
LENGTHS = (64, 100, 192, 1000, 1024)  # 192 % 128 is 64, where cuDNN with a mask failed
DRY_LENGTHS = (64, 100)
ROWS = 2
HEADS = 4
HEAD_WIDTH = 64


def attention_and_loss(ctx: Context) -> None:
    lengths = LENGTHS
    if ctx.is_dry:
        lengths = DRY_LENGTHS
    for length in lengths:
        for kv_heads in (HEADS, 1):
            for has_mask in (False, True):
                check_attention(ctx, length, kv_heads, has_mask)
    for length in lengths:
        check_whole_model(ctx, length)
    check_loss(ctx)


def normal(ctx: Context, *shape: int, seed: int) -> Tensor:
    """The same bf16 values on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(torch.bfloat16)
    return values.to(ctx.device)


def documents_of(ctx: Context, rows: int, length: int) -> Tensor:
    """The number of each token's document: three documents a row, cut elsewhere in each row."""
    tokens_T = torch.arange(length, device=ctx.device)
    cuts_R1 = torch.arange(rows, device=ctx.device)[:, None] + length // 3
    return (tokens_T >= cuts_R1).long() + (tokens_T >= 2 * cuts_R1).long()


def check_attention(ctx: Context, length: int, kv_heads: int, has_mask: bool) -> None:
    """Outputs and gradients of one shape. The reference is written out, in fp64."""
    q_BHTE = normal(ctx, ROWS, HEADS, length, HEAD_WIDTH, seed=1)
    k_BKTE = normal(ctx, ROWS, kv_heads, length, HEAD_WIDTH, seed=2)
    v_BKTE = normal(ctx, ROWS, kv_heads, length, HEAD_WIDTH, seed=3)
    grad_BHTE = normal(ctx, ROWS, HEADS, length, HEAD_WIDTH, seed=4)
    mask = None
    if has_mask:
        segments_BT = documents_of(ctx, ROWS, length)
        mask = (segments_BT[:, :, None] == segments_BT[:, None, :]).tril()[:, None]
    inputs = [q_BHTE, k_BKTE, v_BKTE]
    actual = outputs_and_gradients(attend, inputs, mask, grad_BHTE)
    doubles = [tensor.double() for tensor in inputs]
    wanted = outputs_and_gradients(attend_plainly, doubles, mask, grad_BHTE.double())
    kind = "mask" if has_mask else "causal"
    if kv_heads != HEADS:
        kind += ", GQA"
    ctx.check(f"attention, T {length}, {kind}", largest_error(actual, wanted), TOLERANCE)


def outputs_and_gradients(
    attention: Callable[..., Tensor], inputs: list[Tensor], mask: Tensor | None, grad: Tensor
) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = attention(*leaves, mask)
    out.backward(grad)
    return [out.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]


def largest_error(actual: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference of a tensor, by norms and relative to its own. NaN if there is one."""
    errors = []
    for ours, theirs in zip(actual, wanted, strict=True):
        errors.append((ours.double() - theirs).norm() / theirs.norm())
    return float(torch.stack(errors).max())


def check_whole_model(ctx: Context, length: int) -> None:
    """A model with document masks: bf16 gradients are finite and near those of fp32."""
    config = ModelConfig(layers=2, heads=4, kv_heads=2, width=256)
    if ctx.is_dry:
        config = ModelConfig(layers=1, heads=2, kv_heads=1, width=32)
    spec = ModelSpec(config, vocab_size=512, seq_len=length)
    model = GPT(spec).to(ctx.device)
    init_weights(model, seed=1)
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(512, (ROWS, length + 1), generator=generator).to(ctx.device)
    segments_BT = documents_of(ctx, ROWS, length)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast(ctx.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:], segments_BT=segments_BT)
        loss.backward()
        flat = [parameter.grad.flatten() for parameter in model.parameters()]
        gradients.append(torch.cat(flat))
    in_fp32, in_bf16 = gradients
    error = float((in_bf16 - in_fp32).norm() / in_fp32.norm())
    # The loss is a sum over tokens, so this compares directions. bf16 moves them by some percent.
    ctx.check(f"model with document mask, T {length}, gradient", error, 0.05)


def check_loss(ctx: Context) -> None:
    """The summed cross-entropy and its gradients, in chunks and whole, against fp64."""
    vocabulary = 50_304
    tokens = 2048
    width = 768
    if ctx.is_dry:
        vocabulary, tokens, width = 640, 96, 32
    x_ND = normal(ctx, tokens, width, seed=5)
    weight_VD = normal(ctx, vocabulary, width, seed=6) * 0.05
    generator = torch.Generator().manual_seed(7)
    targets_N = torch.randint(vocabulary - 47, (tokens,), generator=generator).to(ctx.device)
    targets_N[::7] = NO_TARGET
    padding_V = torch.zeros(vocabulary, device=ctx.device)
    padding_V[vocabulary - 47 :] = float("-inf")  # GPT-2's 50,257 tokens in 50,304 rows

    x64_ND = x_ND.double().requires_grad_()
    w64_VD = weight_VD.double().requires_grad_()
    logits_NV = F.linear(x64_ND, w64_VD, padding_V.double())
    wanted = F.cross_entropy(logits_NV, targets_N, ignore_index=NO_TARGET, reduction="sum")
    wanted.backward()
    compiled = torch.compile(
        loss_in_one_pass, backend=ctx.compile_backend, fullgraph=True, dynamic=False
    )
    quarter = tokens * vocabulary // 4
    for name, at_a_time, loss_of_chunk in (
        ("in 4 chunks, compiled", quarter, compiled),
        ("whole, compiled", 2**62, compiled),
        ("in 4 chunks", quarter, None),
        ("whole", 2**62, None),
    ):
        x = x_ND.float().requires_grad_()
        w = weight_VD.float().requires_grad_()
        with torch.autocast(ctx.device.type, torch.bfloat16):
            loss = cross_entropy_sum(x, w, padding_V, targets_N, at_a_time, loss_of_chunk)
        loss.backward()
        assert x.grad is not None and w.grad is not None
        assert x64_ND.grad is not None and w64_VD.grad is not None
        ctx.check(f"loss {name}", abs(float(loss.detach() / wanted.detach()) - 1), 1e-3)
        error = largest_error([x.grad, w.grad], [x64_ND.grad, w64_VD.grad])
        ctx.check(f"loss {name}, gradients", error, TOLERANCE)
