"""A run's data, opened: its sources and validation sets, and the tokenizer of all of them.

What has to be prepared or looked up first is prepared once, by rank 0, in the run folder; all ranks
then open the same files. The identity is a hash that is equal exactly where the tokens are, so that
a resumed run can refuse other data.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import RootModel

from dist_lm.config import Config, DataConfig, SourceConfig, total_steps
from dist_lm.console import count, notice
from dist_lm.data.lane import StreamSpec
from dist_lm.data.mix import MixtureReader, PreparedReader, StepReader
from dist_lm.data.order import FOR_SHARDS_IN_A_MIXTURE, FOR_STREAM, hash_words
from dist_lm.data.prepared.found import prepared_folders
from dist_lm.data.prepared.holdout import document_hash, held_out
from dist_lm.data.prepared.kept import keep_validation, learn_tokenizer, read_hashes
from dist_lm.data.prepared.manifest import find_prepared
from dist_lm.data.prepared.parts import open_shards, parts_of
from dist_lm.data.prepared.preparing import preparation_of, prepare_dataset
from dist_lm.data.prepared.sequences import TokenSequences
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.remote import fetch_small, is_remote
from dist_lm.data.sources import PreparedSource, Source, StreamSource
from dist_lm.data.text.files import Part, TextFile, find_files
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.disk import write_json
from dist_lm.errors import DataError, UserError
from dist_lm.outside import check, read_json

if TYPE_CHECKING:
    from dist_lm.channel import Channel

Say = Callable[[str], None]


@dataclass(frozen=True)
class Dataset:
    """A run's sources and validation sets by name, opened."""

    sources: dict[str, Source]
    # The only source, where it is prepared shards: its length is known, and any step can be read
    # without those before it.
    alone: PreparedSource | None
    val: dict[str, TokenSequences]
    tokenizer: Tokenizer
    identity: str  # equal exactly where the tokens of all sources are

    @property
    def any_order(self) -> bool:
        """Whether steps can be read in any order."""
        return self.alone is not None

    @property
    def sequences(self) -> int | None:
        """Sequences in an epoch; None: not known beforehand."""
        return self.alone.sequences if self.alone else None

    @property
    def train(self) -> TokenSequences:
        """The shards of the only source."""
        assert self.alone, "a stream or a mixture is not shards"
        return self.alone.shards

    def shards(self) -> list[TokenSequences]:
        """All prepared shards that it reads."""
        found = [*self.val.values()]
        for source in self.sources.values():
            if isinstance(source, PreparedSource):
                found.append(source.shards)
        return found

    def steps(self, config: Config) -> int | None:
        """The length of the run in steps; None: it lasts until the data ends."""
        return total_steps(config, self.sequences)

    def open_reader(
        self,
        data: DataConfig,
        *,
        state: Mapping[str, Any] | None = None,
        rank: int = 0,
        world: int = 1,
        unit: int = 1,
        channel: Channel | None = None,
    ) -> StepReader:
        """The reader of the steps; `state` is where the streams stand. All ranks.

        `unit` is how many neighbouring places of the global batch stay on one rank.
        """
        if self.alone:
            return PreparedReader(self.alone, data.global_batch, rank, world, unit)
        return MixtureReader(
            self.sources, data, state=state, rank=rank, world=world, unit=unit, channel=channel
        )

    def describe(self, data: DataConfig, steps: int | None, world: int) -> list[str]:
        """Lines for the start of a run; `steps` is its length."""
        if self.alone:
            assert steps, "the length of shards is known"
            epochs = steps * data.global_batch / self.alone.sequences
            tail = self.alone.shards.tail_tokens(data.seq_len, data.stride)
            return [
                f"{count(self.alone.sequences, 'sequence')} to train on, for {epochs:.2f} epochs;"
                f" left out at the ends of shards: {count(tail, 'token')}"
            ]
        lines = []
        for name, source in self.sources.items():
            lines += source.describe(data.named_sources()[name].weight, world)
        return lines


