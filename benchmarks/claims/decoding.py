"""Greedy decoding with a KV cache, a 124M-size model with random weights, against transformers."""

import torch

from benchmarks import models
from benchmarks.claim import (
    FASTER,
    SHARE,
    Claim,
    Context,
    Measured,
    Target,
    must_equal,
    take_turns,
)
from benchmarks.models import Size
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.sample import Sampling, lay_out_for_decoding, sample

SIZE = Size(layers=12, heads=12, width=768, vocabulary=50_257, length=1024, batch=1)
_PADDING = 0


def decode(ctx: Context, lengths: list[int]) -> Measured:
    size = ctx.pick(SIZE, models.TINY)
    new_tokens = ctx.pick(24, 3)
    lengths = [ctx.pick(length, 1 + length // 16) for length in lengths]
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for length in lengths:
        tokens = torch.randint(1, size.vocabulary, (length,), generator=generator)
        prompts.append(tokens.tolist())
    model = models.ours(size).eval()
    twin = models.transformers_twin(model, ctx.scratch / "model").eval()
    lay_out_for_decoding(model)  # as generate does on a CPU
    tokenizer = train_tokenizer("byte", [])
    settings = Sampling(new_tokens, temperature=0)
    made: dict[str, list[list[int]]] = {}

    def ours() -> None:
        *_, rows = sample(model, tokenizer, prompts, settings, seeds=lengths, stop_early=False)
        made["ours"] = [row.tokens for row in rows]

    longest = max(lengths)
    padded = [[_PADDING] * (longest - len(prompt)) + prompt for prompt in prompts]
    prompt_BT = torch.tensor(padded)
    mask_BT = torch.ones_like(prompt_BT)
    for row, length in enumerate(lengths):
        mask_BT[row, : longest - length] = 0

    def theirs() -> None:
        made_BT = twin.generate(
            prompt_BT,
            attention_mask=mask_BT,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=_PADDING,
        )
        made["theirs"] = made_BT[:, longest:].tolist()

    ours()
    theirs()
    equal = must_equal(made["ours"], made["theirs"], "tokens")
    return take_turns(ctx, ours, theirs, equal)


def bandwidth(ctx: Context) -> Measured:
    """Decoding one text, against products of the same weights with a vector, one after another.

    A token must read each weight once, so these products are the least that it can take.
    """
    size = ctx.pick(SIZE, models.TINY)
    new_tokens = ctx.pick(24, 3)
    model = models.ours(size).eval()
    lay_out_for_decoding(model)
    tokenizer = train_tokenizer("byte", [])
    settings = Sampling(new_tokens, temperature=0)
    matrices = []
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and not name.startswith("positions"):
            matrices.append(weight.detach())
    vectors = [torch.ones(1, weight.shape[1]) for weight in matrices]
    elements = sum(weight.numel() for weight in matrices)
    others = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)
    positions = model.positions.weight.numel()
    whole = sum(weight.numel() for weight in model.parameters())
    equal = must_equal(elements + others + positions, whole, "numbers of weights")

    def ours() -> None:
        for _ in sample(model, tokenizer, [[1]], settings, seeds=[0], stop_early=False):
            pass

    def products() -> None:
        for _ in range(new_tokens):
            for vector, weight in zip(vectors, matrices, strict=True):
                torch.nn.functional.linear(vector, weight)

    ours()
    products()
    measured = take_turns(ctx, ours, products, equal)
    seconds = sorted(measured.other)[len(measured.other) // 2]
    measured.notes["products, GB/s"] = round(4e-9 * elements * new_tokens / seconds, 1)
    return measured


CLAIMS = (
    Claim(
        name="decoding-1",
        sentence="decoding a 124M model, one text, against transformers' generate",
        figure=FASTER,
        target=Target(least=1.3),
        measure=lambda ctx: decode(ctx, [32]),
        threads=2,
        probe="copy",
        peers=("transformers",),
        preload=("transformers.models.gpt2.modeling_gpt2",),
    ),
    Claim(
        name="decoding-8",
        sentence="decoding a 124M model, eight texts of different lengths, against transformers'",
        figure=FASTER,
        target=Target(least=1.5),
        measure=lambda ctx: decode(ctx, [8, 16, 24, 32, 40, 48, 56, 64]),
        threads=2,
        rounds=3,
        probe="copy",
        peers=("transformers",),
        preload=("transformers.models.gpt2.modeling_gpt2",),
    ),
    Claim(
        name="decoding-bandwidth",
        sentence="decoding a 124M model, as a share of the speed of its matrix products alone",
        figure=SHARE,
        target=Target(least=0.9),
        measure=bandwidth,
        threads=2,
        probe="copy",
    ),
)
