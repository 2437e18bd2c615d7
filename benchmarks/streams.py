"""Runs that stream or prepare made-up text, for several claims."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_lm.channel import Channel
from dist_lm.cli import resolve
from dist_lm.config import Config, batch_layout
from dist_lm.data.batches import Batches
from dist_lm.data.dataset import Dataset, open_dataset

LENGTH = 1024
BATCH = 16
CPU = torch.device("cpu")


def config_of(source: Path, tokenizer: Path, scratch: Path, **more: Any) -> Config:
    """A run over some text, from its beginning to its end once."""
    settings = {
        "data.input": str(source),
        "data.tokenizer": str(tokenizer),
        "data.stream": True,
        "data.val_fraction": 0.0,
        "data.seq_len": LENGTH,
        "data.global_batch": BATCH,
        "data.workers": 0,
        "run.eval_every": 0,
        "run.epochs": 1,
        "optim.schedule": "constant",
        "run.dir": tempfile.mkdtemp(dir=scratch),
    }
    more = {name.replace("__", "."): value for name, value in more.items()}
    return resolve(("benchmark", {**settings, **more}))


def opened(config: Config) -> Dataset:
    def on_main(work: Callable[[], Any]) -> Any:
        return work()

    return open_dataset(config, on_main, lambda text: None)


def batches_of(
    config: Config, data: Dataset, state: Any = None, rank: int = 0, world: int = 1
) -> Batches:
    """The batches of a run, from where its streams stand."""
    channel = Channel(rank, world, CPU) if world > 1 else None
    reader = data.open_reader(config.data, state=state, rank=rank, world=world, channel=channel)
    return Batches(reader, config.data, batch_layout(config, world), CPU, eot=data.tokenizer.eot)


def read_pass(batches: Batches) -> int:
    """Read to the end of the pass; the tokens that were targets."""
    tokens = 0
    while not (batch := batches.take()).end:
        tokens += batch.targets
    batches.close()
    return tokens
