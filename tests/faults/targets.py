"""What fuzz.py feeds: everything that reads what a stranger may have written."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dist_lm import families, report
from dist_lm.channel import Channel
from dist_lm.checkpoint.folder import newest_valid
from dist_lm.checkpoint.load import read_model
from dist_lm.checkpoint.save import Saver
from dist_lm.checkpoint.state import TrainState
from dist_lm.cli import load
from dist_lm.config import DataConfig, ModelConfig, ModelSpec
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.text.files import TextFile
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.history import open_data
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.outcome import TRAIN, Attempt
from dist_lm.reporting.document import render
from dist_lm.reporting.facts import facts_of
from dist_lm.resume import find_resume_point
from tests.conftest import TINY, owned, text_of
from tests.faults.fuzz import Target
from tests.faults.mutate import nasty_bytes, nasty_json, nasty_text
from tests.faults.signing import sign


def quiet(*_: object) -> None:
    pass


class Argv(Target):
    """A command line of train."""

    words = (
        "--model.layers 2 --optim.lr 1e-3 --optim.betas 0.9 0.95 --run.steps 10 --run.compile true"
    ).split()

    def feed(self, rng: random.Random) -> None:
        words = [nasty_text(rng, word) if rng.random() < 0.3 else word for word in self.words]
        if rng.random() < 0.3:
            rng.shuffle(words)
        load(words, TRAIN)


class Yaml(Target):
    """A file of settings."""

    text = """
model: {layers: 2, heads: 2, width: 32}
data:
  validation: {a: {input: b.txt}}
  sources: {x: {input: a, weight: 0.5}, y: {input: b, weight: 0.5}}
optim: &a
  lr: 1e-3
  betas: [0.9, 0.95]
run: {steps: 10, dir: runs/x}
"""

    def __init__(self, folder: Path):
        self.file = folder / "a.yaml"

    def feed(self, rng: random.Random) -> None:
        self.file.write_text(nasty_text(rng, self.text), encoding="utf-8")
        load(["--config", str(self.file)], TRAIN)


class OfARun(Target):
    """A run with two checkpoints. Files of the newer one are damaged."""

    spec = ModelSpec(ModelConfig(layers=1, heads=2, width=8), 257, 32)

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "text.txt").write_text(text_of(60))
        data = DataConfig(
            input=str(folder / "text.txt"), separator="\n\n", tokenizer="byte", val_fraction=0.1
        )
        prepare_dataset(data, folder / "shards", 1, say=quiet)
        words = [*TINY, "--data.input", str(folder / "shards"), "--run.dir", str(folder / "run")]
        self.config, _ = load(words, TRAIN)
        self.tokenizer = train_tokenizer("byte", [])
        self.model = GPT(self.spec)
        init_weights(self.model, 1)
        for step in (1, 2):
            self.write_step(step)
        self.newest = folder / "run" / "step-00000002"

    def write_step(self, step: int) -> None:
        state = {
            "step": step,
            "tokens": 100,
            "skipped_updates": 0,
            "val_loss": 2.5,
            "streams": {},
            "strategy": "single",
            "world_size": 1,
            "scaler": {},
            "config": self.config.model_dump(mode="json"),
            "data": open_data(self.config).identity,
            "versions": {},
            "commit": "",
        }
        config = families.config_json(self.spec, self.tokenizer.eot)
        texts = {"config.json": json.dumps(config), "state.json": json.dumps(state)}
        saver = Saver(self.folder / "run", Channel(0, 1, torch.device("cpu")))
        saver.begin(step, self.spec, lambda: owned(self.model), texts, self.tokenizer)
        saver.finish()

    def content(self, name: str) -> Any:
        """The undamaged content of a JSON file of the newest step."""
        return json.loads((self.folder / "run" / "step-00000001" / name).read_text())


class CheckpointManifest(OfARun):
    """manifest.json of the newest checkpoint: the older one is good."""

    def feed(self, rng: random.Random) -> None:
        content = self.content("manifest.json") | {"step": 2}
        (self.newest / "manifest.json").write_bytes(nasty_json(rng, content))
        folder, _ = newest_valid(self.folder / "run")
        assert folder is not None


class State(OfARun):
    """state.json of the newest checkpoint, signed again."""

    def feed(self, rng: random.Random) -> None:
        content = self.content("state.json") | {"step": 2}
        sign(self.newest, "state.json", nasty_json(rng, content))
        alone = dict.fromkeys(("on_main", "on_all", "together"), lambda work: work())
        runtime: Any = SimpleNamespace(**alone, rank=0, world_size=1, say=quiet, track=None)
        point = find_resume_point(runtime, self.config, [])
        if point and point.folder:
            TrainState.restored(point.facts)


class ModelDescription(OfARun):
    """config.json of a plain transformers folder."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.plain = folder / "plain"
        shutil.copytree(self.newest, self.plain)
        for name in ("manifest.json", "state.json"):
            (self.plain / name).unlink()

    def feed(self, rng: random.Random) -> None:
        content = self.content("config.json")
        (self.plain / "config.json").write_bytes(nasty_json(rng, content))
        read_model(str(self.plain))


class TokenizerFile(OfARun):
    """tokenizer.json, and a text that it encodes."""

    def feed(self, rng: random.Random) -> None:
        name = rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
        for good in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(self.folder / "run" / "step-00000001" / good, self.newest / good)
        (self.newest / name).write_bytes(nasty_json(rng, self.content(name)))
        tokenizer = Tokenizer.load(self.newest)
        tokenizer.decode(tokenizer.encode("a cat runs <|endoftext|> é\0"))