def open_dataset(
    config: Config,
    on_main: Callable[[Callable[[], Any]], Any],
    say: Say = notice,
    training: bool = True,
) -> Dataset:
    """Open the sources, after rank 0 has prepared what they need. All ranks."""
    data = config.data
    folder = Path(config.run.dir) / "data"
    prepared = _prepared_inputs(data)
    if _is_one_folder(data):
        (name,) = data.named_sources()

        def prepare() -> None:  # the manifest is read again by each rank
            prepare_dataset(data, folder, _cores(), say, name)

        if not prepared:
            on_main(prepare)
        return _open_prepared(config, name, prepared.get(name, [str(folder)]), training)
    streams = on_main(lambda: _Preparation(config, folder, prepared, say).run())
    return _open_sources(config, folder, prepared, streams)


def look_at_inputs(config: Config, say: Say) -> tuple[dict[str, list[str]], list[TextFile]]:
    """The prepared folders or URLs of a run, by name, and the files of its text. Writes nothing.

    Raises what open_dataset() would raise before it reads any text, so doctor calls this on every
    rank.
    """
    data = config.data
    folder = Path(config.run.dir) / "data"
    prepared = _prepared_inputs(data)
    if not _is_one_folder(data):
        preparation = _Preparation(config, folder, prepared, say)
        files = preparation.look()
        if not files:
            _open_sources(config, folder, prepared, {})
        return prepared, files
    (name,) = data.named_sources()
    if name not in prepared:
        work = preparation_of(data, folder, name, say)
        if not work.look():
            return {}, work.reader.files
        prepared[name] = [str(folder)]
    _open_prepared(config, name, prepared[name], training=True)
    return prepared, []


def validation_folders(config: Config, run_dir: Path) -> dict[str, list[str]]:
    """Where a run that was started has its validation sets, by name; the first one decides.

    Each is in prepared folders or URLs, of which the split `val` is the run's.
    """
    data = config.data
    folder = run_dir / "data"
    prepared = _prepared_inputs(data)
    specs = data.named_sources()
    if _is_one_folder(data):
        (name,) = specs
        return {"val": prepared.get(name, [str(folder)])}
    found = {name: prepared.get(name, [str(folder / "val" / name)]) for name in data.validation}
    for name in specs:
        kept = folder / ("val" if data.stream else "sources") / name
        found["val" if len(specs) == 1 else name] = prepared.get(name, [str(kept)])
    return {name: folders for name, folders in found.items() if find_prepared(folders[0])}


def _prepared_inputs(data: DataConfig) -> dict[str, list[str]]:
    """The prepared folders or URLs of the sources that have such, by name."""
    prepared = {}
    for name, spec in (data.named_sources() | data.validation).items():
        folders = prepared_folders(spec, data.field_of(name))
        if folders:
            prepared[name] = folders
    return prepared


def _is_one_folder(data: DataConfig) -> bool:
    """Whether one prepared folder holds all of a run's data."""
    return len(data.named_sources()) == 1 and not data.stream and not data.validation


# --- opening, on all ranks


def _open_prepared(config: Config, name: str, folders: Sequence[str], training: bool) -> Dataset:
    """The dataset whose only source and whose validation set are the splits of prepared folders."""
    train = _open_alone(config, name, open_shards(folders, "train", config.data))
    val = {"val": open_shards(folders, "val", config.data)}
    return _checked(config, {name: train}, train, val, tokenizer_of(folders[0]), training)


def _open_sources(
    config: Config,
    folder: Path,
    prepared: Mapping[str, list[str]],
    streams: Mapping[str, dict[str, list[Any]]],
) -> Dataset:
    """The dataset of streams, of several sources, or with validation sets of its own."""
    data = config.data
    specs = data.named_sources()
    (first, *_) = next(iter(prepared.values()), [str(folder)])
    tokenizer = tokenizer_of(first)
    excluded = _validation_hashes(config, folder)
    sources: dict[str, Source] = {}
    alone = None
    for name in specs:
        folders = prepared.get(name, [str(folder / "sources" / name)])
        if name in streams:
            sources[name] = _open_stream(config, name, streams[name], tokenizer, excluded)
        elif len(specs) == 1:
            alone = _open_alone(config, name, open_shards(folders, "train", data))
            sources[name] = alone
        else:
            sources[name] = _open_in_mixture(config, name, open_shards(folders, "train", data))
    val = {}
    for name, folders in validation_folders(config, folder.parent).items():
        if config.run.eval_every or name in data.validation:
            val[name] = open_shards(folders, "val", data)
    with_sequences = {name: shards for name, shards in val.items() if shards.count(data)}
    return _checked(config, sources, alone, with_sequences, tokenizer)


