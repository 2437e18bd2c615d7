"""tiktoken encodes exactly as `tokenizers` does, or is not used."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dist_lm.data.fast_bpe import SAMPLE, CannotExpress, make_engine
from dist_lm.data.tokenizer import BYTE_OF, EOT, Tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import DataError
from tests.data.test_tokenizer import CORPUS, KINDS, LLAMA3, TEXTS, tokenizer_of

# So that there are tokens across every border that an expression makes.
CONTRACTIONS = (
    "I'll he's I'd I'm they're we've can't it'S we'LL 12345 67 ...   ;;\n\n\t\t  if\n" * 30
)
FAST: dict[str, Tokenizer] = {}


def plain_llama3() -> Tokenizer:
    """Llama 3's tokenizer in small: its expression, and no normalizer."""
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = pre_tokenizers.Sequence([split, byte_level])
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = steps
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([*CORPUS, SAMPLE, CONTRACTIONS], trainer)
    return Tokenizer(tokenizer.to_str(), EOT)


def fast(kind: str) -> Tokenizer:
    """A tokenizer that tiktoken stands for."""
    if not FAST:
        FAST["byte"] = train_tokenizer("byte", [])
        FAST["bpe"] = train_tokenizer("bpe:700", [*CORPUS, SAMPLE, CONTRACTIONS])
        FAST["llama3"] = plain_llama3()
    assert FAST[kind].why_slow() == ""
    return FAST[kind]


@pytest.mark.parametrize("kind", ["byte", "bpe", "llama3"])
def test_ids_are_equal_on_every_text(kind: str) -> None:
    tokenizer = fast(kind)

    @settings(max_examples=300, deadline=None)
    @given(st.one_of(TEXTS, st.text(st.characters(codec="utf-8"), max_size=200)))
    def check(text: str) -> None:
        (ids,) = tokenizer.encode_arrays([text])
        assert ids.dtype == tokenizer.dtype
        assert ids.tolist() == tokenizer.encode(text)

    check()


@pytest.mark.parametrize("kind", ["bpe", "llama3"])
def test_ids_are_equal_on_real_text(kind: str) -> None:
    """Sources of the standard library, and words longer than those that tiktoken merges simply."""
    texts = [json.__doc__ or "", "ab" * 5000, " " * 5000, "x1" * 3000, "'s" * 2000, "世" * 3000]
    for module in ("argparse", "ast", "json.decoder", "typing"):
        path = sys.modules[module].__file__
        assert path
        with open(path, encoding="utf-8") as file:
            texts.append(file.read())
    tokenizer = fast(kind)
    arrays = tokenizer.encode_arrays(texts)
    assert [ids.tolist() for ids in arrays] == tokenizer.encode_batch(texts)


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["bpe", "llama3"])
def test_ids_are_equal_on_every_character(kind: str) -> None:
    """In words, numbers, signs and spaces. Minutes; run on 2026-11-27: none differs."""
    tokenizer = fast(kind)
    engine = make_engine(json.loads(tokenizer.stored), BYTE_OF)
    characters = [chr(n) for n in range(sys.maxunicode + 1) if not 0xD800 <= n < 0xE000]
    different = []
    for at in range(0, len(characters), 2000):
        few = characters[at : at + 2000]
        texts = [f"a{c}a 1{c}1 .{c}. {c} {c}{c}x'{c} \n{c}\n" for c in few]
        for character, text, ids in zip(few, texts, tokenizer.encode_batch(texts), strict=True):
            if engine.encode_ordinary(text) != ids:
                different.append(hex(ord(character)))
    assert different == []


@pytest.mark.parametrize("kind", KINDS)
def test_other_tokenizers_are_left_to_tokenizers(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    is_fast = kind in ("byte", "bpe:400")
    assert (tokenizer.why_slow() == "") == is_fast
    (ids,) = tokenizer.encode_arrays([CORPUS[0]])
    assert ids.tolist() == tokenizer.encode(CORPUS[0])


def swap_two_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[5], merges[20] = merges[20], merges[5]


def add_a_token_that_no_merge_makes(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["qzqz"] = len(content["model"]["vocab"])


def merge_another_pair(content: dict[str, Any]) -> None:
    """The token of a merge is made of two that its own text never becomes."""
    vocabulary = content["model"]["vocab"]
    vocabulary["abcd"] = len(vocabulary) + 2
    vocabulary["abc"] = len(vocabulary)
    vocabulary["bcd"] = len(vocabulary)
    content["model"]["merges"] += [["b", "c"], ["bc", "d"], ["a", "bcd"]]


def drop_a_byte(content: dict[str, Any]) -> None:
    del content["model"]["vocab"]["Ń"]


def split_otherwise(content: dict[str, Any]) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = [split | {"invert": False}, byte_level]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_two_merges, "not numbered in the order of their merges"),
        (add_a_token_that_no_merge_makes, "its text 'qzqz' does not become that token"),
        (merge_another_pair, "order of their merges|does not become that token"),
        (drop_a_byte, "no token for some byte"),
        (split_otherwise, "splits by another expression"),
    ],
)
def test_what_cannot_be_proven_is_refused(
    change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    content = json.loads(fast("bpe").stored)
    change(content)
    with pytest.raises(CannotExpress, match=reason):
        make_engine(content, BYTE_OF)


def test_a_lone_surrogate_is_refused_by_both() -> None:
    for kind in ("byte", "llama3"):
        with pytest.raises(DataError, match="character 1 of the text is a lone surrogate"):
            fast(kind).encode_arrays(["a\ud800"])
    with pytest.raises(DataError, match="character 1 of the text is a lone surrogate"):
        tokenizer_of("llama3").encode_arrays(["a\ud800"])