class PreparedFolder(OfARun):
    """dataset.json or a shard of a prepared folder."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder_of_try = folder / "p"
        shutil.copytree(folder / "shards", self.folder_of_try)
        names = ["train-00000.safetensors", "dataset.json"]
        self.undamaged = {name: (self.folder_of_try / name).read_bytes() for name in names}

    def feed(self, rng: random.Random) -> None:
        folder = self.folder_of_try
        for good, data in self.undamaged.items():
            (folder / good).write_bytes(data)
        manifest = json.loads(self.undamaged["dataset.json"])
        name = rng.choice(list(self.undamaged))
        if name == "dataset.json":
            (folder / name).write_bytes(nasty_json(rng, manifest))
        else:
            self.damage_shard(rng, folder / name, manifest)
        shards = TokenShards(folder, "train")
        count = sum(shards.counts(33, 32))
        shards.read([n for n in (0, count // 2, count - 1) if n >= 0], 33, 32)
        shards.documents_of(0, 33, 32)

    def damage_shard(self, rng: random.Random, file: Path, manifest: Any) -> None:
        """Mostly its header, and the manifest says its new size."""
        data = file.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        if rng.random() < 0.7:
            header = nasty_json(rng, json.loads(data[8:size]))
            data = len(header).to_bytes(8, "little") + header + data[size:]
        else:
            data = nasty_bytes(rng, data)
        file.write_bytes(data)
        manifest["splits"]["train"]["shards"][0]["bytes"] = len(data)
        (file.parent / "dataset.json").write_text(json.dumps(manifest))


class MetricsLines(Target):
    """metrics.jsonl, of which report makes a row of its table, and a page."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.step = {"step": 1, "loss": 5.5, "lr": 1e-3, "grad_norm": 1.0, "tokens": 256}
        self.step |= {"tokens_per_second": 1000.0, "data_wait": 0.1}
        figures = {"val_loss": 5.0, "val_perplexity": 148.0, "val_bits_per_byte": 7.2}
        self.evaluation = {"step": 1, "val_set": "val", **figures}

    def feed(self, rng: random.Random) -> None:
        lines = []
        for number in range(1, 5):
            content = self.step | {"step": number, "tokens": 256 * number}
            if number == 3:
                content = self.evaluation
            is_damaged = rng.random() < 0.5
            lines.append(nasty_json(rng, content) if is_damaged else json.dumps(content).encode())
        (self.folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
        lines = report.lines_of(str(self.folder))
        report.summary("run", lines)
        render([facts_of("run", str(self.folder), lines)])


class OutcomeFile(Target):
    """outcome.json of an earlier attempt."""

    def __init__(self, folder: Path):
        self.folder = folder

    def feed(self, rng: random.Random) -> None:
        content = {"class": "retryable", "step": 3, "reason": "x", "attempt": 2, "failures": 1}
        (self.folder / "outcome.json").write_bytes(nasty_json(rng, content))
        Attempt(self.folder).record("retryable", "again")


class Rows(Target):
    """Text, JSON, CSV files of rows, with both policies for bad rows."""

    def __init__(self, folder: Path):
        self.folder = folder
        rows = [{"text": f"row {n} of é", "more": [n, None, {"a": "b"}]} for n in range(20)]
        self.files = {
            "a.jsonl": "\n".join(json.dumps(row) for row in rows).encode(),
            "a.json": json.dumps(rows).encode(),
            "a.csv": ("text,more\n" + '"row, of ""a""",1\n' * 20).encode(),
            "a.txt": ("a line of text é\n\n" * 20).encode(),
        }

    def feed(self, rng: random.Random) -> None:
        name = rng.choice(sorted(self.files))
        data = nasty_bytes(rng, self.files[name])
        if rng.random() < 0.3:
            at = rng.randrange(len(data) + 1)
            data = (
                data[:at]
                + rng.choice([b"[" * 10_000, b"\xff\xfe", b"\\ud800", b'"' * 9])
                + data[at:]
            )
        self.read(rng, name, data)

    def read(self, rng: random.Random, name: str, data: bytes) -> None:
        path = self.folder / name
        path.write_bytes(data)
        words = ["--data.input", str(path)]
        if rng.random() < 0.2 and not name.endswith(".txt"):
            words += ["--data.template", nasty_text(rng, "{text} {more}")]
        config, _ = load(words, TRAIN)
        (source,) = config.data.named_sources().values()
        file = TextFile(name, str(path), len(data))
        reader = Reader(source, [file], rng.choice(["error", "skip"]))
        for _, _, texts in reader.documents(Counter()):
            for _ in texts:
                pass


class Tables(Rows):
    """Parquet and Arrow files."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        table = pa.table({"text": [f"row {n}" for n in range(50)], "more": list(range(50))})
        pq.write_table(table, folder / "a.parquet", row_group_size=20)
        with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
        self.files = {name: (folder / name).read_bytes() for name in ("a.parquet", "a.arrow")}

    def feed(self, rng: random.Random) -> None:
        name = rng.choice(sorted(self.files))
        self.read(rng, name, nasty_bytes(rng, self.files[name]))


TARGETS: dict[str, type[Target]] = {
    "argv": Argv,
    "yaml": Yaml,
    "checkpoint manifest": CheckpointManifest,
    "state.json": State,
    "config.json": ModelDescription,
    "tokenizer.json": TokenizerFile,
    "prepared folder": PreparedFolder,
    "metrics.jsonl": MetricsLines,
    "outcome.json": OutcomeFile,
    "rows": Rows,
    "tables": Tables,
}
