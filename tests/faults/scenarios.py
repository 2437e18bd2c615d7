"""The pieces of work that operations.py interrupts. Each is done again after every fault."""

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_lm import families, lock, outcome, train
from dist_lm.channel import Channel
from dist_lm.checkpoint.folder import newest_valid, step_folders
from dist_lm.checkpoint.save import Saver
from dist_lm.config import DataConfig, ModelConfig, ModelSpec, OptimConfig
from dist_lm.data.prepared import writer
from dist_lm.data.prepared.cache import ShardCache
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.prepared.shard_file import map_shard, write_shard
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.lock import RunLock
from dist_lm.metrics import read_metrics
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.optim import create_state, make_optimizer
from dist_lm.outcome import Attempt
from tests.conftest import TINY, owned, text_of
from tests.faults.operations import Ended, Fault, Scenario, hash_of
from tests.forkserver import SLOW_MODULES


def quiet(*_: object) -> None:
    pass


STATE = {
    "step": 0,
    "tokens": 100,
    "skipped_updates": 0,
    "val_loss": None,
    "strategy": "single",
    "world_size": 1,
    "scaler": {},
    "config": {},
    "data": "x",
}


class Save(Scenario):
    """A checkpoint is written, and an older one deleted."""

    name = "save"
    spec = ModelSpec(ModelConfig(layers=1, heads=2, width=8), 257, 8)

    def before(self, folder: Path) -> None:
        torch.set_num_threads(1)  # threads do not survive a fork
        self.tokenizer = train_tokenizer("byte", [])
        self.model = GPT(self.spec)
        init_weights(self.model, 1)
        self.optimizer = make_optimizer(self.model, OptimConfig(), "fp32")
        create_state(self.optimizer)
        for step in (1, 2):
            self.save(Saver(folder, Channel(0, 1, torch.device("cpu")), keep_last=2), step)

    def save(self, saver: Saver, step: int) -> None:
        contents_of_files = {
            "config.json": families.config_json(self.spec, self.tokenizer.eot),
            "state.json": STATE | {"step": step},
        }
        texts = {name: json.dumps(content) for name, content in contents_of_files.items()}
        parts = owned(self.model, self.optimizer)
        saver.begin(step, self.spec, lambda: parts, texts, self.tokenizer)
        saver.finish()

    def work(self, folder: Path) -> None:
        resumed = folder / "step-00000002"
        channel = Channel(0, 1, torch.device("cpu"))
        self.save(Saver(folder, channel, keep_last=2, resumed=resumed), 3)

    def check(self, folder: Path, fault: Fault, ended: Ended) -> None:
        newest, passed_over = newest_valid(folder)
        assert passed_over == [], passed_over
        assert newest is not None and newest.name in ("step-00000002", "step-00000003")
        if ended.how == "done":
            assert newest.name == "step-00000003"
            assert not_synced(ended.log) == []
            # Else a fault in deleting would never be tried.
            assert fault.action != "count" or not (folder / "step-00000001").exists()


def not_synced(log: Sequence[str]) -> list[str]:
    """The files of a checkpoint that were not on disk when it got its name."""
    written: dict[str, bool] = {}  # whether the last write was synced
    for line in log:
        kind, _, file = line.rpartition(" ")
        if kind == "rename" and file == "/step-00000003":
            return [name for name, is_synced in written.items() if not is_synced]
        if kind == "write" and file.startswith("/.step-00000003.tmp/"):
            written[file] = False
        if kind == "fsync" and file in written:
            written[file] = True
    return ["the checkpoint got no name"]


class Prepare(Scenario):
    """Text becomes token shards."""

    name = "prepare"

    def before(self, folder: Path) -> None:
        writer.SHARD_TOKENS = 4000
        (folder / "text.txt").write_text(text_of(60))

    def work(self, folder: Path) -> None:
        os.chdir(folder)  # a manifest names its text
        data = DataConfig(input="text.txt", separator="\n\n", tokenizer="byte", val_fraction=0.1)
        prepare_dataset(data, "out", 1, say=quiet)


