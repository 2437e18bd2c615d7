"""What a config amounts to before anything is read or built: vocabulary, steps, bytes of a checkpoint."""

import math
from functools import lru_cache
from pathlib import Path

from dist_lm.config import Config, total_steps
from dist_lm.data.prepared.manifest import find_prepared, read_manifest
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import UserError
from dist_lm.model import hf
from dist_lm.optim import moments

HUB_VOCABULARIES = {"gpt2": 50257}  # of the shipped recipes, so that they need no network

SHAPES, LAYOUT = (
    lru_cache(hf.shapes),
    lru_cache(hf.layout),
)  # asked for again with every micro-batch of a plan


def vocabulary(config: Config) -> int:
    """Tokens of the tokenizer that the config names, without reading text."""
    spec = config.data.tokenizer
    for folder in (config.data.input, Path(config.run.dir, "data")):
        if find_prepared(folder):
            return int(read_manifest(folder)["tokenizer"]["vocab_size"])
    if spec == "byte":
        return train_tokenizer("byte", []).vocab_size
    if spec.startswith("bpe:") and spec[4:].isdecimal():
        return int(spec[4:])  # at most
    if Path(spec).exists():
        return Tokenizer.load(spec).vocab_size
    if spec in HUB_VOCABULARIES:
        return HUB_VOCABULARIES[spec]
    raise UserError(
        f"data.tokenizer={spec} and data.input={config.data.input} do not tell the size of the vocabulary without"
        " reading text; rule: a prepared folder, or --vocab_size N"
    )


def steps_of(config: Config) -> int:
    """Updates of the whole run, without reading text."""
    sequences = None
    if not config.run.steps and find_prepared(config.data.input):
        shards = TokenShards(config.data.input, "train")
        sequences = sum(shards.counts(config.data.seq_len, config.data.stride or 1))
    steps = total_steps(config, sequences)
    if steps is None:
        raise UserError(
            f"run.epochs={config.run.epochs} of data.input={config.data.input} is of unknown length; rule: a prepared"
            " folder, or run.steps"
        )
    return steps


def parameters(config: Config, vocab_size: int) -> int:
    """How many there are, without what pads the vocabulary."""
    return sum(math.prod(shape) for shape in SHAPES(config.model_spec(vocab_size)).values())


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """Tensors of a checkpoint: weights as their family has them, the optimizer's moments, the moving average."""
    weights = sum(math.prod(entry.shape) for entry in LAYOUT(config.model_spec(vocab_size)))
    kept = [
        math.prod(shape) * (moments(config.optim.name, name) + (config.run.ema > 0))
        for name, shape in SHAPES(config.model_spec(vocab_size)).items()
    ]
    return 4 * (weights + sum(kept))


def checkpoints_kept(config: Config, steps: int) -> int:
    """How many lie on disk at once: the newest, the best, what keep_every keeps, and one being written."""
    run = config.run
    saves = -(-steps // run.save_every) if run.save_every else 1
    multiples = (
        steps // math.lcm(run.keep_every, run.save_every)
        if run.keep_every and run.save_every
        else 0
    )
    best = bool(run.eval_every and run.save_every)
    return min(saves, run.keep_last + best + multiples + 1)
