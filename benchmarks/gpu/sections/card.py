"""M1: what this card reaches by itself. The other figures are to be read beside these."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.context import Context
from benchmarks.gpu.facts import ask_smi
from benchmarks.gpu.timing import seconds_of
from dist_lm.metrics import peak_flops

PRODUCTS = {  # rows, inner, columns
    "8192 x 8192 x 8192": (8192, 8192, 8192),
    "124M, up": (32_768, 768, 3072),
    "124M, logits": (8192, 768, 50_304),
    "1558M, up": (16_384, 1600, 6400),
}
KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def basics(ctx: Context) -> None:
    for name, sizes in PRODUCTS.items():
        measure_product(ctx, name, sizes)
    measure_clocks(ctx)
    measure_copies(ctx)
    for name, kernel in KERNELS.items():
        measure_attention(ctx, name, kernel)


def random(ctx: Context, *shape: int) -> Tensor:
    """Random values, because products of zeros run faster than real ones."""
    return torch.randn(shape, device=ctx.device, dtype=torch.bfloat16)


def timed(ctx: Context, work: Callable[[], object]) -> float:
    """Seconds of a piece of work, warm."""
    times = 1 if ctx.is_dry else 20

    def step() -> None:
        work()

    for _ in range(2):
        step()
    return seconds_of(ctx, step, times)


def measure_product(ctx: Context, name: str, sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    if ctx.is_dry:
        rows, inner, columns = rows // 256, inner // 64, columns // 256
    a = random(ctx, rows, inner)
    b = random(ctx, columns, inner)
    seconds = timed(ctx, lambda: F.linear(a, b))
    rate = 2 * rows * inner * columns / seconds
    ctx.measure(f"bf16 product, {name}", rate / 1e12, "TFLOP/s")
    peak = peak_flops(ctx.card)
    if peak != float("inf"):
        ctx.measure(f"bf16 product, {name}, share of the peak", rate / peak)


def measure_clocks(ctx: Context) -> None:
    """Clock and power while the card multiplies, for a second or two."""
    size = 64 if ctx.is_dry else 8192
    a = random(ctx, size, size)
    began = time.perf_counter()
    F.linear(a, a)
    ctx.sync()
    times = int(min(2000, 2 / (time.perf_counter() - began)))
    for _ in range(1 if ctx.is_dry else times):
        F.linear(a, a)
    for field, value in ask_smi(["clocks.sm", "power.draw", "temperature.gpu"]).items():
        ctx.measure(f"under load, {field}", value)
    ctx.sync()


def measure_copies(ctx: Context) -> None:
    size = 2**20 if ctx.is_dry else min(2**32, ctx.card_bytes // 8)
    a = torch.zeros(size, dtype=torch.uint8, device=ctx.device)
    b = torch.empty_like(a)
    seconds = timed(ctx, lambda: b.copy_(a))
    ctx.measure("copy on the card, read and written", 2 * size / seconds / 1e9, "GB/s")
    host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=not ctx.is_dry)
    seconds = timed(ctx, lambda: host.copy_(a[: len(host)], non_blocking=True))
    ctx.measure("copy to pinned memory", len(host) / seconds / 1e9, "GB/s")


def measure_attention(ctx: Context, name: str, kernel: SDPBackend) -> None:
    """Causal attention of the 124M model's shape, forward and backward."""
    shape = (1, 2, 64, 32) if ctx.is_dry else (32, 12, 1024, 64)
    q, k, v = (random(ctx, *shape).requires_grad_() for _ in range(3))
    grad = random(ctx, *shape)
    backend = SDPBackend.MATH if ctx.is_dry else kernel

    def forward_and_backward() -> None:
        with sdpa_kernel([backend]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), grad)

    try:
        seconds = timed(ctx, forward_and_backward)
    except RuntimeError as error:  # this card or this torch has no such kernel
        ctx.measure(f"attention, {name}", " ".join(str(error).split())[:80])
        return
    rows, heads, length, width = shape
    # Two matrix products forward and five backward, each over half of a square.
    flops = 7 * rows * heads * length * length * width
    ctx.measure(f"attention, {name}, forward and backward", flops / seconds / 1e12, "TFLOP/s")
