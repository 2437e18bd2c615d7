"""S4: one text at a time in bf16: tokens a second, and the share of the memory's bandwidth.

Each token reads all weights once, so the bandwidth of the card's memory is the limit.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.sections.generation import decoder, random_prompt
from benchmarks.gpu.timing import seconds_of
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.model.gpt import GPT
from dist_lm.sample import Sampling, sample

WARM_UP = 3  # tokens before a graph is captured
SECONDS_TO_COMPILE = 15.0


def small(ctx: Context) -> None:
    decode(ctx, "124m", target=None)


def large(ctx: Context) -> None:
    decode(ctx, "1558m", target=0.5)


@torch.no_grad()
def decode(ctx: Context, size: str, target: float | None) -> None:
    new_tokens = 8 if ctx.is_dry else 128
    model = decoder(ctx, size, torch.bfloat16)
    weights = sum(2.0 * parameter.numel() for parameter in model.parameters())
    bandwidth = read_bandwidth(ctx)
    ctx.measure("bandwidth of the memory, measured", bandwidth / 1e9, "GB/s")

    def report(name: str, rate: float) -> None:
        ctx.measure(f"{size}, {name}", rate, "tokens/s")
        share = rate * weights / bandwidth
        at_least = target if name == "graph" else None
        ctx.measure(f"{size}, {name}, share of the bandwidth", share, at_least=at_least)

    report("eager", sampling_rate(ctx, model, new_tokens, is_compiled=False))
    report("graph", graph_rate(ctx, model, model, new_tokens))
    if ctx.is_dry or ctx.seconds_left > SECONDS_TO_COMPILE:
        forward = torch.compile(model._call_impl, backend=ctx.compile_backend, dynamic=False)
        report("compiled, graph", graph_rate(ctx, model, forward, new_tokens))
    if not ctx.is_dry and ctx.seconds_left > SECONDS_TO_COMPILE:
        report("compiled", sampling_rate(ctx, model, new_tokens, is_compiled=True))
    if ctx.is_dry or ctx.seconds_left > SECONDS_TO_COMPILE:
        try:
            report("transformers, static cache", transformers_rate(ctx, model, new_tokens))
        except Exception as error:  # what a peer cannot do must not hide our figures
            ctx.measure("transformers, static cache", f"{type(error).__name__}: {error}"[:80])


def read_bandwidth(ctx: Context) -> float:
    """Bytes a second that the card reads: a copy reads and writes."""
    size = 2**20 if ctx.is_dry else 2**31
    a = torch.zeros(size, dtype=torch.uint8, device=ctx.device)
    b = torch.empty_like(a)

    def copy() -> None:
        b.copy_(a)

    copy()
    return 2 * size / seconds_of(ctx, copy, 10)


def sampling_rate(ctx: Context, model: GPT, new_tokens: int, is_compiled: bool) -> float:
    """Tokens a second of the real sampler, after a text to warm up."""
    tokenizer = train_tokenizer("byte", [])
    settings = Sampling(new_tokens, temperature=0, compile=is_compiled)
    prompts = [random_prompt(model.vocab_size)]
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for _ in sample(model, tokenizer, prompts, settings, seeds=[0], stop_early=False):
            pass
        seconds = time.perf_counter() - began
    return new_tokens / seconds


def graph_rate(ctx: Context, model: GPT, forward: Callable[..., Tensor], new_tokens: int) -> float:
    """Tokens a second when a step is recorded once and played again. A CPU runs the step itself."""
    cache = model.new_cache(1, model.seq_len, None, static=True)
    token_BT = torch.zeros(1, 1, dtype=torch.long, device=ctx.device)

    def step() -> None:
        logits_BV = forward(token_BT, cache=cache, last_only=True)[:, 0]
        token_BT.copy_(logits_BV.argmax(-1, keepdim=True))

    if ctx.is_dry:
        step()
        return 1 / seconds_of(ctx, step, new_tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return 1 / seconds_of(ctx, graph.replay, new_tokens)


def transformers_rate(ctx: Context, model: GPT, new_tokens: int) -> float:
    """Tokens a second of transformers with its static cache, which it compiles by itself."""
    from transformers import GPT2Config, GPT2LMHeadModel  # optional

    config = model.config
    peer = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.seq_len,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
        )
    )
    peer = peer.to(ctx.device, torch.bfloat16).eval()
    prompt_BT = torch.tensor([random_prompt(model.vocab_size)], device=ctx.device)
    more = {}
    if not ctx.is_dry:
        more["cache_implementation"] = "static"
    seconds = 0.0
    for _ in range(2):
        ctx.sync()
        began = time.perf_counter()
        peer.generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            **more,
        )
        ctx.sync()
        seconds = time.perf_counter() - began
    return new_tokens / seconds
