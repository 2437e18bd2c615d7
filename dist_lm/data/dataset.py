"""data.dataset."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lm.config import Config, DataConfig
from dist_lm.data.cache import ShardCache
from dist_lm.data.files import Part, TextFile, find_files
from dist_lm.data.formats import Reader
from dist_lm.data.holdout import document_hash, held_out
from dist_lm.data.kept import keep_validation, learn_tokenizer
from dist_lm.data.manifest import find_prepared
from dist_lm.data.order import FOR_STREAM, hash_words
from dist_lm.data.preparing import prepare_dataset
from dist_lm.data.remote import fetch_small, is_remote
from dist_lm.data.shards import TokenShards
from dist_lm.data.stream import StreamSpec
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.disk import write_json
from dist_lm.errors import DataError, UserError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Dataset:
    """A run's sources and validation sets by name, opened."""

    sources: dict[str, TokenShards | StreamSpec]
    val: dict[str, TokenShards]
    tokenizer: Tokenizer
    identity: str  # hash of the tokenizer and of what the sources hold: equal exactly where the tokens are
    sequences: int | None  # in an epoch; None: not known beforehand

    @property
    def train(self) -> TokenShards:
        """The only source, of token shards."""
        (shards,) = self.sources.values()
        assert isinstance(shards, TokenShards), "a stream has no shards"
        return shards


def open_dataset(
    config: Config,
    on_main: Callable[[Callable[[], Any]], Any],
    say: Callable[[str], None] = print,
    training: bool = True,
) -> Dataset:
    """Open the sources; what has to be prepared or looked up is, once, in the run folder, by rank 0. All ranks."""
    data, folder = config.data, Path(config.run.dir) / "data"
    specs = data.named_sources()
    prepared = {n: s.input for n, s in (specs | data.validation).items() if find_prepared(s.input)}
    if len(specs) == 1 and not data.stream and not data.validation:
        (name,) = specs
        where = prepared.get(name, str(folder))
        if not prepared:
            on_main(lambda: prepare_dataset(data, folder, _cores(), say, name) and None)
        train, kept = (_open_shards(where, split, data) for split in ("train", "val"))
        return _check(config, {name: train}, {"val": kept}, _tokenizer_of(where), training)
    streams = on_main(lambda: _make_ready(config, folder, prepared, say))
    tokenizer = _tokenizer_of(next(iter(prepared.values()), str(folder)))
    excluded = _validation_hashes(config, folder)
    sources: dict[str, TokenShards | StreamSpec] = {}
    val = {
        n: _open_shards(prepared.get(n, str(folder / "val" / n)), "val", data)
        for n in data.validation
    }
    for name, spec in specs.items():
        if name in streams:
            reader = Reader(
                spec,
                [TextFile(*file) for file in streams[name]["files"]],
                data.bad_rows,
                data.field_of(name),
            )
            parts = [Part(*part) for part in streams[name]["parts"]]
            sources[name] = StreamSpec(
                reader,
                parts,
                tokenizer,
                data.seq_len,
                min(data.lanes, len(parts)),
                hash_words(config.run.seed, FOR_STREAM, zlib.crc32(name.encode())),
                partial(_keep, data.val_fraction, excluded),
                data.packing == "best_fit",
                config.run.epochs or (None if spec.at_end == "repeat" else 1),
            )
            own = str(folder / "val" / name)
        else:
            own = prepared.get(name, str(folder / "sources" / name))
            sources[name] = _open_shards(own, "train", data)
        if config.run.eval_every and find_prepared(own):
            val["val" if len(specs) == 1 else name] = _open_shards(own, "val", data)
    return _check(
        config,
        sources,
        {name: shards for name, shards in val.items() if shards.count(data)},
        tokenizer,
    )


def _open_shards(where: str, split: str, data: DataConfig) -> TokenShards:
    """A prepared folder, or one at a URL through this machine's cache."""
    if not is_remote(where):
        return TokenShards(where, split)
    kept = Path(os.environ.get("DIST_LM_CACHE") or Path.home() / ".cache" / "dist_lm")
    return TokenShards(where, split, ShardCache(where, kept, round(data.cache_gb * 1e9)))


