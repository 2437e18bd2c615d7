"""Decoding: the text of plain forwards, draws by the distribution, ends where they should be."""

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.data.tokenizer import StreamDecoder
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import UserError
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.sample import (
    Continuation,
    Sampling,
    choose,
    cut,
    lay_out_for_decoding,
    sample,
    window_start,
)

BYTES = train_tokenizer("byte", [])
CONTEXT = 24
GREEDY = Sampling(40, temperature=0)  # beyond the context: it slides

MODELS = {
    "llama": ModelConfig(layers=2, heads=4, kv_heads=2, width=32),
    "gpt2": ModelConfig(
        layers=2, heads=2, width=32, positions="learned", norm="layernorm", activation="silu"
    ),
    "post-norm": ModelConfig(
        layers=2,
        heads=2,
        width=32,
        positions="sinusoidal",
        norm="layernorm",
        norm_placement="post",
        activation="relu",
        bias=True,
    ),
    "no positions": ModelConfig(
        layers=2, heads=2, width=32, positions="none", qk_norm=True, tie_embeddings=False
    ),
}


def make(name: str) -> GPT:
    """A random model whose next token depends on all before it.

    With GPT-2's small initial weights it would repeat one token.
    """
    model = GPT(ModelSpec(MODELS[name], BYTES.vocab_size, CONTEXT)).eval()
    init_weights(model, 5)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 8
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return make("llama")


def run(
    model: GPT, prompts: list[list[int]], how: Sampling, seeds: list | None = None, **more
) -> list[Continuation]:
    *_, rows = sample(model, BYTES, prompts, how, seeds or list(range(len(prompts))), **more)
    return rows


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_greedy_is_the_argmax_of_a_plain_forward_also_beyond_the_context(name: str) -> None:
    model = make(name)
    for length in (1, 7, CONTEXT, CONTEXT + 30):
        text, expected = prompt_of(length), []
        (row,) = run(model, [text], GREEDY, stop_early=False)
        for _ in row.tokens:
            window = text[window_start(len(text), CONTEXT) :]
            expected.append(int(model(torch.tensor([window]))[0, -1].argmax()))
            text = [*text, expected[-1]]
        assert row.tokens == expected


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_a_batch_has_the_logits_and_the_text_it_has_alone(name: str) -> None:
    model = make(name)
    prompts = [prompt_of(length, seed=length) for length in (3, 20, 1, 60, 20)]
    for how in (
        GREEDY,
        Sampling(40, temperature=0.9, logprobs=True),
        Sampling(40, top_p=0.8, top_k=50),
    ):
        together = run(model, prompts, how)
        for n, prompt in enumerate(prompts):
            (alone,) = run(model, [prompt], how, [n])
            assert (together[n].tokens, together[n].text) == (alone.tokens, alone.text)
            assert together[n].logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    turned = run(model, prompts[::-1], how, list(range(len(prompts)))[::-1])
    assert [row.tokens for row in turned[::-1]] == [row.tokens for row in together]


@pytest.mark.parametrize("name", MODELS)
def test_rows_may_have_temperatures_of_their_own(name: str) -> None:
    model, prompts, each = make(name), [prompt_of(3), prompt_of(3), prompt_of(9)], (0.0, 0.8, 1.3)
    together = run(model, prompts, Sampling(40, each, top_k=50, repetition_penalty=1.1))
    for n, temperature in enumerate(each):
        (alone,) = run(
            model, [prompts[n]], Sampling(40, temperature, top_k=50, repetition_penalty=1.1), [n]
        )
        assert together[n].tokens == alone.tokens


def test_a_seed_repeats_and_another_differs(model: GPT) -> None:
    how, prompt = Sampling(30), prompt_of(5)
    rows = run(model, [prompt] * 4, how, [1, 2, "1", 1])
    assert rows[0].tokens == rows[3].tokens
    assert len({tuple(row.tokens) for row in rows}) == 3


@torch.no_grad()
def test_logprobs_are_the_models_own(model: GPT) -> None:
    how = Sampling(10, temperature=0.5, top_k=20, repetition_penalty=1.3, logprobs=True)
    (row,) = run(model, [prompt_of(4)], how)
    logp = model(torch.tensor([row.prompt + row.tokens]))[0].log_softmax(-1)
    expected = [float(logp[3 + n, token]) for n, token in enumerate(row.tokens)]
    assert row.logprobs == pytest.approx(expected, abs=1e-5)


def test_the_layout_for_decoding_changes_neither_shapes_nor_text(model: GPT) -> None:
    laid_out = make("llama")
    lay_out_for_decoding(laid_out)
    assert laid_out.embed.weight.stride() == (1, laid_out.embed.weight.shape[0])
    for plain, turned in zip(model.parameters(), laid_out.parameters(), strict=True):
        assert torch.equal(plain, turned)
    (row,) = run(laid_out, [prompt_of(5)], GREEDY)
    assert row.tokens == run(model, [prompt_of(5)], GREEDY)[0].tokens


