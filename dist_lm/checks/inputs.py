"""Checks of what a run reads: its data, its tokenizer, the checkpoint that it goes on from."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from dist_lm.checkpoint.folder import step_folders
from dist_lm.checkpoint.load import tokenizer_hash
from dist_lm.checks.ranks import Found, Ranks, few
from dist_lm.config import Config
from dist_lm.console import gigabytes
from dist_lm.data.prepared.found import prepared_folders
from dist_lm.data.prepared.manifest import MANIFEST, find_prepared, read_manifest
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.remote import is_remote
from dist_lm.data.text.files import find_files
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.tokenizer_training import is_trained_spec
from dist_lm.errors import UserError


def data(ranks: Ranks) -> Found:
    """Reachable and the same from every rank. All ranks."""
    seen = ranks.ask(lambda: look_at_data(ranks.config))
    text, expected = seen[0]
    others = []
    for name, (_, content) in zip(ranks.names, seen, strict=True):
        if content != expected:
            others.append(name)
    if others:
        raise UserError(
            f"data.input={ranks.config.data.title}: {few(others, ', ')}"
            " see(s) other content than rank 0"
        )
    return text, False


def look_at_data(config: Config) -> tuple[str, str]:
    """The data that this rank can read, in words and as a hash."""
    folders = folders_in_use(config)
    return look_at_shards(folders) if folders else look_at_text(config)


def look_at_shards(folders: list[Path]) -> tuple[str, str]:
    content = hashlib.sha256()
    tokens = 0
    for folder in folders:
        train = TokenShards(folder, "train")  # raises if a shard is missing or has another size
        val = TokenShards(folder, "val")
        read_a_byte(folder / name for name in (*train.files, *val.files))
        for name in (MANIFEST, "tokenizer.json"):
            content.update((folder / name).read_bytes())
        tokens += sum(train.sizes)
    what = folders[0] if len(folders) == 1 else f"{len(folders)} folders such as {folders[0]}"
    return f"{what}: prepared, {tokens:,} tokens to train on", content.hexdigest()


def look_at_text(config: Config) -> tuple[str, str]:
    """Files by name and size; what they hold is not read."""
    sources = config.data.named_sources()
    files = []
    for name, source in sources.items():
        if not prepared_folders(source):
            files += find_files(source, config.data.field_of(name))
    read_a_byte(file.path for file in files if file.path and not is_remote(file.path))
    size = gigabytes(sum(file.size for file in files))
    is_hub = any(not file.path for file in files)
    what = "a hub dataset, not looked at" if is_hub else f"{len(files)} file(s), {size} GB"
    text = f"{', '.join(source.title for source in sources.values())}: {what}"
    content = json.dumps([[file.name, file.size] for file in files]).encode()
    return text, hashlib.sha256(content).hexdigest()


def read_a_byte(paths: Iterable[str | Path]) -> None:
    """Of each file: a listing may show what cannot be read."""
    for path in paths:
        with open(path, "rb") as file:
            file.read(1)


def folders_in_use(config: Config) -> list[Path]:
    """The prepared folders that a run reads; none if its text is not prepared yet."""
    found = prepared_folders(config.data.as_source())
    folders = [Path(folder) for folder in found if not is_remote(folder)]
    own = Path(config.run.dir, "data")
    return folders or ([own] if find_prepared(own) else [])


def tokenizer(ranks: Ranks) -> Found:
    found: Found = ranks.ask(lambda: compare_tokenizers(ranks.config), is_asked=ranks.is_main)[0]
    return found


def compare_tokenizers(config: Config) -> Found:
    """Whether tokenizer, prepared data and the checkpoints to go on from belong together."""
    spec = config.data.tokenizer
    used = spec
    folders = folders_in_use(config)
    if folders:
        folder = folders[0]
        manifest = read_manifest(folder)
        current = Tokenizer.load(folder)
        used = manifest["tokenizer"]["name"]
        if current.sha256 != manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"{folder}/tokenizer.json is not the one that the folder was prepared with"
            )
    elif is_trained_spec(spec):
        return f"{spec}: made from the text as a run begins", False
    elif not Path(spec).exists():
        return f"{spec}: from the hub, not looked at", False
    else:
        current = Tokenizer.load(spec)
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
