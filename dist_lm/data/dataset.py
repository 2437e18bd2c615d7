"""A run's data, opened: its sources and validation sets, and the tokenizer of all of them.

What has to be prepared or looked up first is prepared once, by rank 0, in the run folder; all ranks
then open the same files. The identity is a hash that is equal exactly where the tokens are, so that
a resumed run can refuse other data.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lm.config import Config, DataConfig, total_steps
from dist_lm.console import count, notice
from dist_lm.data.groundwork import Groundwork, prepare_alone
from dist_lm.data.lane import StreamSpec
from dist_lm.data.mix import MixtureReader, PreparedReader, StepReader
from dist_lm.data.order import FOR_SHARDS_IN_A_MIXTURE, FOR_STREAM, hash_words
from dist_lm.data.prepared.found import prepared_folders
from dist_lm.data.prepared.holdout import document_hash, held_out
from dist_lm.data.prepared.kept import validation_hashes
from dist_lm.data.prepared.manifest import find_prepared
from dist_lm.data.prepared.parts import open_shards, parts_of
from dist_lm.data.prepared.preparing import preparation_of
from dist_lm.data.prepared.progress import Say
from dist_lm.data.prepared.sequences import TokenSequences
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.public_facts import PublicFacts, facts_of_shards
from dist_lm.data.sources import PreparedSource, Source, StreamSource
from dist_lm.data.text.files import Part, TextFile
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer import Tokenizer, tokenizer_of
from dist_lm.errors import DataError

if TYPE_CHECKING:
    from dist_lm.channel import Channel


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

    def check_sizes(self) -> None:
        """Refuse local shards that are missing or have another size than in their manifest."""
        for sequences in self.shards():
            for part in parts_of(sequences):
                part.check_sizes()

    def public_facts(self, data: DataConfig) -> tuple[list[PublicFacts], list[PublicFacts]]:
        """What a model card tells of the sources, and of the validation sets."""
        specs = data.named_sources()
        sources = [source.public_facts(specs[name]) for name, source in self.sources.items()]
        held_out = []
        for name, shards in self.val.items():
            spec = data.validation.get(name, data.as_source())
            held_out.append(facts_of_shards(name, spec, shards))
        return sources, held_out

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
        if not prepared:
            on_main(lambda: prepare_alone(data, folder, name, say))
        opened = _open_prepared(config, name, prepared.get(name, [str(folder)]), training)
    else:
        streams = on_main(lambda: Groundwork(config, folder, prepared, say).run())
        opened = _open_sources(config, folder, prepared, streams)
    # Only rank 0 looks at each file: thousands of ranks would ask a shared disk for millions.
    on_main(opened.check_sizes)
    return opened


def look_at_inputs(config: Config, say: Say) -> tuple[dict[str, list[str]], list[TextFile]]:
    """The prepared folders or URLs of a run, by name, and the files of its text. Writes nothing.

    Raises what open_dataset() would raise before it reads any text, so doctor calls this on every
    rank.
    """
    data = config.data
    folder = Path(config.run.dir) / "data"
    prepared = _prepared_inputs(data)
    if not _is_one_folder(data):
        files = Groundwork(config, folder, prepared, say).look()
        if not files:
            _open_sources(config, folder, prepared, {}).check_sizes()
        return prepared, files
    (name,) = data.named_sources()
    if name not in prepared:
        work = preparation_of(data, folder, name, say)
        if not work.look():
            return {}, work.reader.files
        prepared[name] = [str(folder)]
    _open_prepared(config, name, prepared[name], training=True).check_sizes()
    return prepared, []


def validation_folders(config: Config, run_dir: Path) -> dict[str, list[str]]:
    """The folders of a started run's validation sets, by name; the first one decides.

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


# --- opening


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
    excluded = validation_hashes(folder, data.validation)
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