@pytest.mark.slow
# torch's own, in what it imports to compile.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_makes_the_same_text(model: GPT) -> None:
    prompts, how = [prompt_of(3), prompt_of(9)], Sampling(CONTEXT, temperature=0)
    compiled = Sampling(CONTEXT, temperature=0, compile=True)
    expected = [row.tokens for row in run(model, prompts, how)]
    assert [row.tokens for row in run(model, prompts, compiled)] == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_train_compiled_is_left_alone(model: GPT) -> None:
    compiled, forwards = make("llama"), []
    compiled.compile(backend=lambda *_: pytest.fail("compiled for sampling"))
    compiled.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    (row,) = run(compiled, [prompt_of(3)], GREEDY)
    assert row.tokens == run(model, [prompt_of(3)], GREEDY)[0].tokens
    assert forwards


# --- the window


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 500))
def test_the_window_keeps_half_a_context_and_moves_seldom(seq_len: int, length: int) -> None:
    start, before = window_start(length, seq_len), window_start(length - 1, seq_len)
    assert seq_len // 2 <= length - start <= seq_len or start == 0
    assert start < length and start - before in (0, seq_len - seq_len // 2)


def test_a_text_longer_than_the_context_is_refused_if_asked(model: GPT) -> None:
    (row,) = run(model, [prompt_of(14)], Sampling(11, 0, slide=False), stop_early=False)
    assert len(row.tokens) == 11
    with pytest.raises(UserError) as error:
        run(model, [prompt_of(14), prompt_of(2)], Sampling(12, 0, slide=False))
    assert str(error.value) == (
        "a prompt of 14 tokens and 12 new ones do not fit the model's context of 24;"
        " nearest: 11 new tokens, or slide"
    )
    with pytest.raises(UserError, match="nearest: a prompt of 24 tokens, or slide"):
        run(model, [prompt_of(25)], Sampling(1, 0, slide=False))


def test_a_prompt_without_tokens_is_refused(model: GPT) -> None:
    with pytest.raises(
        UserError,
        match="a prompt without tokens cannot be continued; nearest: the end-of-text token",
    ):
        run(model, [[1], []], GREEDY)


# --- choosing


class Grid:
    """A random stream that gives n evenly spaced numbers."""

    def __init__(self, n: int):
        self.values = iter(range(2**31 // n, 2**32, 2**32 // n))

    def getrandbits(self, bits: int) -> int:
        assert bits == 32
        return next(self.values)


@pytest.mark.parametrize(
    "how", [Sampling(1), Sampling(1, 0.5), Sampling(1, 1.5, top_k=7), Sampling(1, top_p=0.6)]
)
def test_draws_follow_the_distribution(how: Sampling) -> None:
    n, logits_1V = 2**12, torch.randn(1, 20, generator=torch.Generator().manual_seed(1)) * 2
    grid, counts_V = Grid(n), torch.zeros(20)
    for _ in range(n):
        tokens_B, health_B = choose(logits_1V, how, [grid])
        counts_V[tokens_B] += 1
    expected_V = reference(logits_1V, how).softmax(-1)[0]
    assert torch.allclose(counts_V / n, expected_V.float(), atol=2 / n) and math.isfinite(health_B)
    assert not counts_V[expected_V == 0].any()


@pytest.mark.parametrize(("bits", "token"), [(0, 2), (2**32 - 1, 4)])
def test_the_extreme_draws_never_choose_what_was_cut(bits: int, token: int) -> None:
    stream = Grid(1)
    stream.values = iter([bits])
    logits_1V = torch.tensor([[-5.0, -5, 1, 3, 2, -5, -5]])
    assert choose(logits_1V, Sampling(1, top_k=3), [stream])[0].tolist() == [token]


def reference(logits_BV: Tensor, how: Sampling, ids_BT: Tensor | None = None) -> Tensor:
    """transformers' own processors, in its order."""
    from transformers import generation as hf  # slow

    if how.repetition_penalty != 1:
        logits_BV = hf.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)(ids_BT, logits_BV)
    steps = [hf.TemperatureLogitsWarper(float(how.temperature))]
    steps += [hf.TopKLogitsWarper(how.top_k)] if how.top_k else []
    steps += [hf.TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    steps += [hf.MinPLogitsWarper(how.min_p)] if how.min_p else []
    for step in steps:
        logits_BV = step(ids_BT, logits_BV)
    return logits_BV


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.1, 0.7, 1, 3]),
    top_k=st.sampled_from([0, 1, 5, 40, 99]),
    top_p=st.sampled_from([1e-9, 0.3, 0.95, 1]),
    min_p=st.sampled_from([0, 0.01, 0.3, 1]),
    tied=st.booleans(),
)
def test_cuts_are_those_of_transformers(seed, temperature, top_k, top_p, min_p, tied) -> None:
    logits_BV = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * 3
    if tied and top_p == 1:  # its top-p breaks a tie by the order of a sort, ours keeps both
        logits_BV = logits_BV.round()
    how = Sampling(1, temperature, top_k, top_p, min_p)
    expected = reference(logits_BV, how)
    ours = cut(logits_BV, how)
    assert torch.equal(ours.isfinite(), expected.isfinite())
    assert torch.allclose(ours.softmax(-1), expected.double().softmax(-1), atol=1e-6)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_repetition_penalty_is_that_of_transformers(model: GPT, penalty: float) -> None:
    how, prompt = Sampling(CONTEXT, temperature=0, repetition_penalty=penalty), prompt_of(4)
    (row,) = run(model, [prompt], how, stop_early=False)
    text = list(prompt)
    for token in row.tokens:
        window = torch.tensor([text[window_start(len(text), CONTEXT) :]])
        with torch.no_grad():
            logits_BV = model(window)[:, -1]
        alone = Sampling(1, repetition_penalty=penalty)
        assert token == reference(logits_BV, alone, torch.tensor([text])).argmax()
        text.append(token)