def _open_alone(config: Config, name: str, shards: TokenSequences) -> PreparedSource:
    """Prepared shards that are the only source."""
    data = config.data
    source = PreparedSource(name, shards, data.seq_len, data.stride, seed=config.run.seed)
    if config.run.epochs is None:
        return source
    return replace(source, end=config.run.epochs * source.sequences)


def _open_in_mixture(config: Config, name: str, shards: TokenSequences) -> PreparedSource:
    """Prepared shards that are one of several sources, each with an order of its own."""
    data = config.data
    number = zlib.crc32(name.encode())
    seed = int(hash_words(config.run.seed, FOR_SHARDS_IN_A_MIXTURE, number)[0])
    source = PreparedSource(name, shards, data.seq_len, data.stride, seed=seed)
    if data.named_sources()[name].at_end == "repeat":
        return source
    return replace(source, end=source.sequences)


def _open_stream(
    config: Config,
    name: str,
    stream: Mapping[str, list[Any]],
    tokenizer: Tokenizer,
    excluded: frozenset[int],
) -> StreamSource:
    """A stream over the files and parts that rank 0 has found."""
    data = config.data
    spec = data.named_sources()[name]
    files = [TextFile(*file) for file in stream["files"]]
    parts = [Part(*part) for part in stream["parts"]]
    passes = None if spec.at_end == "repeat" else 1
    return StreamSource(
        StreamSpec(
            name=name,
            reader=Reader(spec, files, data.bad_rows, data.field_of(name)),
            parts=parts,
            tokenizer=tokenizer,
            seq_len=data.seq_len,
            lanes=min(data.lanes, len(parts)),
            key=hash_words(config.run.seed, FOR_STREAM, zlib.crc32(name.encode())),
            keep=partial(_keep, data.val_fraction, excluded),
            best_fit=data.packing == "best_fit",
            passes=config.run.epochs or passes,
        )
    )


def _keep(
    val_fraction: float, excluded: frozenset[int], texts: Iterator[str]
) -> Iterator[str] | None:
    """A document's text, unless validation has it."""
    number, texts = document_hash(texts)
    return None if held_out(number, val_fraction) or number in excluded else texts


def tokenizer_of(folder: str) -> Tokenizer:
    """The tokenizer of a prepared folder or URL, or of a run's data folder."""
    if not is_remote(folder):
        return Tokenizer.load(folder)
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            Path(scratch, name).write_bytes(fetch_small(f"{folder}/{name}"))
        return Tokenizer.load(scratch)


def _validation_hashes(config: Config, folder: Path) -> frozenset[int]:
    """Hashes of the documents of data.validation, which are never trained on."""
    hashes: set[int] = set()
    for name in config.data.validation:
        file = folder / "val" / name / "documents.json"
        if file.is_file():
            hashes.update(read_hashes(file))
    return frozenset(hashes)


def _checked(
    config: Config,
    sources: dict[str, Source],
    alone: PreparedSource | None,
    val: dict[str, TokenSequences],
    tokenizer: Tokenizer,
    training: bool = True,
) -> Dataset:
    """The dataset with its identity; raises if it is too small."""
    data = config.data
    specs = data.named_sources()
    val_sequences = sum(shards.count(data) for shards in val.values())
    marks = [tokenizer.sha256]
    for name, source in sources.items():
        if training or not val_sequences:
            source.refuse_too_short(f"{data.field_of(name)}={specs[name].title}")
        marks += source.identity(data.val_fraction)
        if len(sources) > 1:
            marks.append(f"{name} {specs[name].weight} {specs[name].at_end}")
    if config.run.eval_every and not val_sequences:
        tokens = sum(sum(shards.sizes) for shards in val.values())
        raise DataError(
            f"data.val_fraction={data.val_fraction} holds out {tokens} tokens, fewer than one"
            f" sequence; rule: at least {data.seq_len + 1}; nearest: a larger data.val_fraction,"
            " or run.eval_every=0"
        )
    for name, shards in val.items():
        _refuse_unknown_text(name, shards)
    identity = hashlib.sha256(" ".join(marks).encode()).hexdigest()
    dataset = Dataset(sources, alone, val, tokenizer, identity)
    for shards in dataset.shards():
        for part in parts_of(shards):
            _refuse_other_tokenizer(part, tokenizer)
    return dataset


