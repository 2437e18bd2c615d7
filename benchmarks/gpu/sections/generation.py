"""C9: generate gives the tokens of transformers, and no token costs more than the others."""

import statistics
import time

import torch

from benchmarks.gpu.context import Context, Skip
from benchmarks.gpu.drive import DRY_SHAPE, SHAPES, config_of, gpt2_settings
from benchmarks.models import write_folder
from dist_lm.config import ModelSpec
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.sample import Sampling, sample

PROMPT = 20  # tokens
FIRST_LEFT_OUT = 4  # tokens; the very first ones load kernels


def generate(ctx: Context) -> None:
    try:
        from transformers import AutoModelForCausalLM  # optional
    except ImportError:
        raise Skip("transformers is missing") from None
    new_tokens = 12 if ctx.is_dry else 128
    model = decoder(ctx, "124m")
    prompt = random_prompt(model.vocab_size)
    first = Timed(model, prompt, new_tokens)
    second = Timed(model, prompt, new_tokens)

    write_folder(ctx.folder, model)
    peer = AutoModelForCausalLM.from_pretrained(ctx.folder).to(ctx.device).eval()
    prompt_BT = torch.tensor([prompt], device=ctx.device)
    made_BT = peer.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
    )
    theirs = made_BT[0, len(prompt) :].tolist()
    same = sum(a == b for a, b in zip(first.tokens, theirs, strict=True))
    ctx.require("tokens of transformers, fp32", first.tokens == theirs, f"{same} of {new_tokens}")
    ctx.require("the same again", first.tokens == second.tokens)
    ctx.measure("a token, first text", first.milliseconds, "ms")
    ctx.measure("a token, second text", second.milliseconds, "ms")
    if not ctx.is_dry:  # a CPU that does other things is not so regular
        # A kernel's plan for each new length would make the first text slow.
        slower = first.milliseconds / second.milliseconds
        ctx.check("first text, time over the second's", slower, 2.0)


class Timed:
    """A greedy continuation, and the time of each token."""

    def __init__(self, model: GPT, prompt: list[int], new_tokens: int):
        tokenizer = train_tokenizer("byte", [])
        settings = Sampling(new_tokens, temperature=0)
        seconds = []
        began = time.perf_counter()
        turns = sample(model, tokenizer, [prompt], settings, seeds=[0], stop_early=False)
        for (made,) in turns:
            now = time.perf_counter()  # reading the token waited for the card
            seconds.append(now - began)
            began = now
            self.tokens = list(made.tokens)
        self.milliseconds = 1000 * statistics.mean(seconds[FIRST_LEFT_OUT:])


def decoder(ctx: Context, size: str, dtype: torch.dtype = torch.float32) -> GPT:
    """A GPT-2 with random weights, for generating."""
    layers, heads, width = DRY_SHAPE if ctx.is_dry else SHAPES[size]
    config = config_of(gpt2_settings(ctx, size)).model
    config = config.model_copy(update={"layers": layers, "heads": heads, "width": width})
    vocabulary = 512 if ctx.is_dry else 50_257
    spec = ModelSpec(config, vocabulary, seq_len=64 if ctx.is_dry else 1024)
    model = GPT(spec)
    init_weights(model, seed=1)
    return model.to(ctx.device, dtype).eval()


def random_prompt(vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    prompt: list[int] = torch.randint(vocabulary, (PROMPT,), generator=generator).tolist()
    return prompt