def test_an_extreme_temperature_is_greedy_rather_than_not_a_number(model: GPT) -> None:
    cold = run(model, [prompt_of(4)], Sampling(10, temperature=1e-308))
    assert cold[0].tokens == run(model, [prompt_of(4)], Sampling(10, temperature=0))[0].tokens


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    model = make("gpt2")
    model.positions.weight.data[6] = bad
    with pytest.raises(UserError) as error:
        run(model, [prompt_of(3), prompt_of(4)], Sampling(20, temperature))
    assert error.value.code == 66
    assert str(error.value) == (
        "the model's logits for new token 4 are not finite;"
        " rule: use an earlier checkpoint, or fp32 where another type overflows"
    )


# --- where a text ends


def test_end_of_text_ends_it_and_with_stop_early_the_work() -> None:
    model, forwards = make("gpt2"), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    first = run(model, [prompt_of(5)], GREEDY, stop_early=False)[0].tokens[3]
    weight = model.embed.weight.data
    weight[[first, BYTES.eot]] = weight[[BYTES.eot, first]]  # now it is end-of-text
    forwards.clear()
    (row,) = run(model, [prompt_of(5)], GREEDY)
    assert (row.finish_reason, row.tokens[-1], len(forwards)) == (
        "end_of_text",
        BYTES.eot,
        len(row.tokens),
    )
    assert BYTES.decode(row.tokens[:-1]) == row.text and len(row.tokens) < GREEDY.max_new_tokens
    forwards.clear()
    (same,) = run(model, [prompt_of(5)], GREEDY, stop_early=False)
    assert (same.tokens, same.text, len(forwards)) == (row.tokens, row.text, GREEDY.max_new_tokens)


def grow(
    text: str, stops: tuple[str, ...], tokens: list[int] | None = None
) -> list[tuple[str, str]]:
    """The states of a continuation whose tokens are the bytes of a text."""
    tokens = BYTES.encode(text) if tokens is None else tokens
    how = Sampling(len(tokens), stop=stops)
    row = Continuation([1], StreamDecoder(BYTES))
    states = []
    for token in tokens:
        if not row.finish_reason:
            row.add(token, BYTES.eot, how)
            states.append((row.text, row.finish_reason))
    return states


@pytest.mark.parametrize(
    ("text", "stops", "expected", "reason"),
    [
        ("one. two. three", (".",), "one", "stop"),
        ("abab abc", ("abc",), "abab ", "stop"),
        ("aab", ("aaab",), "aab", "length"),  # what was held back comes out at the end
        ("x\n\nUser: y", ("User:", "\n\nUser"), "x", "stop"),
        ("naïve 日本語 end", ("本",), "naïve 日", "stop"),
        ("plain", (), "plain", "length"),
        ("the end", ("end",), "the ", "stop"),  # also in the last token
        ("xab", ("b", "ab"), "x", "stop"),  # of two that end together the longer
    ],
)
def test_stop_texts(text: str, stops: tuple[str, ...], expected: str, reason: str) -> None:
    states = grow(text, stops)
    assert states[-1] == (expected, reason)
    assert all(later.startswith(earlier) for (earlier, _), (later, _) in pairwise(states))


@settings(deadline=None)
@given(st.text("abä", max_size=12), st.lists(st.text("abä", min_size=1, max_size=4), max_size=3))
def test_what_streams_never_holds_a_part_of_a_stop_text(text: str, stops: list[str]) -> None:
    *_, (final, reason) = grow(text + "$", tuple(stops))
    spans = [(text.index(stop), text.index(stop) + len(stop)) for stop in stops if stop in text]
    if not spans:
        assert (final, reason) == (text + "$", "length")
        return
    first_end = min(end for _, end in spans)
    start = min(start for start, end in spans if end == first_end)
    assert (final, reason) == (text[:start], "stop")


def test_text_is_whole_characters_and_end_of_text_releases_the_rest() -> None:
    states = grow("", ("€x",), [*BYTES.encode("é€"), BYTES.encode("é")[0], BYTES.eot])
    # Held until the end: € and half an é.
    assert [text for text, _ in states] == ["", "é", "é", "é", "é", "é", "é€\ufffd"]
    assert states[-1][1] == "end_of_text"
    assert grow("", (), [*BYTES.encode("é"), BYTES.encode("é")[0]])[-1] == ("é\ufffd", "length")
