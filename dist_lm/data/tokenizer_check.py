"""Refuses a tokenizer.json that would end the process or fill its memory.

The library behind it (`tokenizers`, in Rust) believes what the file says. Most of what is wrong it
reports. Sizes it takes on trust: it then asks for memory that is not there, and the process ends
without a word. These sizes are looked at here.
"""

import base64
import binascii
from collections.abc import Iterator
from typing import Any

MOST_STEPS = 64  # of normalizing, cutting and decoding; real ones have less than 10
MOST_GROWTH = 64  # times that all replacements together may lengthen a text
LARGEST_ID = 2**24 - 1  # of a token; some arrays have a place for each id
LARGEST_MAP = 2**24  # bytes of a precompiled map of characters; those of sentencepiece have 2**18
_SIZE_BYTES = 4  # in front of such a map's trie


def refuse_excess(content: dict[str, Any]) -> None:
    """Raise ValueError over a part of a tokenizer.json that is out of all proportion."""
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        steps = list(_steps(content.get(name)))
        if len(steps) > MOST_STEPS:
            raise ValueError(f"{name}: {len(steps)} steps; rule: at most {MOST_STEPS}")
        growth = 1.0
        for step in steps:
            if step.get("type") == "Precompiled":
                _refuse_false_map(step.get("precompiled_charsmap"))
            growth *= _growth(step)
        if growth > MOST_GROWTH:
            raise ValueError(
                f"{name}: its replacements make a text {growth:.3g} times as long; rule: at most"
                f" {MOST_GROWTH} times"
            )
    for identifier in _ids(content):
        if not 0 <= identifier <= LARGEST_ID:
            raise ValueError(f"id {identifier} of a token; rule: 0 to {LARGEST_ID}")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """All objects of a part that have a type, at any depth."""
    waiting = [part]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "type" in value:
                yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _growth(step: dict[str, Any]) -> float:
    """The factor by which a step may lengthen a text."""
    added = step.get("content") or step.get("prepend") or ""
    if step.get("type") not in ("Replace", "Prepend") or not isinstance(added, str):
        return 1.0
    pattern = step.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    # A regular expression may match a single character, or none. Prepend has no pattern; the text
    # may be a single character too.
    shortest = len(replaced) if isinstance(replaced, str) and replaced else 1
    return max(1.0, len(added) / shortest)


def _refuse_false_map(charsmap: Any) -> None:
    """Refuse a map of characters that claims a trie larger than the map itself."""
    if not isinstance(charsmap, str):
        return  # the library says what is wrong
    if len(charsmap) > LARGEST_MAP:
        raise ValueError(f"precompiled_charsmap: {len(charsmap)} bytes; at most {LARGEST_MAP}")
    try:
        data = base64.b64decode(charsmap, validate=True)
    except binascii.Error as error:
        raise ValueError(f"precompiled_charsmap: no base64 ({error})") from error
    size = int.from_bytes(data[:_SIZE_BYTES], "little")
    if len(data) < _SIZE_BYTES or size % 4 or size > len(data) - _SIZE_BYTES:
        raise ValueError(
            f"precompiled_charsmap: a trie of {size} bytes in {len(data)}; rule: it fits"
        )


def _ids(content: dict[str, Any]) -> Iterator[int]:
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        for identifier in vocabulary.values():
            if isinstance(identifier, int):
                yield identifier
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            yield token["id"]