def _refuse_other_tokenizer(shards: TokenShards, tokenizer: Tokenizer) -> None:
    """Refuse shards whose manifest is of another tokenizer than the one beside them."""
    entry = shards.manifest["tokenizer"]
    if (entry["sha256"], entry["vocab_size"]) != (tokenizer.sha256, tokenizer.vocab_size):
        raise DataError(
            f"{shards.folder}/tokenizer.json is not the one that the folder was prepared with"
            f" ({tokenizer.sha256[:12]} with {tokenizer.vocab_size} tokens, not"
            f" {entry['sha256'][:12]} with {entry['vocab_size']}); nearest: prepare again"
        )


def _refuse_unknown_text(name: str, shards: TokenSequences) -> None:
    """Refuse a validation set of which the tokenizer knows nothing but the ends of documents."""
    tokens = 0
    unknown = 0
    ends = 0
    for part in parts_of(shards):
        split = part.manifest["splits"]["val"]
        tokens += split["tokens"]
        unknown += split["unknown"]
        ends += split["documents"]
    if unknown and tokens <= unknown + ends:
        raise DataError(
            f"validation set {name} ({shards.title}): the tokenizer knows nothing of its text, all"
            f" {unknown:,} tokens are unknown; rule: text in the alphabet of what is"
            " trained on; nearest: another data.validation, or data.tokenizer=byte"
        )


# --- preparing, on rank 0


