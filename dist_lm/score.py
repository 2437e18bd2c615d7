"""A checkpoint's validation figures: `python -m dist_lm.score --ckpt RUN_OR_STEP_OR_HF_FOLDER [--data.input TEXT]`.

Without --data.input: the number that training prints at an evaluation, of the run's own held-out documents. With it: of
that text's (or prepared folder's) held-out documents, chosen as training would; --data.val_fraction 0 scores the whole
text. Other settings (--data.seq_len, --data.micro_batch, --run.eval_batches, --run.precision ...) start as the run's.
One process; nothing is trained, and the run's folder is only read.
"""

import json
import signal
import tempfile
from pathlib import Path
from typing import Any

from dist_lm.checkpoint.load import read_model
from dist_lm.cli import resolve, split_arguments
from dist_lm.config import batch_layout
from dist_lm.data.manifest import find_prepared
from dist_lm.errors import DataError, UserError, run_entry
from dist_lm.runtime.start import start

FLAGS = {
    "ckpt": "Run folder (its newest valid step), step folder, or folder in transformers' layout.",
    "ema": "true: score the moving average of the weights that a run with run.ema kept.",
}
OURS = ("data.tokenizer", "run.dir")  # decided by --ckpt


def main(argv: list[str]) -> None:
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__, end="")
        return
    given, settings = split_arguments(argv, FLAGS)
    if len(given.get("ckpt", [])) != 1:
        raise UserError(
            "--ckpt must be given once: a run folder, a step folder or a folder in transformers' layout"
        )
    if given.get("ema", ["true"]) not in (["true"], ["false"]):
        raise UserError(f"--ema {given['ema'][0]} must be true or false; nearest: true")
    for name in settings:
        if name in OURS or not name.startswith(("data.", "run.precision", "run.eval_batches")):
            raise UserError(
                f"--{name}: score takes it from --ckpt; rule: data.*, run.precision, run.eval_batches"
            )
    with tempfile.TemporaryDirectory(prefix="dist_lm-score-") as scratch:
        score(given["ckpt"][0], settings, scratch, average=given.get("ema") == ["true"])


def score(ckpt: str, settings: dict[str, Any], scratch: str, average: bool) -> None:
    """Print the figures; raw text is prepared into `scratch` with the checkpoint's tokenizer."""
    from dist_lm.data.dataset import open_dataset
    from dist_lm.validate import validate

    model, tokenizer, folder = read_model(ckpt, average)
    config = resolve(
        (str(folder), settings_of_run(folder, model.seq_len)),
        (
            "--ckpt",
            {
                "data.tokenizer": str(folder),
                "run.dir": scratch,
                "run.eval_every": 0,
                "run.trackers": [],
            },
        ),
        ("command line", settings),
    )
    if "data.input" not in settings and not (folder / "state.json").is_file():
        raise UserError(
            f"--data.input must be given: {folder} does not say what text it was trained on"
        )
    if config.data.seq_len > model.seq_len:
        raise UserError(
            f"data.seq_len={config.data.seq_len} exceeds the context of {folder}; nearest: {model.seq_len}"
        )
    world = start(config)
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing has to be saved
        signal.signal(number, signal.SIG_DFL)
    data = open_dataset(config, world.on_main, training=False)
    if data.tokenizer.sha256 != tokenizer.sha256:
        raise DataError(
            f"data.input={config.data.input} was prepared with another tokenizer than {folder}'s"
        )
    held_out, length = sum(data.val["val"].sizes) > 0, config.data.seq_len
    shards = data.val["val"] if held_out else data.train
    sequences = sum(shards.counts(length, config.data.stride))
    if not sequences:
        raise DataError(
            f"data.seq_len={length} needs {length + 1} tokens in one shard, what is held out of data.input="
            f"{config.data.input} has {max(shards.sizes)}; nearest: {max(max(shards.sizes) - 1, 1)}"
        )
    figures = validate(
        world, model.to(world.device), shards, config, batch_layout(config, 1), tokenizer
    )
    scored = min(sequences, config.run.eval_batches * config.data.global_batch)
    part = "the held-out part" if held_out else "all"
    print(
        f"{folder}: {scored:,} of {sequences:,} sequences of {length} tokens, {part} of {config.data.input}"
    )
    for name, value in figures.items():
        print(name, value)
    world.close()


def settings_of_run(folder: Path, context: int) -> dict[str, Any]:
    """The settings that a checkpoint was trained with, its data found where the run prepared it."""
    if not (folder / "state.json").is_file():
        return {"data.seq_len": context}
    nested = json.loads((folder / "state.json").read_text(encoding="utf-8"))["config"]
    settings = {
        f"{section}.{field}": value
        for section, fields in nested.items()
        for field, value in fields.items()
    }
    if (
        settings["data.stride"] == settings["data.seq_len"]
    ):  # it followed, and goes on following a new seq_len
        del settings["data.stride"]
    for name in ("stream", "sources", "stages", "validation", "packing"):  # of training only
        del settings[f"data.{name}"]
    kept = sorted(
        path.parent for path in (folder.parent / "data").glob("val/*/dataset.json")
    )  # of streams
    found = [place for place in (folder.parent / "data", *kept) if find_prepared(place)]
    return settings | ({"data.input": str(found[0])} if found else {})


if __name__ == "__main__":
    run_entry(main)