def _tokenizer_of(folder: str) -> Tokenizer:
    if not is_remote(folder):
        return Tokenizer.load(folder)
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            Path(scratch, name).write_bytes(fetch_small(f"{folder}/{name}"))
        return Tokenizer.load(scratch)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _make_ready(
    config: Config, folder: Path, prepared: Mapping[str, str], say: Callable[[str], None]
) -> dict[str, dict[str, list[Any]]]:
    """Learn the tokenizer, keep validation documents, prepare what is not streamed; the streams' files and parts."""
    data, specs = config.data, config.data.named_sources()
    readers = {
        name: Reader(
            spec, find_files(spec, data.field_of(name)), data.bad_rows, data.field_of(name)
        )
        for name, spec in (specs | data.validation).items()
        if name not in prepared
    }
    raw = [name for name in specs if name in readers]
    folder.mkdir(parents=True, exist_ok=True)
    if not prepared:
        learn_tokenizer(data, [readers[name] for name in raw], folder, say)
    first, *others = prepared.values() or [str(folder)]
    tokenizer = _tokenizer_of(first)
    for other in others:
        if _tokenizer_of(other).sha256 != tokenizer.sha256:
            raise DataError(
                f"{other} has another tokenizer than {first}; rule: one for all; nearest: prepare it"
                f" with --tokenizer {first}"
            )
    wanted = config.run.eval_batches * data.global_batch * data.seq_len + 1
    for name in data.validation:
        if name in readers:
            keep_validation(
                data, readers[name], tokenizer, folder / "val" / name, wanted, say, whole=True
            )
    excluded = _validation_hashes(config, folder)
    if excluded and prepared:
        say(
            "warning: prepared folders are trained on as they are: documents of data.validation may be in them"
        )
    if not data.stream:
        for name in raw:
            prepare_dataset(
                data, folder / "sources" / name, _cores(), say, name, excluded, tokenizer
            )
        return {}
    streams: dict[str, dict[str, list[Any]]] = {
        name: {"files": [*readers[name].files], "parts": [*readers[name].parts(data.lanes)]}
        for name in raw
    }
    _refuse_changed(streams, folder / "streams.json")
    for name in raw:
        if len(streams[name]["parts"]) < data.lanes:
            say(
                f"{specs[name].input} has {len(streams[name]['parts'])} parts, so {name} is read in as many lanes, not"
                f" data.lanes={data.lanes}"
            )
        packed = [
            file.name
            for file in readers[name].files
            if not file.name.endswith((".parquet", ".jsonl"))
        ]
        if packed:
            say(
                f"{name}: a resumed run reads {len(packed)} of its files, such as {packed[0]}, from their beginnings"
            )
        if config.run.eval_every and data.val_fraction:
            try:
                keep_validation(data, readers[name], tokenizer, folder / "val" / name, wanted, say)
            except UserError as error:
                if not data.validation:
                    raise
                say(f"warning: no validation of its own for {name}: {error}")
    return streams


def _refuse_changed(streams: Mapping[str, Any], record: Path) -> None:
    """A stream's files must stay as they were when the run began, or its cursors would point elsewhere."""
    now = {name: [list(file) for file in stream["files"]] for name, stream in streams.items()}
    if not record.is_file():
        if now:
            write_json(record, now)
        return
    for name, files in json.loads(record.read_bytes()).items():
        have = {
            file: marks for file, _, *marks in now.get(name, [])
        }  # where a file lies may change
        for file, path, *marks in files:
            if have.pop(file, None) != marks:
                raise DataError(
                    f"{path or file} of {name} changed or vanished since the run began; rule: a stream's"
                    " files stay; nearest: restore it, or start a new run.dir"
                )
        for path in have:
            raise DataError(
                f"{path} of {name} was not there when the run began; rule: a stream's files stay; nearest:"
                " move it away, or start a new run.dir"
            )


def _validation_hashes(config: Config, folder: Path) -> frozenset[int]:
    """Hashes of the documents of data.validation, which are never trained on."""
    files = [folder / "val" / name / "documents.json" for name in config.data.validation]
    return frozenset(
        number for file in files if file.is_file() for number in json.loads(file.read_bytes())
    )


def _keep(
    val_fraction: float, excluded: frozenset[int], texts: Iterator[str]
) -> Iterator[str] | None:
    number, texts = document_hash(texts)
    return None if held_out(number, val_fraction) or number in excluded else texts


def _check(
    config: Config,
    sources: dict[str, TokenShards | StreamSpec],
    val: dict[str, TokenShards],
    tokenizer: Tokenizer,
    training: bool = True,
) -> Dataset:
    """Refuse what is too small; the identity of it all."""
    data, specs, marks = config.data, config.data.named_sources(), [tokenizer.sha256]
    for name, source in sources.items():
        if isinstance(source, StreamSpec):
            options = specs[name].model_dump(mode="json", exclude={"input", "weight", "revision"})
            files = [
                [file.name, file.size, file.mark if not file.path else ""]
                for file in source.reader.files
            ]
            marks.append(json.dumps([name, options, files, data.val_fraction]))
        else:
            if not source.count(data) and (
                training or not sum(shards.count(data) for shards in val.values())
            ):
                raise DataError(
                    f"data.seq_len={data.seq_len} needs {data.seq_len + 1} tokens in one shard, {data.field_of(name)}="
                    f"{specs[name].input} has {sum(source.sizes)} to train on; nearest:"
                    f" {max(max(source.sizes, default=0) - 1, 1)}"
                )
            marks += [
                shard["sha256"]
                for split in source.manifest["splits"].values()
                for shard in split["shards"]
            ]
        if len(sources) > 1:
            marks.append(f"{name} {specs[name].weight} {specs[name].at_end}")
    if config.run.eval_every and not sum(shards.count(data) for shards in val.values()):
        tokens = sum(sum(shards.sizes) for shards in val.values())
        raise DataError(
            f"data.val_fraction={data.val_fraction} holds out {tokens} tokens, fewer than one sequence; rule:"
            f" at least {data.seq_len + 1}; nearest: a larger data.val_fraction, or run.eval_every=0"
        )
    (first, *others) = sources.values()
    sequences = first.count(data) if not others and isinstance(first, TokenShards) else None
    return Dataset(
        sources, val, tokenizer, hashlib.sha256(" ".join(marks).encode()).hexdigest(), sequences
    )
