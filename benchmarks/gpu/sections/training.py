"""S1: the 124M recipe: train's own loop, a bare loop around the same model, and plain peers.

All variants are in one process and take turns of a few steps: the training loop is stopped inside
its Metrics while the others have their turn.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.context import Context, Skip
from benchmarks.gpu.drive import DRY_SHAPE, SHAPES, Enough, config_of, drive, gpt2_settings
from benchmarks.gpu.nano import PlainGPT, copy_weights
from benchmarks.gpu.timing import (
    Batch,
    PlainStep,
    Step,
    adamw,
    mfu,
    micro_batch_of,
    random_batches,
    seconds_of,
    target_by_card,
)
from dist_lm.config import Config
from dist_lm.model.gpt import GPT
from dist_lm.model.init import flops_per_token
from dist_lm.resume import Run

WARM_UP = 3  # steps of each variant
TARGETS = {"H200": 0.45, "H100": 0.42}  # MFU, by a part of the card's name


class Sizes:
    """How large the steps of this section are."""

    def __init__(self, ctx: Context):
        self.rows = 2 if ctx.is_dry else micro_batch_of(ctx)
        self.accumulation = 2 if ctx.is_dry else 8
        self.times = 1 if ctx.is_dry else 2  # steps of a turn
        self.layers, self.heads, self.width = DRY_SHAPE if ctx.is_dry else SHAPES["124m"]

    def settings(self, ctx: Context, **changes: Any) -> dict[str, Any]:
        return gpt2_settings(
            ctx,
            "124m",
            data__global_batch=self.rows * self.accumulation,
            data__micro_batch=self.rows,
            **changes,
        )


# --- train against a bare loop and a plain peer


def against_plain_loop(ctx: Context) -> None:
    sizes = Sizes(ctx)
    config = config_of(sizes.settings(ctx))
    turns = Turns(ctx, sizes, plain_steps)
    drive(config, turns.after_step)
    if ctx.is_warming:
        return
    report_rates(ctx, turns, config)
    over_bare = turns.median("train") / turns.median("bare loop")
    ctx.measure("train's time over the bare loop's", over_bare, at_most=1.01)
    over_plain = turns.median("plain GPT-2") / turns.median("train")
    ctx.measure("train's speed over the plain GPT-2's", over_plain, at_least=1.25)


class Turns:
    """Gives the other variants a turn each time the training loop has had one."""

    def __init__(
        self,
        ctx: Context,
        sizes: Sizes,
        make_others: Callable[[Context, Sizes, Run], dict[str, Step]],
    ):
        self._ctx = ctx
        self._sizes = sizes
        self._make_others = make_others
        self._others: dict[str, Step] = {}
        self._first = 0  # the step after which the loop's present turn began
        self._began = 0.0
        self.taken: dict[str, list[float]] = {"train": []}
        self.vocab_size = 0

    def after_step(self, run: Run, step: int) -> None:
        if step < WARM_UP:
            return
        self._ctx.sync()
        if step == WARM_UP:
            self.vocab_size = run.data.tokenizer.vocab_size
            self._others = self._make_others(self._ctx, self._sizes, run)
            for name, other in self._others.items():
                self.taken[name] = []
                for _ in range(WARM_UP):
                    other()
            if self._ctx.is_warming:
                raise Enough("the compile cache is filled")
        elif step - self._first < self._sizes.times:
            return
        else:
            seconds = time.perf_counter() - self._began
            self.taken["train"].append(seconds / self._sizes.times)
            for name, other in self._others.items():
                self.taken[name].append(seconds_of(self._ctx, other, self._sizes.times))
        if len(self.taken["train"]) == self._ctx.rounds:
            raise Enough("all turns are over")
        self._first = step
        self._ctx.sync()
        self._began = time.perf_counter()

    def median(self, name: str) -> float:
        """Seconds of a step."""
        return statistics.median(self.taken[name])


def plain_steps(ctx: Context, sizes: Sizes, run: Run) -> dict[str, Step]:
    """The bare loop around train's own compiled model, and a plain GPT-2."""
    batches = batches_for(ctx, sizes, run)
    plain = PlainGPT(
        sizes.layers,
        sizes.heads,
        sizes.width,
        vocabulary=run.model.embed.weight.shape[0],
        length=run.config.data.seq_len,
    ).to(ctx.device)
    check_same_loss(ctx, run.model, plain, batches[0])
    forward: Callable[..., Tensor] = plain
    if not ctx.is_dry:
        forward = torch.compile(plain, backend=ctx.compile_backend)
    return {
        "bare loop": bare_step(ctx, run, batches),
        "plain GPT-2": PlainStep(ctx, plain, adamw(plain), forward, batches),
    }


