"""Tokens out of a model: batched decoding with a KV cache, for generate and for train's samples.

A continuation depends on the model, its prompt, the settings and its own seed, never on its batch
mates: every sequence has a random stream of its own, one number a token, and sees a window of the
text that is a function of the text's length alone. With `stop_early=False` the number of forwards
depends on lengths only, so that ranks which gather weights in each forward stay in step.

Shapes: B sequences, T tokens fed at once, V vocabulary, K candidates.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dist_lm.arithmetic import round_up
from dist_lm.data.tokenizer import StreamDecoder, Tokenizer
from dist_lm.errors import CheckpointError, UserError
from dist_lm.model.cache import KVCache
from dist_lm.model.gpt import GPT


@dataclass(frozen=True)
class Sampling:
    """The settings by which tokens are chosen, and when to end.

    top-k, top-p, min-p and the penalty mean what they do in transformers.
    """

    max_new_tokens: int
    # 0: the likeliest token. Several temperatures: one for each row.
    temperature: float | tuple[float, ...] = 1.0
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
    """A prompt and the text that continues it.

    `text` has only whole characters and never any part of a stop text.
    """

    prompt: list[int]
    decoder: StreamDecoder
    tokens: list[int] = field(default_factory=list)  # with the end-of-text token, if that ended it
    # Log-probabilities of the model itself, before temperature and cuts.
    logprobs: list[float] = field(default_factory=list)
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
            is_full = len(self.tokens) == settings.max_new_tokens
            self.finish_reason = "length" if is_full else ""
        if self.finish_reason:
            self.held += self.decoder.flush()
        stops_at = [self.held.index(stop) for stop in settings.stop if stop in self.held]
        if stops_at:
            self.held = self.held[: min(stops_at)]
            self.finish_reason = "stop"
        keep = 0
        if not self.finish_reason:
            keep = max((_overlap(self.held, stop) for stop in settings.stop), default=0)
        released = len(self.held) - keep
        self.text += self.held[:released]
        self.held = self.held[released:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, but is not the whole of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def window_start(length: int, seq_len: int) -> int:
    """The first token of the window over a text of `length` tokens.

    It moves on by half a context when it is full.
    """
    hop = seq_len - seq_len // 2
    return max(0, round_up(length - seq_len, hop))


def lay_out_for_decoding(model: GPT) -> None:
    """Store each matrix with its longer side contiguous.

    fp32 products with a vector then ran up to twice as fast. Shapes and values stay. This is for a
    process that only generates, on a CPU: an optimizer would not expect such strides.
    """
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[0] > parameter.shape[1]:
            parameter.data = parameter.data.t().contiguous().t()


# --- the loop


# Not inference_mode: weights that ZeRO-3 gathers in it cannot be trained with afterwards.
@torch.no_grad()
def sample(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    seeds: Sequence[int | str],
    stop_early: bool = True,
) -> Iterator[list[Continuation]]:
    """Continue all prompts as one batch; yields the same continuations after each new token."""
    assert len(prompts) == len(seeds), f"{len(prompts)} prompts, {len(seeds)} seeds"
    _check_lengths([len(prompt) for prompt in prompts], settings, model.seq_len)
    rows = [Continuation(list(prompt), StreamDecoder(tokenizer)) for prompt in prompts]
    streams = [random.Random(seed) for seed in seeds]
    texts = [list(prompt) for prompt in prompts]  # go on growing when their continuation has ended
    seen_BV = _seen(texts, model) if settings.repetition_penalty != 1 else None
    # Not what train's model.compile() made: that would compile again for each length.
    forward = model._call_impl
    decode = torch.compile(forward, dynamic=False) if settings.compile else forward
    starts: list[int] = []  # of the windows
    tokens_B = torch.empty(0)
    began = time.perf_counter()

    for tokens_left in range(settings.max_new_tokens, 0, -1):
        new_starts = [window_start(len(text), model.seq_len) for text in texts]
        if new_starts != starts:  # the first turn, or a window has moved on
            starts = new_starts
            windows = [text[start:] for text, start in zip(texts, starts, strict=True)]
            logits_BV, cache = _prefill(model, forward, windows, tokens_left, settings.compile)
        else:
            logits_BV = decode(tokens_B[:, None], cache=cache, last_only=True)[:, 0]

        tokens_B, health_B = choose(logits_BV, settings, streams, seen_BV)
        if seen_BV is not None:
            seen_BV.scatter_(-1, tokens_B[:, None], True)
        choices = _read_choices(tokens_B, health_B, logits_BV, settings)
        for row, text, choice in zip(rows, texts, choices, strict=True):
            text.append(choice.token)
            if not row.finish_reason:
                _extend(row, choice, tokenizer.eot, settings)
                row.seconds = time.perf_counter() - began
        yield rows
        if stop_early and all(row.finish_reason for row in rows):
            return


@dataclass(frozen=True)
class Choice:
    """The next token of a row."""

    token: int
    health: float  # finite only if the row's logits are
    logprobs: list[float]  # one number, or none where they are not asked for


def _read_choices(
    tokens_B: Tensor, health_B: Tensor, logits_BV: Tensor, settings: Sampling
) -> list[Choice]:
    """Bring what was chosen to the host, in one sync."""
    columns = [tokens_B.double(), health_B.double()]
    if settings.logprobs:
        logprobs_BV = logits_BV.log_softmax(-1)
        columns.append(logprobs_BV.gather(-1, tokens_B[:, None])[:, 0].double())
    choices = []
    for token, health, *logprobs in torch.stack(columns, -1).tolist():
        choices.append(Choice(int(token), health, logprobs))
    return choices


def _extend(row: Continuation, choice: Choice, eot: int | None, settings: Sampling) -> None:
    if not math.isfinite(choice.health):
        raise CheckpointError(
            f"the model's logits for new token {len(row.tokens) + 1} are not finite; rule: use an"
            " earlier checkpoint, or fp32 where another type overflows",
        )
    row.logprobs += choice.logprobs
    row.add(choice.token, eot, settings)


def _prefill(
    model: GPT,
    forward: Callable[..., Tensor],
    windows: list[list[int]],
    new_tokens: int,
    static: bool,
) -> tuple[Tensor, KVCache]:
    """A cache that holds the windows, padded on the left, and the logits after them."""
    device = model.embed.weight.device
    longest = max(len(window) for window in windows)
    pads = [longest - len(window) for window in windows]
    padded = [[0] * pad + window for pad, window in zip(pads, windows, strict=True)]
    tokens_BT = torch.tensor(padded, device=device)
    pad_B = torch.tensor(pads, device=device) if any(pads) else None
    capacity = model.seq_len
    if not static:
        capacity = min(model.seq_len, longest + new_tokens - 1)
    cache = model.new_cache(len(windows), capacity, pad_B, static)
    return forward(tokens_BT, cache=cache, last_only=True)[:, 0], cache


def _seen(texts: list[list[int]], model: GPT) -> Tensor:
    """A mask of the tokens that each text has."""
    seen_BV = torch.zeros(len(texts), model.vocab_size, dtype=torch.bool)
    for row_V, text in zip(seen_BV, texts, strict=True):
        row_V[text] = True
    return seen_BV.to(model.embed.weight.device)


def _check_lengths(lengths: list[int], settings: Sampling, seq_len: int) -> None:
    """Refuse a prompt that is empty, and one that may not slide and does not fit."""
    if min(lengths) == 0:
        raise UserError(
            "a prompt without tokens cannot be continued; nearest: the end-of-text token alone"
        )
    longest = max(lengths)
    room = seq_len + 1 - longest  # the last token is never fed
    if not settings.slide and settings.max_new_tokens > room:
        hint = f"{room} new tokens" if room > 0 else f"a prompt of {seq_len} tokens"
        raise UserError(
            f"a prompt of {longest} tokens and {settings.max_new_tokens} new ones do not fit the"
            f" model's context of {seq_len}; nearest: {hint}, or slide"
        )


# --- choosing


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
        return _choose_by_rows(logits_BV, settings, settings.temperature, streams)
    if settings.temperature == 0:
        best_B, tokens_B = logits_BV.max(-1)
        return tokens_B, best_B
    # Inverse of the cumulative distribution in the order of the vocabulary: rounding in another
    # batch can move a choice only where the draw falls on a boundary. Draws of 32 bits stay below
    # the sum in fp64.
    cumulative_BV = cut(logits_BV, settings).exp().cumsum(-1)
    sums_B1 = cumulative_BV[:, -1:]
    draws = [[stream.getrandbits(32) / 2**32] for stream in streams]
    draws_B1 = torch.tensor(draws, dtype=torch.float64).to(sums_B1.device)
    tokens_B1 = torch.searchsorted(cumulative_BV, draws_B1 * sums_B1, right=True)
    return tokens_B1[:, 0].clamp(max=logits_BV.shape[-1] - 1), sums_B1[:, 0]


def _choose_by_rows(
    logits_BV: Tensor,
    settings: Sampling,
    temperatures: tuple[float, ...],
    streams: Sequence[random.Random],
) -> tuple[Tensor, Tensor]:
    """The same where each row has a temperature of its own."""
    tokens = []
    healths = []
    rows = zip(torch.split(logits_BV, 1), temperatures, streams, strict=True)
    for logits_1V, temperature, stream in rows:
        of_row = replace(settings, temperature=temperature)
        token_1, health_1 = choose(logits_1V, of_row, [stream])
        tokens.append(token_1)
        healths.append(health_1.double())
    return torch.cat(tokens), torch.cat(healths)


def cut(logits_BV: Tensor, settings: Sampling) -> Tensor:
    """fp64 log-probabilities up to a constant (the largest is 0).

    They are -inf for what top-k, top-p and min-p leave out.
    """
    assert not isinstance(settings.temperature, tuple), (
        "rows of several temperatures are cut one by one"
    )
    scores_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).double() / settings.temperature
    floor: Tensor | float = math.log(settings.min_p) if settings.min_p else -math.inf
    V = scores_BV.shape[-1]
    k = settings.top_k or V
    if k < V or settings.top_p < 1:
        best_BK = _largest(scores_BV, k)
        kept_B1 = best_BK.new_full((len(best_BK), 1), k, dtype=torch.long)
        if settings.top_p < 1:
            probabilities_BK = best_BK.softmax(-1)
            before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
            kept_B1 = (before_BK < settings.top_p).sum(-1, keepdim=True)
        floor = best_BK.gather(-1, kept_B1.clamp(min=1) - 1).clamp(min=floor)
    return scores_BV.masked_fill(scores_BV < floor, -math.inf)


def _largest(scores_BV: Tensor, k: int) -> Tensor:
    """The k largest scores of each row, in descending order."""
    if k < scores_BV.shape[-1]:
        return scores_BV.topk(k).values
    return scores_BV.sort(descending=True).values
