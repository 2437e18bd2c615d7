"""S3: what each choice of the 124M model's step is worth: one line each, all in a bare loop.

Each variant compiles for itself. What does not fit into the section's time is left out, the last
ones first.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import torch
import torch._dynamo.utils
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.context import Context
from benchmarks.gpu.drive import config_of
from benchmarks.gpu.sections.training import Sizes
from benchmarks.gpu.timing import Batch, PlainStep, adamw, random_batches, take_turns
from dist_lm.config import ModelSpec
from dist_lm.model import attention, gpt
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights

WARM_UP = 2
SECONDS_OF_A_VARIANT = 15.0
AUTOTUNE = "max-autotune-no-cudagraphs"


def ablate(ctx: Context) -> None:
    sizes = Sizes(ctx)
    config = config_of(sizes.settings(ctx)).model
    vocabulary = 512 if ctx.is_dry else 50_257
    length = 32 if ctx.is_dry else 1024
    spec = ModelSpec(config, vocabulary, length)
    batches = random_batches(
        ctx, sizes.accumulation, rows=sizes.rows, length=length, vocabulary=vocabulary
    )
    for name, variant in VARIANTS.items():
        if not ctx.is_dry and ctx.seconds_left < SECONDS_OF_A_VARIANT:
            ctx.measure(name, "no time left")
            continue
        measure_variant(ctx, name, variant, spec, batches)


def measure_variant(
    ctx: Context,
    name: str,
    variant: "Variant",
    spec: ModelSpec,
    batches: list[Batch],
) -> None:
    """Build the model anew, so that no variant inherits another's kernels."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = GPT(spec).to(ctx.device)
    init_weights(model, seed=1)

    def loss_of(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss: Tensor = model(tokens_BT, targets_BT)
        return loss / targets_BT.numel()

    step = PlainStep(ctx, model, adamw(model), loss_of, batches)
    try:
        with variant(ctx, model):
            for _ in range(WARM_UP):
                step()
            seconds = take_turns(ctx, {name: step}, times=1 if ctx.is_dry else 2)[name]
    except RuntimeError as error:  # a kernel that this card lacks, or no memory
        ctx.measure(name, " ".join(str(error).split())[:80])
        return
    finally:
        ctx.free()
    tokens = sum(tokens_BT.numel() for tokens_BT, _ in batches)
    ctx.measure(name, tokens / seconds, "tokens/s")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if graphs:
        ctx.measure(f"{name}, graphs compiled", graphs)


# --- the variants: each surrounds the steps


@contextmanager
def uncompiled(ctx: Context, model: GPT) -> Iterator[None]:
    yield


@contextmanager
def whole(ctx: Context, model: GPT) -> Iterator[None]:
    model.compile(backend=ctx.compile_backend)
    yield


@contextmanager
def as_in_training(
    ctx: Context, model: GPT, loss: bool = True, mode: str | None = None
) -> Iterator[None]:
    """One graph for all blocks, and one for the loss of a chunk."""
    options: dict[str, str] = {"backend": ctx.compile_backend}
    if mode:
        options = {"mode": mode}
    model.compile_for_training(loss, **options)
    yield


def with_loss_by_kernels(ctx: Context, model: GPT) -> AbstractContextManager[None]:
    """The loss in chunks, by torch's own kernels one after another."""
    return as_in_training(ctx, model, loss=False)


def autotuned(ctx: Context, model: GPT) -> AbstractContextManager[None]:
    """Inductor tries several kernels for each product. A dry run has no inductor."""
    mode = None
    if not ctx.is_dry:
        mode = AUTOTUNE
    return as_in_training(ctx, model, mode=mode)


@contextmanager
def with_plain_loss(ctx: Context, model: GPT) -> Iterator[None]:
    """All logits at once, as torch's own cross-entropy wants them."""
    with mock.patch.dict(gpt.LOGITS_AT_A_TIME, {ctx.device.type: 2**62}), whole(ctx, model):
        yield


@contextmanager
def only_kernel(ctx: Context, model: GPT, kernel: SDPBackend) -> Iterator[None]:
    """Attention by one kernel alone."""
    if ctx.is_dry:
        kernel = SDPBackend.MATH

    def kernels(*args: object, **kwargs: object) -> object:
        return sdpa_kernel([kernel])

    with mock.patch.object(attention, "attention_kernels", kernels), as_in_training(ctx, model):
        yield


def by_flash(ctx: Context, model: GPT) -> AbstractContextManager[None]:
    return only_kernel(ctx, model, SDPBackend.FLASH_ATTENTION)


def by_cudnn(ctx: Context, model: GPT) -> AbstractContextManager[None]:
    return only_kernel(ctx, model, SDPBackend.CUDNN_ATTENTION)


Variant = Callable[[Context, GPT], AbstractContextManager[None]]

VARIANTS: dict[str, Variant] = {
    "uncompiled": uncompiled,
    "as in training": as_in_training,
    "loss by torch's kernels": with_loss_by_kernels,
    "flash attention": by_flash,
    "cuDNN attention": by_cudnn,
    "compiled whole": whole,
    "compiled whole, plain loss": with_plain_loss,
    "autotuned": autotuned,
}
