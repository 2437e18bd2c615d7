"""Makes the data of all sections: `python -m benchmarks.gpu.data FOLDER`, without a network.

`text` is a prepared text to learn from: the standard library of this Python. `random` has random
tokens of GPT-2's vocabulary, because timings need shapes and not meaning.
"""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dist_lm.config import DataConfig
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.prepared.shard_file import write_shard
from dist_lm.data.prepared.writer import SavedState, write_manifest, write_state, write_tokenizer
from dist_lm.data.tokenizer import EOT, Tokenizer

VOCABULARY = 50_257
TOKENS = 40_000_000
DRY_VOCABULARY = 512
DRY_TOKENS = 50_000
PROCESSES = 4  # for the text; other work goes on beside it
WORDS = [
    "the",
    "a",
    "one",
    "cat",
    "dog",
    "bird",
    "tree",
    "house",
    "runs",
    "sleeps",
    "eats",
    "sees",
    "and",
    "or",
    "not",
    "over",
    "small",
    "big",
    "red",
]


def make_data(folder: Path, is_dry: bool) -> None:
    make_text(folder / "text", is_dry)
    make_random(folder / "random", is_dry)


def make_text(folder: Path, is_dry: bool) -> None:
    """A prepared text. A dry run makes a small one up."""
    config = DataConfig(input="stdlib", tokenizer="bpe:2048")
    if is_dry:
        file = folder.with_suffix(".txt")
        file.write_text(sentences(400), encoding="utf-8")
        config = DataConfig(input=str(file), tokenizer="byte", separator="\n")
    prepare_dataset(config, folder, 1 if is_dry else PROCESSES, say=lambda text: None)


def sentences(number: int) -> str:
    """Lines of a few words, always the same."""
    source = random.Random(1)
    lines = []
    for _ in range(number):
        lines.append(" ".join(source.choices(WORDS, k=source.randint(10, 30))))
    return "\n".join(lines)


def make_random(folder: Path, is_dry: bool) -> None:
    """A prepared folder of random tokens."""
    vocabulary = DRY_VOCABULARY if is_dry else VOCABULARY
    number = DRY_TOKENS if is_dry else TOKENS
    write_random(folder, vocabulary, number)


def write_random(folder: Path, vocabulary: int, number: int) -> None:
    """The same for any vocabulary and number of tokens."""
    folder.mkdir()
    tokenizer = tokenizer_of(vocabulary)
    write_tokenizer(folder, tokenizer)
    write_state(folder, SavedState(splits={}))
    generator = np.random.default_rng(1)
    splits: dict[str, Any] = {}
    for split, tokens in (("train", number), ("val", number // 10)):
        ids = generator.integers(vocabulary - 1, size=tokens).astype(tokenizer.dtype)
        shard = write_shard(folder / f"{split}-00000.safetensors", ids, [0], [0], [0])
        splits[split] = {
            "documents": 1,
            "bytes": tokens,
            "tokens": tokens,
            "unknown": 0,
            "shards": [shard],
        }
    no_files: Any = SimpleNamespace(files=[])
    write_manifest(folder, DataConfig(), tokenizer, no_files, splits, {})


def tokenizer_of(vocabulary: int) -> Tokenizer:
    """A tokenizer of as many made-up words."""
    words = {f"w{number}": number for number in range(vocabulary - 1)}
    words[EOT] = vocabulary - 1
    eot = {
        "id": vocabulary - 1,
        "content": EOT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [eot],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    return Tokenizer(json.dumps(content))


if __name__ == "__main__":
    make_data(Path(sys.argv[1]), is_dry=False)
