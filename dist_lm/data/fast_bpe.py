"""Encode byte-level BPE with tiktoken, where its ids are those of `tokenizers`.

tiktoken is several times faster than `tokenizers` and lets other threads work meanwhile. A
tokenizer.json stays what is saved and loaded. This file only asks whether tiktoken can do the same,
and proves it:

- Splitting. Both split a text by a regular expression, and only expressions from a short list are
  taken. A campaign compared both over every character of Unicode.
- Merging. `tokenizers` merges listed pairs, (a, bc) say, and tiktoken merges any two neighbours
  whose text is a token, (ab, c) too. Both take the earliest token first, the leftmost of equals. If
  `tokenizers` makes of the text of every token that one token, then no neighbours but the listed
  pair ever make it: tokens are never split, so two neighbours with the text "abc" are also what is
  left when "abc" alone is merged up to there, and that has one outcome before the last merge. This
  is tried on every token when the engine is made, in about 5 us a token.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import models

# The expression of GPT-2 (Radford et al. 2019, encoder.py), which `tokenizers` names ByteLevel.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# That of Llama 3.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# They match every character of a text, so that nothing is lost between the matches.
_EXPRESSIONS = (_GPT2, _LLAMA3)

# Where splitters differ, if they do: runs of white space, digits, apostrophes, scripts, marks,
# emoji, control characters, what looks like a special token.
SAMPLE = (
    "Hello world, it's  the 21st\n\n  century;\t\r\n we'LL've 1234567 rea\u017fons!!! '\u017f "
    "<|endoftext|> foo_bar = {'a': [1, 2.5e-3]}\r\n\r\n   \u3000x\u00a0\u2003y\u2028z\u0085 "
    "Ünïcödé 世界。你好 e\u0301 \u0627\u0644\u0639 हिन्दी ไทย ½ Ⅷ ² ١٢٣ "
    "🙂🙃👩\u200d👩\u200d👧 \x00\x1b\x7f\ufeff\ufffd İ ß ﬁ  "
)


class CannotExpress(Exception):
    """tiktoken cannot stand for a tokenizer; the text says why."""


def make_engine(content: Mapping[str, Any], byte_of: Mapping[str, int]) -> Any:
    """A tiktoken.Encoding with the ids of a tokenizer.json, or CannotExpress.

    `byte_of` gives the byte that each character of a token stands for.
    """
    try:
        import tiktoken  # a tenth of a second, and small texts do without
    except ImportError:
        raise CannotExpress("tiktoken is not installed") from None
    expression = _expression(content)
    ranks = _ranks(content, byte_of)
    _prove_merges(content, ranks, byte_of)
    return tiktoken.Encoding(
        "of tokenizer.json", pat_str=expression, mergeable_ranks=ranks, special_tokens={}
    )


def _expression(content: Mapping[str, Any]) -> str:
    """The regular expression by which the tokenizer splits a text."""
    if content["normalizer"] is not None:
        raise CannotExpress("it has a normalizer")
    if not all(token["special"] for token in content["added_tokens"]):
        raise CannotExpress("it has added tokens that are text")
    steps = [content["pre_tokenizer"]]
    if steps[0] is not None and steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    last = steps[-1]
    if last is None or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise CannotExpress("its pre-tokenizer is not byte-level")
    if len(steps) == 1 and last.get("use_regex", True):
        return _GPT2
    if len(steps) == 2 and not last.get("use_regex", True):
        split = steps[0]
        is_plain = split["type"] == "Split" and not split["invert"]
        if is_plain and split["behavior"] == "Isolated":
            expression = split["pattern"].get("Regex")
            if expression in _EXPRESSIONS:
                return str(expression)
    raise CannotExpress("its pre-tokenizer splits by another expression than GPT-2's or Llama 3's")


def _ranks(content: Mapping[str, Any], byte_of: Mapping[str, int]) -> dict[bytes, int]:
    """The id of each token that stands for text, by its bytes."""
    model = content["model"]
    if model["type"] != "BPE":
        raise CannotExpress(f"its model is {model['type']}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise CannotExpress(f"its model has {option}")
    special = {token["content"] for token in content["added_tokens"]}
    ranks = {}
    for token, number in model["vocab"].items():
        if token in special:
            continue
        if not all(character in byte_of for character in token):
            raise CannotExpress(f"its token {token!r} is not byte-level")
        ranks[bytes(byte_of[character] for character in token)] = number
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise CannotExpress("it has no token for some byte")
    return ranks


def _prove_merges(
    content: Mapping[str, Any], ranks: Mapping[bytes, int], byte_of: Mapping[str, int]
) -> None:
    """Tokens are numbered in the order of their merges, and each is what its own text becomes."""
    vocabulary = content["model"]["vocab"]
    merges = []
    newest = -1
    for merge in content["model"]["merges"]:
        if isinstance(merge, str):  # as older versions of tokenizers write it
            merge = merge.split(" ")
        left, right = merge
        number = vocabulary.get(left + right, -1)
        if number <= newest:
            raise CannotExpress("its tokens are not numbered in the order of their merges")
        newest = number
        merges.append((left, right))
    model = models.BPE(vocab=dict(vocabulary), merges=merges)
    for token, number in vocabulary.items():
        if bytes(byte_of.get(character, 0) for character in token) not in ranks:
            continue  # a special token
        parts = model.tokenize(token)
        if len(parts) != 1 or parts[0].id != number:
            raise CannotExpress(f"its text {token!r} does not become that token")
