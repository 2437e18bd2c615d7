"""C5 and C6: the curve of DDP and of ZeRO is that of one process."""

import contextlib
import copy
import importlib
import importlib.util
import math
import os

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.context import Context, Skip
from benchmarks.gpu.runs import (
    Settings,
    Spec,
    largest_difference,
    last_checkpoint,
    run_chains,
    small_settings,
    steps_of,
)
from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights

# Two ranks on one card: NCCL refuses that, and accelerate would give the second rank a card of its
# own number.
SHARED_CARD = {
    "DIST_LM_BACKEND": "gloo",
    "ACCELERATE_BYPASS_DEVICE_MAP": "true",
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
}
STRATEGIES = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
DRY_CASES = (("zero2", "fp32"), ("zero3-offload", "bf16"))
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}


def ddp(ctx: Context) -> None:
    """C5: NCCL on all cards, and two ranks on one card by gloo, with and without accumulation."""
    micro = 1 if ctx.is_dry else 4
    cards = max(1, ctx.cards)
    runs = []
    accumulations = (4,) if ctx.is_dry else (1, 4)
    for accumulation in accumulations:
        settings = ddp_settings(ctx, batch=2 * micro * accumulation, micro=micro)
        runs.append(Spec(f"single-{accumulation}", settings))
        runs.append(Spec(f"gloo-{accumulation}", settings, world=2, env=SHARED_CARD))
    settings = ddp_settings(ctx, batch=2 * micro * cards, micro=micro)
    runs.append(Spec("single-cards", settings))
    runs.append(Spec(f"nccl-x{cards}", settings, world=cards))
    run_chains(ctx, [[run] for run in runs], at_once=3)

    for accumulation in accumulations:
        difference = largest_difference(ctx, f"gloo-{accumulation}", f"single-{accumulation}")
        ctx.check(f"gloo x 2, accumulation {accumulation}, loss", difference, 1e-5)
    difference = largest_difference(ctx, f"nccl-x{cards}", "single-cards")
    ctx.check(f"DDP x {cards} by NCCL, loss", difference, 1e-5)
    if not ctx.is_dry:
        check_gradients_are_held_once(ctx)
    check_ddp_alone(ctx)


def ddp_settings(ctx: Context, batch: int, micro: int) -> Settings:
    settings = small_settings(
        ctx,
        run__steps=3 if ctx.is_dry else 8,
        data__global_batch=batch,
        data__micro_batch=micro,
    )
    if not ctx.is_dry:  # more weights than activations, so that a second copy shows
        settings |= {"model.width": 768, "model.layers": 8, "model.heads": 12}
    return settings


def check_ddp_alone(ctx: Context) -> None:
    """DDP around one process: Accelerate leaves it out there, so NCCL would not be used at all.

    The process group stays until the process ends: destroying it was seen to hang.
    """
    backend = "gloo" if ctx.is_dry else "nccl"
    spec = ModelSpec(ModelConfig(layers=2, heads=2, width=64), vocab_size=256, seq_len=32)
    bare = GPT(spec).to(ctx.device)
    init_weights(bare, seed=1)
    wrapped = copy.deepcopy(bare)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    model = DistributedDataParallel(wrapped, gradient_as_bucket_view=True, bucket_cap_mb=1)
    generator = torch.Generator().manual_seed(1)
    for number in range(4):
        tokens_BT = torch.randint(256, (4, 33), generator=generator).to(ctx.device)
        bare(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
        exchange = contextlib.nullcontext() if number == 3 else model.no_sync()
        with exchange:
            model(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
    errors = []
    for ours, theirs in zip(wrapped.parameters(), bare.parameters(), strict=True):
        errors.append((ours.grad - theirs.grad).norm() / theirs.grad.norm())
    error = float(torch.stack(errors).max())
    ctx.check(f"DDP alone by {backend}, 4 micro-batches, gradients", error, 1e-5)
    # What ranks agree on is of these types.
    for dtype in (torch.float64, torch.int64, torch.uint8):
        numbers = torch.arange(8, device=ctx.device).to(dtype)
        dist.all_reduce(numbers)
        is_same = numbers.tolist() == list(range(8))
        ctx.require(f"a sum of {dtype} by {backend}", is_same)


def check_gradients_are_held_once(ctx: Context) -> None:
    """Accumulation over micro-batches of one size takes no more memory than none.

    Gradients beside DDP's buckets would take four bytes a parameter more.
    """
    peaks = {}
    for accumulation in (1, 4):
        steps = steps_of(ctx, f"gloo-{accumulation}")
        peaks[accumulation] = 1e9 * max(step["memory_gb"] for step in steps)
        ctx.measure(f"peak memory, accumulation {accumulation}", peaks[accumulation] / 1e9, "GB")
    gradients = 4.0 * parameters_of(ctx, "gloo-4")
    extra = (peaks[4] - peaks[1]) / gradients
    ctx.check("accumulation's extra memory, in copies of the gradients", extra, 0.25)


def parameters_of(ctx: Context, name: str) -> int:
    """Parameters of a run, from its checkpoint."""
    count = 0
    for file in last_checkpoint(ctx, name).glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no dict
                count += math.prod(tensors.get_slice(key).get_shape())
    return count


def zero(ctx: Context) -> None:
    """C6: ZeRO-1, 2 and 3 and their offload, alone on one card, in fp32 and bf16."""
    if importlib.util.find_spec("deepspeed") is None:
        raise Skip("deepspeed is missing")
    if ctx.is_dry:  # the forked runs need not import it again
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        importlib.import_module("deepspeed")
    cases = DRY_CASES
    if not ctx.is_dry:
        cases = tuple((strategy, precision) for precision in TOLERANCE for strategy in STRATEGIES)
    chains = []
    for precision in TOLERANCE:
        settings = zero_settings(ctx, precision)
        chains.append([Spec(f"single-{precision}", settings)])
    for strategy, precision in cases:
        settings = zero_settings(ctx, precision)
        name = f"{strategy}-{precision}"
        chains.append([Spec(name, settings, world=1, launch=strategy)])
    run_chains(ctx, chains, at_once=4)
    for strategy, precision in cases:
        difference = largest_difference(ctx, f"{strategy}-{precision}", f"single-{precision}")
        ctx.check(f"{strategy}, {precision}, loss", difference, TOLERANCE[precision])


def zero_settings(ctx: Context, precision: str) -> Settings:
    return small_settings(
        ctx,
        run__steps=3 if ctx.is_dry else 8,
        data__micro_batch=2 if ctx.is_dry else 8,
        run__precision=precision,
    )