class Cache(Scenario):
    """Two remote shards go through a cache that has room for one."""

    name = "cache"
    below = "cache"
    names = ("train-00000.safetensors", "train-00001.safetensors")

    def before(self, folder: Path) -> None:
        (folder / "far").mkdir()
        (folder / "cache").mkdir()
        self.entries = []
        for seed, name in enumerate(self.names):
            tokens = np.random.default_rng(seed).integers(256, size=10_000, dtype=np.uint16)
            entry = write_shard(folder / "far" / name, tokens, [0], [0], [0])
            self.entries.append((name, entry["bytes"], entry["sha256"]))

    def work(self, folder: Path) -> None:
        cache = ShardCache(f"file://{folder}/far", folder / "cache", 30_000)
        for name, size, sha256 in self.entries:
            copy = cache.get(name, size, sha256)
            assert len(map_shard(copy)["tokens"]) == 10_000
            cache.release(name)

    def check(self, folder: Path, fault: Fault, ended: Ended) -> None:
        sizes = [path.stat().st_size for path in (folder / "cache").iterdir()]
        assert sum(sizes) <= 30_000


class Lock(Scenario):
    """A run folder is taken and released."""

    name = "lock"

    def before(self, folder: Path) -> None:
        lock.STALE_SECONDS = 0.5
        (folder / "run").mkdir()

    def work(self, folder: Path) -> None:
        mine = RunLock(folder / "run")
        mine.take(quiet)
        mine.release()

    def look(self, folder: Path) -> dict[str, Any]:
        return {"is held": (folder / "run" / "run.lock").exists()}


class Outcome(Scenario):
    """The end of a second attempt is recorded."""

    name = "outcome"

    def before(self, folder: Path) -> None:
        lock.STALE_SECONDS = 0.5
        Attempt(folder, 1).record("retryable", "the first")

    def work(self, folder: Path) -> None:
        attempt = Attempt(folder, 2)
        attempt.lock.take(quiet)
        attempt.record("done", "")
        attempt.lock.release()

    def look(self, folder: Path) -> dict[str, Any]:
        # An error while the file of the first attempt is read loses its count of failures.
        recorded = outcome.read(folder)
        return {name: recorded[name] for name in ("class", "step", "attempt")}

    def check(self, folder: Path, fault: Fault, ended: Ended) -> None:
        assert outcome.read(folder).get("class") in ("retryable", "done")


class Run(Scenario):
    """A whole run of three steps: lock, evaluation, samples, checkpoints, outcome, picture."""

    name = "run"
    below = "run"
    flags = "--run.steps 3 --run.save_every 1 --run.keep_last 1 --run.eval_every 3"
    more_flags = "--run.eval_batches 1 --run.trackers"

    def before(self, folder: Path) -> None:
        (folder / "text.txt").write_text(text_of(120))
        os.chdir(folder)
        data = DataConfig(input="text.txt", separator="\n\n", tokenizer="byte", val_fraction=0.1)
        prepare_dataset(data, "shards", 1, say=quiet)
        for module in SLOW_MODULES:  # once, instead of in each child
            importlib.import_module(module)

    def work(self, folder: Path) -> None:
        os.chdir(folder)
        torch.set_num_threads(1)
        words = [
            *TINY,
            "--data.input",
            "shards",
            "--run.dir",
            "run",
            *self.flags.split(),
            *self.more_flags.split(),
        ]
        train.main(_last_of_each(words))

    def look(self, folder: Path) -> dict[str, Any]:
        run = folder / "run"
        steps, evaluations = read_metrics(run)
        figures = [(step["step"], step["loss"], step["batch_hash"]) for step in steps]
        return {
            "steps": figures,
            "evaluations": [(one["step"], one["val_loss"]) for one in evaluations],
            "folders": [path.name for path in step_folders(run)],
            "weights": hash_of(run / "step-00000003" / "model.safetensors"),
            "outcome": outcome.read(run).get("class"),
        }

    def check(self, folder: Path, fault: Fault, ended: Ended) -> None:
        if (folder / "run").exists():
            _, passed_over = newest_valid(folder / "run")
            assert passed_over == [], passed_over


def _last_of_each(words: list[str]) -> list[str]:
    """A command line in which each flag stands once: the last one given."""
    flags: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word
            flags[name] = []
        else:
            flags[name].append(word)
    merged = []
    for name, values in flags.items():
        merged += [name, *values]
    return merged


SCENARIOS: dict[str, type[Scenario]] = {
    scenario.name: scenario for scenario in (Save, Prepare, Cache, Lock, Outcome, Run)
}
