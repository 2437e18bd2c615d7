"""Checks of what a run reads: its data, its tokenizer, the checkpoint that it goes on from."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from dist_lm.checkpoint.folder import step_folders
from dist_lm.checkpoint.load import tokenizer_hash
from dist_lm.checks.ranks import Found, Ranks, few
from dist_lm.config import Config
from dist_lm.console import count, gigabytes
from dist_lm.data.dataset import look_at_inputs
from dist_lm.data.prepared.found import prepared_folders
from dist_lm.data.prepared.manifest import MANIFEST, find_prepared, read_manifest
from dist_lm.data.remote import is_remote
from dist_lm.data.text.files import TextFile
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.data.tokenizer_training import is_trained_spec
from dist_lm.errors import UserError


def data(ranks: Ranks) -> Found:
    """Reachable and the same from every rank. All ranks."""
    seen = ranks.ask(lambda: look_at_data(ranks.config))
    text, expected, is_warning = seen[0]
    others = []
    for name, (_, content, _) in zip(ranks.names, seen, strict=True):
        if content != expected:
            others.append(name)
    if others:
        raise UserError(
            f"data.input={ranks.config.data.title}: other content than on rank 0:"
            f" {few(others, ', ')}"
        )
    return text, is_warning


def look_at_data(config: Config) -> tuple[str, str, bool]:
    """The data that this rank can read: in words, as a hash, and whether that is a warning.

    What train would refuse, this refuses with the same words. What is at a URL is listed and not
    read, which is a warning.
    """
    said: list[str] = []
    prepared, files = look_at_inputs(config, said.append)
    folders = list(chain.from_iterable(prepared.values()))
    lines = [look_at_shards(folder) for folder in folders]
    contents = [content_of(folder) for folder in folders]
    local = [file.path for file in files if file.path and not is_remote(file.path)]
    read_a_byte(local)
    if files:
        lines.append(describe_text(files))
        contents.append(json.dumps([[file.name, file.size] for file in files]).encode())
    is_read = len(local) == len(files) and not any(map(is_remote, folders))
    text = "; ".join(lines) + ("" if is_read else "; listed, not read")
    warnings = [line for line in said if line.startswith("warning: ")]
    text = "; ".join([text, *warnings])
    is_warning = bool(warnings) or not is_read
    return text, hashlib.sha256(b"".join(contents)).hexdigest(), is_warning


def look_at_shards(folder: str) -> str:
    """A prepared folder in words; each of its shards can be read, if it is not at a URL."""
    splits = read_manifest(folder)["splits"]
    if not is_remote(folder):
        for split in splits.values():
            read_a_byte(Path(folder, shard["file"]) for shard in split["shards"])
    return f"{folder}: prepared, {splits['train']['tokens']:,} tokens to train on"


def content_of(folder: str) -> bytes:
    """The manifest, which tells prepared folders apart: it has the hashes of the shards."""
    if is_remote(folder):
        return json.dumps(read_manifest(folder), sort_keys=True).encode()
    return b"".join(Path(folder, name).read_bytes() for name in (MANIFEST, "tokenizer.json"))


def describe_text(files: Sequence[TextFile]) -> str:
    """The number of files and bytes of the text, whose content is not read."""
    size = gigabytes(sum(file.size for file in files))
    hub_datasets = [file.name for file in files if not file.path]
    if len(hub_datasets) == len(files):
        return f"{', '.join(hub_datasets)}: hub"
    first = files[0].path or files[0].name
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{first}{more}: {count(len(files), 'file')}, {size} GB"


def read_a_byte(paths: Iterable[str | Path]) -> None:
    """Read a byte of each file: a listing may show what cannot be read."""
    for path in paths:
        with open(path, "rb") as file:
            file.read(1)


def prepared_folder(config: Config) -> Path | None:
    """The first prepared folder of the run on this machine, whose tokenizer is that of all."""
    folders: list[str] = []
    for source in config.data.named_sources().values():
        folders += prepared_folders(source)
    for folder in (*folders, str(Path(config.run.dir, "data"))):
        if not is_remote(folder) and find_prepared(folder):
            return Path(folder)
    return None


def tokenizer(ranks: Ranks) -> Found:
    found: Found = ranks.ask(lambda: compare_tokenizers(ranks.config), is_asked=ranks.is_main)[0]
    return found


def compare_tokenizers(config: Config) -> Found:
    """Whether tokenizer, prepared data and the checkpoints to go on from belong together."""
    spec = config.data.tokenizer
    used = spec
    folder = prepared_folder(config)
    if folder:
        manifest = read_manifest(folder)
        current = Tokenizer.load(folder)
        used = manifest["tokenizer"]["name"]
        if current.sha256 != manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"{folder}/tokenizer.json is not the one that the folder was prepared with"
            )
    elif is_trained_spec(spec):
        return f"{spec}: made from the text as a run begins", False
    else:
        current = load_tokenizer(spec)
    text = f"{current.vocab_size:,} tokens" + compare_checkpoints(config, current)
    if used != spec:
        text += f"; prepared with data.tokenizer={used}, which stands, not {spec}"
    return text, used != spec


def compare_checkpoints(config: Config, current: Tokenizer) -> str:
    """The checkpoints that were trained with this tokenizer; refuses any other one."""
    folders = step_folders(Path(config.run.dir))[-1:]
    if config.run.init_from:
        folders += [Path(config.run.init_from), *step_folders(Path(config.run.init_from))[-1:]]
    text = ""
    for folder in folders:
        trained_with = tokenizer_hash(folder)
        if trained_with not in (None, current.sha256):
            raise UserError(
                f"{folder} was trained with another tokenizer"
                f" than data.input={config.data.title} has"
            )
        if trained_with:
            text += f", as {folder}"
    return text
