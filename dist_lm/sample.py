"""Tokens out of a model: batched decoding with a KV cache, for generate and for train's samples.

A continuation depends on the model, its prompt, the settings and its own seed, never on its batch mates: every
sequence has a random stream of its own, one number a token, and sees a window of the text that is a function of the
text's length alone. With `stop_early=False` the number of forwards depends on lengths only, so that ranks which gather
weights in each forward stay in step.

Shapes: B sequences, T tokens fed at once, V vocabulary.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dist_lm.data.tokenizer import StreamDecoder, Tokenizer
from dist_lm.errors import CheckpointError, UserError
from dist_lm.model.gpt import GPT, KVCache


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to end; top-k, top-p, min-p and the penalty mean what they do in transformers."""

    max_new_tokens: int
    temperature: float | tuple[float, ...] = (
        1.0  # 0: the likeliest token; several: one for each row
    )
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    slide: bool = True  # over the last part of a text that outgrows the context; or else refuse it
    logprobs: bool = False
    compile: bool = False  # the forward of one token, over a cache of fixed shape


@dataclass
class Continuation:
    """What a prompt has grown into. `text` has only whole characters and never any part of a stop text."""

    prompt: list[int]
    decoder: StreamDecoder
    tokens: list[int] = field(default_factory=list)  # with the end-of-text token, if that ended it
    logprobs: list[float] = field(
        default_factory=list
    )  # of the model itself, before temperature and cuts
    text: str = ""
    held: str = ""  # may turn out to begin a stop text
    finish_reason: str = ""  # "length", "stop" or "end_of_text", once finished
    seconds: float = 0.0

    def add(self, token: int, eot: int | None, settings: Sampling) -> None:
        """Take a token in, and move on to `text` what can no longer be part of a stop text."""
        self.tokens.append(token)
        if token == eot:
            self.finish_reason = "end_of_text"
        else:
            self.held += self.decoder.push(token)
            self.finish_reason = "length" if len(self.tokens) == settings.max_new_tokens else ""
        if self.finish_reason:
            self.held += self.decoder.flush()
        found = [self.held.index(stop) for stop in settings.stop if stop in self.held]
        if found:
            self.held, self.finish_reason = self.held[: min(found)], "stop"
        keep = (
            0
            if self.finish_reason
            else max((_overlap(self.held, stop) for stop in settings.stop), default=0)
        )
        released = len(self.held) - keep
        self.text, self.held = self.text + self.held[:released], self.held[released:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )


def window_start(length: int, seq_len: int) -> int:
    """Where the window over a text of `length` tokens begins: it moves on by half a context when it is full."""
    hop = seq_len - seq_len // 2
    return max(0, -(-(length - seq_len) // hop)) * hop


def lay_out_for_decoding(model: GPT) -> None:
    """Store each matrix with its longer side contiguous: fp32 products with a vector then ran up to twice as fast.

    Shapes and values stay. For a process that only generates, on a CPU: an optimizer would not expect such strides.
    """
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[0] > parameter.shape[1]:
            parameter.data = parameter.data.t().contiguous().t()


@torch.inference_mode()
def sample(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    seeds: Sequence[int | str],
    stop_early: bool = True,
) -> Iterator[list[Continuation]]:
    """Continue all prompts as one batch; yields the same growing continuations after each new token."""
    assert len(prompts) == len(seeds), f"{len(prompts)} prompts, {len(seeds)} seeds"
    _check_lengths([len(prompt) for prompt in prompts], settings, model.seq_len)
    rows = [Continuation(list(prompt), StreamDecoder(tokenizer)) for prompt in prompts]
    streams = [random.Random(seed) for seed in seeds]
    texts = [list(prompt) for prompt in prompts]  # go on growing when their continuation has ended
    seen_BV = _seen(texts, model) if settings.repetition_penalty != 1 else None
    # Not what train's model.compile() made: it would compile anew for each length.
    forward = model._call_impl
    decode = torch.compile(forward, dynamic=False) if settings.compile else forward
    starts: list[int] = []
    tokens_B = torch.empty(0)
    begin = time.perf_counter()
    for left in range(settings.max_new_tokens, 0, -1):
        moved = [window_start(len(text), model.seq_len) for text in texts]
        if moved != starts:  # the first turn, or a window has moved on
            starts = moved
            windows = [text[start:] for text, start in zip(texts, starts, strict=True)]
            logits_BV, cache = _prefill(model, forward, windows, left, settings.compile)
        else:
            logits_BV = decode(tokens_B[:, None], cache=cache, last_only=True)[:, 0]
        tokens_B, health_B = choose(logits_BV, settings, streams, seen_BV)
        facts = [tokens_B.double(), health_B.double()]
        if settings.logprobs:
            facts.append(logits_BV.log_softmax(-1).gather(-1, tokens_B[:, None])[:, 0].double())
        if seen_BV is not None:
            seen_BV.scatter_(-1, tokens_B[:, None], True)
        for row, text, token, health, *logprob in zip(
            rows, texts, *torch.stack(facts).tolist(), strict=True
        ):
            text.append(int(token))
            if row.finish_reason:
                continue
            if not math.isfinite(health):
                raise CheckpointError(
                    f"the model's logits for new token {len(row.tokens) + 1} are not finite; rule: use an earlier"
                    " checkpoint, or fp32 where another type overflows",
                )
            row.logprobs += logprob
            row.add(int(token), tokenizer.eot, settings)
            row.seconds = time.perf_counter() - begin
        yield rows
        if stop_early and all(row.finish_reason for row in rows):
            return


def choose(
    logits_BV: Tensor,
    settings: Sampling,
    streams: Sequence[random.Random],
    seen_BV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next tokens, and a number for each row that is finite only if its logits are."""
    if seen_BV is not None:
        penalty = settings.repetition_penalty
        penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = torch.where(seen_BV, penalised_BV, logits_BV)
    if isinstance(settings.temperature, tuple):
        rows = zip(torch.split(logits_BV, 1), settings.temperature, streams, strict=True)
        chosen = [
            choose(row, replace(settings, temperature=temperature), [own])
            for row, temperature, own in rows
        ]
        return torch.cat([token for token, _ in chosen]), torch.cat(
            [health.double() for _, health in chosen]
        )
    if settings.temperature == 0:
        best_B, tokens_B = logits_BV.max(-1)
        return tokens_B, best_B
    # Inverse of the cumulative distribution in the order of the vocabulary: rounding in another batch can move a
    # choice only where the draw falls on a boundary. Draws of 32 bits stay below the sum in fp64.
    cumulative_BV = cut(logits_BV, settings).exp().cumsum(-1)
    draws_B1 = torch.tensor(
        [[stream.getrandbits(32) / 2**32] for stream in streams], dtype=torch.float64
    )
    sums_B1 = cumulative_BV[:, -1:]
    tokens_B1 = torch.searchsorted(cumulative_BV, draws_B1.to(sums_B1.device) * sums_B1, right=True)
    return tokens_B1[:, 0].clamp(max=logits_BV.shape[-1] - 1), sums_B1[:, 0]


def cut(logits_BV: Tensor, settings: Sampling) -> Tensor:
    """fp64 log-probabilities up to a constant (the largest is 0), -inf for what top-k, top-p and min-p leave out."""
    assert not isinstance(settings.temperature, tuple), (
        "rows of several temperatures are cut one by one"
    )
    scores_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).double() / settings.temperature
    floor: Tensor | float = math.log(settings.min_p) if settings.min_p else -math.inf
    V = scores_BV.shape[-1]
    k = settings.top_k or V
    if k < V or settings.top_p < 1:
        best_BK = scores_BV.topk(k).values if k < V else scores_BV.sort(descending=True).values
        kept_B1 = best_BK.new_full((len(best_BK), 1), k, dtype=torch.long)
        if settings.top_p < 1:
            probabilities_BK = best_BK.softmax(-1)
            before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
            kept_B1 = (before_BK < settings.top_p).sum(-1, keepdim=True)
        floor = best_BK.gather(-1, kept_B1.clamp(min=1) - 1).clamp(min=floor)
    return scores_BV.masked_fill(scores_BV < floor, -math.inf)


def _prefill(
    model: GPT,
    forward: Callable[..., Tensor],
    windows: list[list[int]],
    new_tokens: int,
    static: bool,
) -> tuple[Tensor, KVCache]:
    """A cache that holds the windows, shorter ones padded on the left, and the logits after them."""
    longest, device = max(map(len, windows)), model.embed.weight.device
    tokens_BT = torch.tensor(
        [[0] * (longest - len(window)) + window for window in windows], device=device
    )
    pads = [longest - len(window) for window in windows]
    pad_B = torch.tensor(pads, device=device) if any(pads) else None
    capacity = model.seq_len if static else min(model.seq_len, longest + new_tokens - 1)
    cache = KVCache(model, len(windows), capacity, pad_B, static)
    return forward(tokens_BT, cache=cache, last_only=True)[:, 0], cache


def _seen(texts: list[list[int]], model: GPT) -> Tensor:
    seen_BV = torch.zeros(len(texts), model.vocab_size, dtype=torch.bool)
    for row_V, text in zip(seen_BV, texts, strict=True):
        row_V[text] = True
    return seen_BV.to(model.embed.weight.device)


def _check_lengths(lengths: list[int], settings: Sampling, seq_len: int) -> None:
    if min(lengths) == 0:
        raise UserError(
            "a prompt without tokens cannot be continued; nearest: the end-of-text token alone"
        )
    longest, room = max(lengths), seq_len + 1 - max(lengths)
    if not settings.slide and settings.max_new_tokens > room:
        hint = f"{room} new tokens" if room > 0 else f"a prompt of {seq_len} tokens"
        raise UserError(
            f"a prompt of {longest} tokens and {settings.max_new_tokens} new ones do not fit the model's context of"
            f" {seq_len}; nearest: {hint}, or slide"
        )
