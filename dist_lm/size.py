"""Sizes that follow from a config before anything is built: vocabulary, steps, checkpoints."""

import math
from pathlib import Path

from dist_lm.arithmetic import ceil_div
from dist_lm.config import Config, total_steps
from dist_lm.data.prepared.found import prepared_folders
from dist_lm.data.prepared.manifest import find_prepared, read_manifest
from dist_lm.data.prepared.parts import open_shards
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import UserError
from dist_lm.model import hf
from dist_lm.optim import moments

# Tokenizers that the shipped recipes name on the hub, so that a plan of them needs no network.
HUB_VOCABULARIES = {"gpt2": 50257}


def vocabulary(config: Config) -> int:
    """Tokens of the tokenizer that the config names, without reading text."""
    name = config.data.tokenizer
    for folder in [*prepared_folders(config.data.as_source()), f"{config.run.dir}/data"]:
        if find_prepared(folder):
            return int(read_manifest(folder)["tokenizer"]["vocab_size"])
    if name == "byte":
        return train_tokenizer("byte", []).vocab_size
    if name.startswith("bpe:") and name[4:].isdecimal():
        return int(name[4:])  # at most
    if Path(name).exists():
        return Tokenizer.load(name).vocab_size
    if name in HUB_VOCABULARIES:
        return HUB_VOCABULARIES[name]
    raise UserError(
        f"data.tokenizer={name} and data.input={config.data.title} do not tell the size of the"
        " vocabulary without reading text; rule: a prepared folder, or --vocab_size N"
    )


def steps_of(config: Config) -> int:
    """Updates of the whole run, without reading text."""
    sequences = None
    folders = prepared_folders(config.data.as_source())
    if not config.run.steps and folders:
        shards = open_shards(folders, "train", config.data)
        sequences = sum(shards.counts(config.data.seq_len, config.data.stride or 1))
    steps = total_steps(config, sequences)
    if steps is None:
        raise UserError(
            f"run.epochs={config.run.epochs} of data.input={config.data.title} is of unknown"
            " length; rule: a prepared folder, or run.steps"
        )
    return steps


def parameters(config: Config, vocab_size: int) -> int:
    """The number of parameters, without the rows that pad the vocabulary."""
    return hf.number_of_parameters(config.model_spec(vocab_size))


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """Bytes of a checkpoint's tensors.

    They are the weights as their family has them, the optimizer's moments and the moving average.
    """
    spec = config.model_spec(vocab_size)
    elements = sum(math.prod(entry.shape) for entry in hf.layout(spec))
    averages = 1 if config.run.ema else 0
    for name, shape in hf.shapes(spec).items():
        elements += math.prod(shape) * (moments(config.optim.name, name) + averages)
    return 4 * elements  # fp32


def checkpoints_kept(config: Config, steps: int) -> int:
    """The number of checkpoints that lie on disk at once.

    They are the newest, the best, what keep_every keeps, and one that is being written.
    """
    run = config.run
    if not run.save_every:
        return 1  # the last one
    saves = ceil_div(steps, run.save_every)
    best = 1 if run.eval_every else 0
    multiples = 0
    if run.keep_every:
        multiples = steps // math.lcm(run.keep_every, run.save_every)
    return min(saves, run.keep_last + best + multiples + 1)