def batches_for(ctx: Context, sizes: Sizes, run: Run) -> list[Batch]:
    """The micro-batches of one step."""
    return random_batches(
        ctx,
        sizes.accumulation,
        rows=sizes.rows,
        length=run.config.data.seq_len,
        vocabulary=run.data.tokenizer.vocab_size,
    )


def bare_step(ctx: Context, run: Run, batches: list[Batch]) -> PlainStep:
    """A plain step around the run's own model and optimizer.

    The model is called as the training loop calls it, so that nothing compiles again.
    """
    model = run.runtime.engine.model

    def loss_of(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss: Tensor = model(tokens_BT, targets_BT, dropout_keys_B=None, segments_BT=None)
        return loss / targets_BT.numel()

    return PlainStep(ctx, run.model, run.optimizer, loss_of, batches)


@torch.no_grad()
def check_same_loss(ctx: Context, compiled: GPT, plain: PlainGPT, batch: Batch) -> None:
    """With equal weights both models have one loss, so they do the same work."""
    ours = GPT(compiled.spec).to(ctx.device)  # one that is not compiled, for other shapes
    ours.load_state_dict(compiled.state_dict())
    copy_weights(ours, plain)
    tokens_BT, targets_BT = batch
    inputs = tokens_BT[:2]
    targets = targets_BT[:2]
    own = ours(inputs, targets) / targets.numel()
    logits_NV = plain.logits(inputs)[..., : ours.vocab_size].flatten(0, 1)
    other = torch.nn.functional.cross_entropy(logits_NV, targets.flatten())
    ctx.check("plain GPT-2: same loss, difference", abs(float(own) / float(other) - 1), 1e-4)


def report_rates(ctx: Context, turns: Turns, config: Config) -> None:
    """Tokens a second of each variant, and the share of the card's peak."""
    tokens = config.data.global_batch * config.data.seq_len
    flops = flops_per_token(config.model_spec(turns.vocab_size))
    ctx.measure("micro-batch", config.data.micro_batch or 0, "sequences")
    for name in turns.taken:
        rate = tokens / turns.median(name)
        measure_rate(ctx, name, rate, flops, is_ours=name == "train")


def measure_rate(ctx: Context, name: str, rate: float, flops: float, is_ours: bool = False) -> None:
    ctx.measure(name, rate, "tokens/s")
    share = mfu(ctx, rate, flops)
    if share is not None:
        target = target_by_card(ctx, TARGETS) if is_ours else None
        ctx.measure(f"{name}, MFU", share, at_least=target)


# --- train against transformers


def against_transformers(ctx: Context) -> None:
    """S1-hf: transformers' GPT-2, compiled, in the usual bare loop."""
    try:
        import transformers  # optional
    except ImportError:
        raise Skip("transformers is missing") from None
    ctx.measure("transformers", transformers.__version__)
    sizes = Sizes(ctx)
    config = config_of(sizes.settings(ctx))
    turns = Turns(ctx, sizes, transformers_step)
    drive(config, turns.after_step)
    report_rates(ctx, turns, config)
    ratio = turns.median("transformers") / turns.median("train")
    ctx.measure("train's speed over transformers'", ratio, at_least=1.25)


def transformers_step(ctx: Context, sizes: Sizes, run: Run) -> dict[str, Step]:
    from transformers import GPT2Config, GPT2LMHeadModel  # optional

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=run.model.embed.weight.shape[0],
            n_positions=run.config.data.seq_len,
            n_embd=sizes.width,
            n_layer=sizes.layers,
            n_head=sizes.heads,
            embd_pdrop=0,
            resid_pdrop=0,
            attn_pdrop=0,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).to(ctx.device)
    model.train()

    def loss_of(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_NV = model(input_ids=tokens_BT).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits_NV.float(), targets_BT.flatten())

    if not ctx.is_dry:
        loss_of = torch.compile(loss_of, backend=ctx.compile_backend)
    batches = batches_for(ctx, sizes, run)
    return {"transformers": PlainStep(ctx, model, adamw(model), loss_of, batches)}
