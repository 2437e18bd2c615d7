"""A checkpoint's validation figures, of the text that it was trained on or of any other."""

import json
import signal
from pathlib import Path
from typing import Any

from dist_lm.checkpoint.load import read_model
from dist_lm.checkpoint.state import read_state
from dist_lm.cli import resolve
from dist_lm.config import Config, batch_layout, flat
from dist_lm.console import count
from dist_lm.data.dataset import Dataset, open_dataset, validation_folders
from dist_lm.data.prepared.manifest import find_prepared
from dist_lm.data.prepared.sequences import TokenSequences
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import DataError, UserError
from dist_lm.model.gpt import GPT
from dist_lm.runtime.start import start
from dist_lm.runtime.world import Runtime
from dist_lm.validate import validate

OF_TRAINING = ("stream", "sources", "stages", "validation", "packing")  # fields of data


def score(
    ckpt: str, settings: dict[str, Any], scratch: str, average: bool, as_json: bool = False
) -> None:
    """Print the figures; raw text is prepared into `scratch` with the checkpoint's tokenizer."""
    model, tokenizer, folder = read_model(ckpt, average)
    config = settings_for(folder, model.seq_len, settings, scratch)
    inputs = {"": config.data.input}
    if "data.input" not in settings:
        inputs = inputs_of_run(folder) or inputs
    runtime = start(config)
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing has to be saved
        signal.signal(number, signal.SIG_DFL)
    model.to(runtime.device)
    sets = []
    for name, where in inputs.items():
        data = config.data.model_copy(update={"input": where})
        of_set = config.model_copy(update={"data": data})
        sets.append(score_set(runtime, model, tokenizer, of_set, folder) | {"name": name})
    sets[0]["decides"] = len(sets) > 1
    if as_json:
        print(json.dumps({"checkpoint": str(folder), "sets": sets}, indent=1))
    else:
        print("\n".join(describe(folder, figures) for figures in sets))
    runtime.close()


def score_set(
    runtime: Runtime, model: GPT, tokenizer: Tokenizer, config: Config, folder: Path
) -> dict[str, Any]:
    """The figures of one text, and what they are of."""
    data = open_dataset(config, runtime.on_main, training=False)
    if data.tokenizer.sha256 != tokenizer.sha256:
        raise DataError(
            f"data.input={config.data.title} was prepared with another tokenizer than {folder}'s"
        )
    shards, part = what_to_score(data)
    length = config.data.seq_len
    sequences = sum(shards.counts(length, config.data.stride))
    if not sequences:
        longest = max(shards.sizes)
        raise DataError(
            f"data.seq_len={length} needs {length + 1} tokens in one shard, what is held out of"
            f" data.input={config.data.title} has {longest}; nearest: {max(longest - 1, 1)}"
        )
    figures = validate(runtime, model, shards, config, batch_layout(config, 1), tokenizer)
    return {
        "input": config.data.title,
        "part": part,
        "decides": False,
        "seq_len": length,
        "scored": min(sequences, config.run.eval_batches * config.data.global_batch),
        "sequences": sequences,
        "figures": figures,
    }


def describe(folder: Path, of_set: dict[str, Any]) -> str:
    """The figures of one text, under a line that says what they are of."""
    name = f" {of_set['name']}:" if of_set["name"] else ""
    mark = "; this set decides which checkpoint is the best" if of_set["decides"] else ""
    lines = [
        f"{folder}:{name} {of_set['scored']:,} of {count(of_set['sequences'], 'sequence')} of"
        f" {of_set['seq_len']} tokens, {of_set['part']} of {of_set['input']}{mark}"
    ]
    lines += [f"{name} {value}" for name, value in of_set["figures"].items()]
    return "\n".join(lines)


def inputs_of_run(folder: Path) -> dict[str, str | tuple[str, ...]]:
    """The validation sets of a checkpoint's run by name, if it has several."""
    state = read_state(folder)
    found = validation_folders(resolve((str(folder), flat(state["config"]))), folder.parent)
    if len(found) < 2:
        return {}
    return {name: tuple(folders) for name, folders in found.items()}


def settings_for(folder: Path, context: int, settings: dict[str, Any], scratch: str) -> Config:
    """The run's settings, with what was given on the command line."""
    of_ckpt = {
        "data.tokenizer": str(folder),
        "run.dir": scratch,
        "run.eval_every": 0,
        "run.trackers": [],
    }
    config = resolve(
        (str(folder), settings_of_run(folder, context)),
        ("--ckpt", of_ckpt),
        ("command line", settings),
    )
    if "data.input" not in settings and not (folder / "state.json").is_file():
        raise UserError(
            f"--data.input must be given: {folder} does not say what text it was trained on"
        )
    if config.data.seq_len > context:
        raise UserError(
            f"data.seq_len={config.data.seq_len} exceeds the context of {folder};"
            f" nearest: {context}"
        )
    return config


def settings_of_run(folder: Path, context: int) -> dict[str, Any]:
    """The settings that a checkpoint was trained with, its data found where the run prepared it."""
    if not (folder / "state.json").is_file():
        return {"data.seq_len": context}
    settings = flat(read_state(folder)["config"])
    if settings.get("data.stride") == settings.get("data.seq_len"):
        settings.pop("data.stride", None)  # it followed, and goes on following a new seq_len
    for name in OF_TRAINING:
        settings.pop(f"data.{name}", None)
    prepared = folder.parent / "data"
    held_out_of_streams = sorted(path.parent for path in prepared.glob("val/*/dataset.json"))
    for place in (prepared, *held_out_of_streams):
        if find_prepared(place):
            settings["data.input"] = str(place)
            break
    return settings


def what_to_score(data: Dataset) -> tuple[TokenSequences, str]:
    """The held-out text, or the whole text where nothing is held out."""
    held_out = data.val["val"]
    if sum(held_out.sizes) > 0:
        return held_out, "the held-out part"
    return data.train, "all"