class _Preparation:
    """Makes ready what the sources need: a tokenizer, validation documents, shards, lists of files.

    Each step finds what an earlier start of the run has made, and leaves it as it is.
    """

    def __init__(self, config: Config, folder: Path, prepared: Mapping[str, list[str]], say: Say):
        self._config = config
        self._folder = folder  # where everything is put
        self._prepared = prepared  # inputs that are prepared folders, by name
        self._say = say
        data = config.data
        self._raw = self._readers(data.named_sources())  # sources that are text
        self._raw_validation = self._readers(data.validation)
        # Tokens of a validation set: as many as an evaluation reads.
        self._val_tokens = config.run.eval_batches * data.global_batch * data.seq_len + 1

    def run(self) -> dict[str, dict[str, list[Any]]]:
        """Make everything ready; the files and parts of each stream."""
        data = self._config.data
        self._folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self._make_tokenizer()
        for name, reader in self._raw_validation.items():
            self._keep_validation(name, reader, tokenizer, whole=True)
        excluded = _validation_hashes(self._config, self._folder)
        if excluded and self._prepared:
            self._say(
                "warning: prepared folders are trained on as they are: documents of"
                " data.validation may be in them"
            )
        if not data.stream:
            for name in self._raw:
                own = self._folder / "sources" / name
                prepare_dataset(data, own, _cores(), self._say, name, excluded, tokenizer)
            return {}
        record = self._folder / "streams.json"
        streams = self._find_streams()
        if streams and not record.is_file():
            write_json(record, _files_of(streams))
        for name, reader in self._raw.items():
            self._describe(name, reader, len(streams[name]["parts"]))
            if self._config.run.eval_every and data.val_fraction:
                self._keep_first_held_out(name, reader, tokenizer)
        return streams

    def look(self) -> list[TextFile]:
        """The files of all text. Refuses what run() would; nothing is read or written."""
        if self._prepared:
            self._make_tokenizer()
        if self._config.data.stream:
            self._find_streams()
        else:
            for name in self._raw:
                own = self._folder / "sources" / name
                preparation_of(self._config.data, own, name, self._say).look()
        for reader in self._raw_validation.values():
            reader.refuse_missing_hub()
        readers = [*self._raw.values(), *self._raw_validation.values()]
        return [file for reader in readers for file in reader.files]

    def _find_streams(self) -> dict[str, dict[str, list[Any]]]:
        """The files and parts of each stream, which are as they were when the run began."""
        streams: dict[str, dict[str, list[Any]]] = {}
        for name, reader in self._raw.items():
            parts = reader.parts(self._config.data.lanes)
            streams[name] = {"files": [*reader.files], "parts": [*parts]}
        record = self._folder / "streams.json"
        if record.is_file():
            _refuse_changed(_files_of(streams), _read_record(record))
        return streams

    def _readers(self, specs: Mapping[str, SourceConfig]) -> dict[str, Reader]:
        data = self._config.data
        readers = {}
        for name, spec in specs.items():
            if name not in self._prepared:
                label = data.field_of(name)
                readers[name] = Reader(spec, find_files(spec, label), data.bad_rows, label)
        return readers

    def _make_tokenizer(self) -> Tokenizer:
        """The one tokenizer of the prepared folders, or else one learned for the run."""
        if not self._prepared:
            learn_tokenizer(self._config.data, [*self._raw.values()], self._folder, self._say)
            return tokenizer_of(str(self._folder))
        first, *others = [folder for folders in self._prepared.values() for folder in folders]
        tokenizer = tokenizer_of(first)
        for other in others:
            if tokenizer_of(other).sha256 != tokenizer.sha256:
                raise DataError(
                    f"{other} has another tokenizer than {first}; rule: one for all; nearest:"
                    f" prepare it with --tokenizer {first}"
                )
        return tokenizer

    def _keep_validation(
        self, name: str, reader: Reader, tokenizer: Tokenizer, whole: bool
    ) -> None:
        keep_validation(
            self._config.data,
            reader,
            tokenizer,
            self._folder / "val" / name,
            self._val_tokens,
            self._say,
            whole=whole,
        )

    def _keep_first_held_out(self, name: str, reader: Reader, tokenizer: Tokenizer) -> None:
        """Keep a stream's first held-out documents, which validate it."""
        try:
            self._keep_validation(name, reader, tokenizer, whole=False)
        except UserError as error:
            if not self._config.data.validation:
                raise
            self._say(f"warning: no validation of its own for {name}: {error}")

    def _describe(self, name: str, reader: Reader, parts: int) -> None:
        """Say what of a stream's files a user may not expect."""
        lanes = self._config.data.lanes
        if parts < lanes:
            self._say(
                f"{reader.spec.title} has {count(parts, 'part')}, so {name} is read in as many"
                f" lanes, not data.lanes={lanes}"
            )
        names = [file.name for file in reader.files]
        read_again = [file for file in names if not file.endswith((".parquet", ".jsonl"))]
        if read_again:
            self._say(
                f"{name}: a resumed run reads {len(read_again)} of its files, such as"
                f" {read_again[0]}, from their beginnings"
            )


def _files_of(streams: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, list[list[Any]]]:
    """The files of each stream, as streams.json has them."""
    return {name: [list(file) for file in stream["files"]] for name, stream in streams.items()}


class _StreamsRecord(RootModel[dict[str, list[tuple[str, str, int, str]]]]):
    """The files of each stream, as `TextFile`s."""


def _read_record(record: Path) -> dict[str, list[list[Any]]]:
    def refuse(why: str) -> UserError:
        return DataError(f"{record}: {why}; nearest: a new run.dir")

    content = read_json(record, refuse)
    check(content, _StreamsRecord, refuse)
    return content


def _refuse_changed(
    now: Mapping[str, list[list[Any]]], before: Mapping[str, list[list[Any]]]
) -> None:
    """Refuse files that are not as they were when the run began: its cursors would not fit them."""
    rule = "rule: a stream's files stay; nearest:"
    for name, files in before.items():
        # Size and mark of each file by its name; the path in between may change.
        found = {file: marks for file, _, *marks in now.get(name, [])}
        for file, path, *marks in files:
            if found.pop(file, None) != marks:
                raise DataError(
                    f"{path or file} of {name} changed or vanished since the run began; {rule}"
                    " restore it, or start a new run.dir"
                )
        for file in found:
            raise DataError(
                f"{file} of {name} was not there when the run began; {rule} move it away, or start"
                " a new run.dir"
            )


def _cores() -> int:
    return len(os.sched_getaffinity(0))
