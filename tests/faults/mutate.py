"""Damages bytes, JSON and texts, by a seed."""

import copy
import json
import random
from typing import Any

NASTY: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    10**12,
    10**30,
    -(2**63),
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../etc/passwd",
    "a\0b",
    "\x1b[31mred",
    "é" * 300,
    "9" * 5000,
    [],
    {},
    [1],
    [[]],
    {"a": {"b": 1}},
    ["x"] * 50,
]
# JSON that no json.dumps writes.
RAW = ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, '{"a": 1, "a": 2}', "NaN", "\x00", "", "[1,]"]


class Gentle(random.Random):
    """Damages nothing, so that a test sees undamaged input accepted."""

    def random(self) -> float:
        return 0.99


def nasty_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes are flipped, cut off, doubled or replaced."""
    if isinstance(rng, Gentle):
        return data
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(changed) + 1)
        size = rng.choice([1, 1, 2, 8, 100])
        match rng.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + size]
            case 3:
                changed[at:at] = changed[at : at + size]
            case _:
                changed[at : at + size] = rng.randbytes(size)
    return bytes(changed)


def nasty_json(rng: random.Random, content: Any) -> bytes:
    """A value is replaced, a key is lost, renamed or added; now and then the text is damaged."""
    if isinstance(rng, Gentle):
        return json.dumps(content).encode()
    kind = rng.random()
    if kind < 0.02:
        return rng.choice(RAW).encode()
    changed = json.loads(json.dumps(content))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        changed = _change_one(rng, changed)
    text = json.dumps(changed)
    if kind < 0.05:
        text = text.replace("1", rng.choice(RAW), 1)
    data = text.encode()
    return nasty_bytes(rng, data) if kind > 0.85 else data


def _change_one(rng: random.Random, content: Any) -> Any:
    """Change one place, found by walking down at random."""
    if not isinstance(content, dict | list) or not content or rng.random() < 0.1:
        return copy.deepcopy(rng.choice(NASTY))
    key: Any = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
    match rng.randrange(8):
        case 0:
            del content[key]
        case 1 if isinstance(content, dict):
            content[rng.choice(["extra", "../x", "", key + " "])] = content[key]
        case 2:
            content[key] = copy.deepcopy(rng.choice(NASTY))
        case 3 if type(content[key]) in (int, float):
            content[key] *= rng.choice([-1, 0, 2, 1e9, 0.5])
        case _:
            content[key] = _change_one(rng, content[key])
    return content


WORDS = [
    "null",
    "true",
    "*a",
    "&a [*a]",
    "!!python/object/apply:os.system [id]",
    "!!int x",
    "!!binary x",
    "2024-13-45",
    "0x_",
    "1_000",
    "1e400",
    ".nan",
    "=",
    "<<",
    "? [1]",
    "- - -",
    "{a: {b: c}}",
    "[" * 50,
    "9" * 400,
    "\t",
    "'",
    '"\\x',
    "%YAML 9.9",
    "--",
    "é\u202e",
    "\x1b]0;x\x07",
]


def nasty_text(rng: random.Random, text: str) -> str:
    """Words that parsers stumble over are put in, and characters lost."""
    if isinstance(rng, Gentle):
        return text
    changed = text
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(changed) + 1)
        gone = rng.choice([0, 0, 1, 5])
        changed = changed[:at] + rng.choice(WORDS) + changed[at + gone :]
    return changed
