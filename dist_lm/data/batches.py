"""Shards and streams -> batches in order, read ahead.

A batch is a pure function of (seed, step), of streams also of where they stood before it: `Batches` asks order.py which
sequences a rank trains on, and threads that read ahead change only the speed. All ranks get micro-batches of equal
shape and number; what a rank lacks is filled with rows that have no targets.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dist_lm.config import Config, DataConfig, Plan, UserError
from dist_lm.data.formats import Part, Reader, Source, find_sources
from dist_lm.data.order import Ints, Mixture, hash_words, rank_places, row_keys, sequence_ids
from dist_lm.data.preparing import (
    BAD_DATA,
    document_hash,
    held_out,
    keep_validation,
    learn_tokenizer,
    prepare_dataset,
)
from dist_lm.data.remote import ShardCache, fetch_small, is_remote
from dist_lm.data.shards import TokenShards, find_prepared, write_json
from dist_lm.data.stream import Recipe, Row, Stream
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.model.gpt import NO_TARGET

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ORDER_STEPS = 64  # steps whose order is computed at once: one numpy call costs as much as thousands of positions
_AHEAD = 4  # batches read ahead per worker


@dataclass(frozen=True)
class Micro:
    """The rows of one forward and backward."""

    tokens_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor | None  # document numbers, when documents must not see each other
    dropout_keys_B: Tensor | None  # one hash a row, from which its dropout masks follow

    def each(self, change: Callable[[Tensor], Tensor]) -> Micro:
        """The same done to each tensor there is."""
        changed = (t if t is None else change(t) for t in self.__dict__.values())
        return Micro(*changed)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Batch:
    """This rank's part of one step's global batch."""

    micros: list[Micro]
    targets: int  # how many on this rank
    row_hashes: int  # sum of a hash of each row and its place: adds up over ranks to one value for the global batch
    end: bool = False  # no rank has a row: the data is used up
    after: dict[str, Any] = field(default_factory=dict)  # where the streams stand after it, as far as this rank reads
    shares: dict[str, float] = field(default_factory=dict)  # of a mixture: asked and actual share, and passes


class Batches:
    """Batches one after another from `first_step`; an index of steps starts at 0."""

    def __init__(
        self, source: TokenShards | Mix, data: DataConfig, plan: Plan, rank: int, device: torch.device, *,
        seed: int, eot: int, first_step: int = 0, end_position: int | None = None, dropout: bool = False,
        hash_rows: bool = False,
    ):  # fmt: skip
        self.source, self.data, self.plan, self.device = source, data, plan, device
        self.seed, self.eot, self.dropout, self.hash_rows = seed, eot, dropout, hash_rows
        self.places = rank_places(rank, plan.world_size, data.global_batch)
        self.end_position = end_position  # positions from here on have no targets
        self.next_step = first_step
        self._order = lru_cache(maxsize=2)(self._compute_order)
        # The steps of a mixture are read in order, by one thread that others help.
        threads = min(data.workers, 1) if isinstance(source, Mix) else data.workers
        self._pool = ThreadPoolExecutor(threads, "batches") if threads else None
        self._ahead: deque[Future[Batch]] = deque()

    def take(self) -> Batch:
        """The next batch, on the device."""
        if self._pool is None:
            batch = self.read(self.next_step)
        else:
            while len(self._ahead) <= _AHEAD * self.data.workers:
                self._ahead.append(self._pool.submit(self.read, self.next_step + len(self._ahead)))
            batch = self._ahead.popleft().result()
        self.next_step += 1
        moved = [micro.each(lambda tensor: tensor.to(self.device, non_blocking=True)) for micro in batch.micros]
        return replace(batch, micros=moved)

    def read(self, step: int) -> Batch:
        """Read a step's rows and cut them into micro-batches; a function of (seed, step, rank, plan), of a mixture of
        where its streams stand too."""
        length, positions = self.data.seq_len, step * self.data.global_batch + self.places
        rows = self.plan.micro_batch * self.plan.accumulation
        table, row_targets, found = np.zeros((rows, length + 1), np.int64), np.zeros(rows, np.int64), {}
        if isinstance(self.source, Mix):
            found = self.source.read(step, table, row_targets)
        else:
            real = len(positions) if self.end_position is None else int((positions < self.end_position).sum())
            chunk, inside = divmod(step, _ORDER_STEPS)
            if real:
                table[:real] = self.source.read(self._order(chunk)[inside][:real], length, self.data.stride)
            row_targets[:real] = length
        tokens_NT, targets_NT = table[:, :-1], table[:, 1:].copy()
        for row in np.flatnonzero(row_targets < length):
            targets_NT[row, row_targets[row] :] = NO_TARGET
        segments_NT = None
        if self.data.document_mask:  # what follows an end of text belongs to the next document
            ends = tokens_NT == self.eot
            targets_NT[ends] = NO_TARGET
            segments_NT = self._tensor(np.cumsum(ends, axis=1) - ends)
        keys_N = None
        if self.dropout:
            keys = np.zeros(rows, dtype=np.int64)
            keys[: len(positions)] = row_keys(self.seed, positions)
            keys_N = self._tensor(keys)
        whole = Micro(self._tensor(tokens_NT), self._tensor(targets_NT), segments_NT, keys_N)
        size = self.plan.micro_batch
        micros = [whole.each(itemgetter(slice(at, at + size))) for at in range(0, rows, size)]
        filled = np.flatnonzero(row_targets)
        hashes = _hash_rows(table[filled], self.places[filled]) if self.hash_rows else 0
        return Batch(micros, int((targets_NT != NO_TARGET).sum()), hashes, **found)

    def close(self) -> None:
        """Stop reading ahead. The ranks read a mixture together, each as far ahead: what they began they finish."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=not isinstance(self.source, Mix))
        if isinstance(self.source, Mix):
            self.source.close()

    def _compute_order(self, chunk: int) -> Ints:
        assert isinstance(self.source, TokenShards)
        steps = np.arange(chunk * _ORDER_STEPS, (chunk + 1) * _ORDER_STEPS, dtype=np.int64)
        positions = (steps[:, None] * self.data.global_batch + self.places).reshape(-1)
        return sequence_ids(positions, self.source.count(self.data), self.seed).reshape(len(steps), -1)

    def _tensor(self, array: Ints) -> Tensor:
        import torch  # slow, and preparing needs none of it

        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def _hash_rows(rows_NT: Ints, places: Ints) -> int:
    total = 0
    for place, row in zip(places, rows_NT.astype("<u4"), strict=True):
        total += int.from_bytes(hashlib.blake2b(row.tobytes() + int(place).to_bytes(8), digest_size=8).digest())
    return (total + 2**63) % 2**64 - 2**63  # a signed 64-bit integer, whose sums over ranks wrap alike everywhere


# --- several sources, or streams


class Exchange(Protocol):
    """What ranks that read streams need of each other; runtime.Channel is one."""

    def gather(self, value: Any) -> list[Any]: ...
    def exchange(self, parts: list[Tensor], lengths: list[int]) -> list[Tensor]: ...


class Mix:
    """The rows of each step from several sources by weight. Streams stand where the last step left them, so steps are
    read in order. Every rank follows the whole order; the rows of a lane go from the rank that reads it to the one that
    trains on them."""

    def __init__(
        self, dataset: Dataset, data: DataConfig, seed: int, *, state: Mapping[str, Any] | None = None, rank: int = 0,
        world: int = 1, channel: Exchange | None = None,
    ):  # fmt: skip
        self.dataset, self.data, self.seed = dataset, data, seed
        self.rank, self.world, self.channel = rank, world, channel
        state = state or {"streams": {}, "ended": [], "end": None}
        self.ended: list[list[int]] = [list(event) for event in state["ended"]]  # [first position without it, source]
        self.end: int | None = state["end"]  # the first position that no source fills, once it is known
        self._pool = ThreadPoolExecutor(data.workers, "lanes") if data.workers else None
        gather = channel.gather if channel and world > 1 else lambda value: [value]
        self.streams = {
            name: Stream(source, state["streams"].get(name), rank=rank, world=world, gather=gather, pool=self._pool,
                         shift=number)
            for number, (name, source) in enumerate(dataset.sources.items()) if isinstance(source, Recipe)
        }  # fmt: skip
        self.origins: dict[int, tuple[str, int | Row]] = {}  # source, and sequence, of each own place of the last step
        self._plan_mixture()

    def _plan_mixture(self) -> None:
        specs, batch = self.data.named_sources(), self.data.global_batch
        changes = [(0, [spec.weight for spec in specs.values()])]
        for stage in self.data.stages:
            changes.append((stage.from_step * batch, [stage.weights.get(name, 0.0) for name in specs]))
        starts = sorted({start for start, _ in changes} | {start for start, _ in self.ended})
        self.stages: list[tuple[int, list[float]]] = []
        for start in starts:
            weights = [weights for at, weights in changes if at <= start][-1]
            gone = {source for at, source in self.ended if at <= start}
            left = [0.0 if n in gone else weight for n, weight in enumerate(weights)]
            if not sum(left):
                self.end = start if self.end is None else min(start, self.end)
                break
            self.stages.append((start, left))
        self.mixture = Mixture(self.stages)

    def read(self, step: int, table: Ints, row_targets: Ints) -> dict[str, Any]:
        """Fill this rank's rows; where the streams stand afterwards. All ranks."""
        batch, length = self.data.global_batch, self.data.seq_len
        sources, earlier = self.mixture.at(step * batch + np.arange(batch))
        moves: list[tuple[int, int, Row | None]] = []  # (place, rank that has read it, row)
        given, following, self.origins = 0, (step + 1) * batch, {}
        over = self.end is not None and step * batch >= self.end
        for number, (name, source) in enumerate(self.dataset.sources.items() if not over else ()):
            wanted = np.flatnonzero(sources == number)
            if isinstance(source, TokenShards):
                count = source.count(self.data)
                repeats = self.data.named_sources()[name].at_end == "repeat"
                inside = wanted if repeats else wanted[earlier[wanted] < count]
                own = inside[inside % self.world == self.rank]
                ids = sequence_ids(earlier[own], count, int(hash_words(self.seed, 9, zlib.crc32(name.encode()))[0]))
                table[own // self.world] = source.read(ids, length, self.data.stride)
                row_targets[own // self.world] = length
                self.origins |= {place: (name, made) for place, made in zip(own.tolist(), ids.tolist(), strict=True)}
                dealt = len(inside)
            else:
                stream = self.streams[name]
                rows = stream.deal(len(wanted))
                for place, (lane, row) in zip(wanted.tolist(), rows, strict=False):
                    moves.append((place, stream.owner(lane), row))
                    if row is not None:
                        self.origins[place] = name, row
                dealt = len(rows)
            given += dealt
            if dealt < len(wanted):  # its last pass has ended; the other places of this step stay without targets
                self.ended.append([following, number])
                if self.data.named_sources()[name].at_end != "hand_on":
                    self.end = following
        self._deliver(moves, table, row_targets)
        if self.ended and self.ended[-1][0] == following:
            self._plan_mixture()
        after = {"streams": {name: stream.snapshot() for name, stream in self.streams.items()}, "ended": [*self.ended],
                 "end": self.end}  # fmt: skip
        return {"end": not given, "after": after, "shares": self.shares(step)}

    def shares(self, step: int) -> dict[str, float]:
        """Asked and actual share of the sequences of this stage, and the passes begun, of each source up to a step."""
        position, figures = (step + 1) * self.data.global_batch, {}
        start, weights = max(stage for stage in self.stages if stage[0] < position)
        for number, name in enumerate(self.dataset.sources):
            before, now = (int(self.mixture.before(at)[number]) for at in (start, position))
            figures[f"asked_{name}"] = weights[number] / sum(weights)
            figures[f"share_{name}"] = (now - before) / (position - start)
            source = self.dataset.sources[name]
            stream = self.streams.get(name)
            figures[f"passes_{name}"] = stream.passed if stream else now / source.count(self.data)  # type: ignore[union-attr]
        return figures

    def _deliver(self, moves: Sequence[tuple[int, int, Row | None]], table: Ints, row_targets: Ints) -> None:
        """Put rows where they are trained on, over the network where another rank has read them. All ranks."""
        width = self.data.seq_len + 2
        sent: list[list[np.ndarray]] = [[] for _ in range(self.world)]
        wanted: list[list[int]] = [[] for _ in range(self.world)]
        for place, owner, made in moves:
            to = place % self.world
            if made is not None:
                packed = np.zeros(width, np.int64)
                packed[0], packed[1 : 1 + len(made.tokens)] = len(made.tokens) - 1, made.tokens
                sent[to].append(packed)
            if to == self.rank:
                wanted[owner].append(place // self.world)
        received = [np.concatenate(rows) if rows else np.empty(0, np.int64) for rows in sent]
        if any(place % self.world != owner for place, owner, _ in moves):
            assert self.channel, "several ranks have a channel"
            import torch  # slow, and preparing needs none of it

            lengths = [len(rows) * width for rows in wanted]
            tensors = [torch.from_numpy(part) for part in received]
            received = [tensor.numpy() for tensor in self.channel.exchange(tensors, lengths)]
        for rows, values_of_rank in zip(wanted, received, strict=True):
            for row, values in zip(rows, values_of_rank.reshape(-1, width), strict=True):
                row_targets[row], table[row] = values[0], values[1:]

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)


def merge_after(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the streams stand, from what each rank reads of them."""
    merged: dict[str, Any] = json.loads(json.dumps(ranks[0]))
    for theirs in ranks[1:]:
        for name, stream in theirs.get("streams", {}).items():
            merged["streams"][name]["lanes"].update(stream["lanes"])
    return merged


def count_left_out(after: Mapping[str, Any]) -> dict[str, int]:
    """What the streams left out, up to the end of the blocks they stand in: filtered and bad rows, empty documents."""
    total = Counter[str]()
    for stream in after.get("streams", {}).values():
        for cursor in stream["lanes"].values():
            total.update(cursor.get("left_out", {}))
    return dict(sorted(total.items()))


# --- a run's data


@dataclass(frozen=True)
class Dataset:
    """A run's sources and validation sets by name, opened."""

    sources: dict[str, TokenShards | Recipe]
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
    config: Config, on_main: Callable[[Callable[[], Any]], Any], say: Callable[[str], None] = print,
    training: bool = True,
) -> Dataset:  # fmt: skip
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
    sources: dict[str, TokenShards | Recipe] = {}
    val = {n: _open_shards(prepared.get(n, str(folder / "val" / n)), "val", data) for n in data.validation}
    for name, spec in specs.items():
        if name in streams:
            reader = Reader(
                spec, [Source(*file) for file in streams[name]["files"]], data.bad_rows, data.field_of(name)
            )
            parts = [Part(*part) for part in streams[name]["parts"]]
            sources[name] = Recipe(
                reader, parts, tokenizer, data.seq_len, min(data.lanes, len(parts)),
                hash_words(config.run.seed, 5, zlib.crc32(name.encode())), partial(_keep, data.val_fraction, excluded),
                data.packing == "best_fit", config.run.epochs or (None if spec.at_end == "repeat" else 1),
            )  # fmt: skip
            own = str(folder / "val" / name)
        else:
            own = prepared.get(name, str(folder / "sources" / name))
            sources[name] = _open_shards(own, "train", data)
        if config.run.eval_every and find_prepared(own):
            val["val" if len(specs) == 1 else name] = _open_shards(own, "val", data)
    return _check(config, sources, {name: shards for name, shards in val.items() if shards.count(data)}, tokenizer)


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
        name: Reader(spec, find_sources(spec, data.field_of(name)), data.bad_rows, data.field_of(name))
        for name, spec in (specs | data.validation).items() if name not in prepared
    }  # fmt: skip
    raw = [name for name in specs if name in readers]
    folder.mkdir(parents=True, exist_ok=True)
    if not prepared:
        learn_tokenizer(data, [readers[name] for name in raw], folder, say)
    first, *others = prepared.values() or [str(folder)]
    tokenizer = _tokenizer_of(first)
    for other in others:
        if _tokenizer_of(other).sha256 != tokenizer.sha256:
            raise UserError(f"{other} has another tokenizer than {first}; rule: one for all; nearest: prepare it"
                            f" with --tokenizer {first}", BAD_DATA)  # fmt: skip
    wanted = config.run.eval_batches * data.global_batch * data.seq_len + 1
    for name in data.validation:
        if name in readers:
            keep_validation(data, readers[name], tokenizer, folder / "val" / name, wanted, say, whole=True)
    excluded = _validation_hashes(config, folder)
    if excluded and prepared:
        say("warning: prepared folders are trained on as they are: documents of data.validation may be in them")
    if not data.stream:
        for name in raw:
            prepare_dataset(data, folder / "sources" / name, _cores(), say, name, excluded, tokenizer)
        return {}
    streams: dict[str, dict[str, list[Any]]] = {
        name: {"files": [*readers[name].sources], "parts": [*readers[name].parts(data.lanes)]} for name in raw
    }
    _refuse_changed(streams, folder / "streams.json")
    for name in raw:
        if len(streams[name]["parts"]) < data.lanes:
            say(f"{specs[name].input} has {len(streams[name]['parts'])} parts, so {name} is read in as many lanes, not"
                f" data.lanes={data.lanes}")  # fmt: skip
        packed = [file.name for file in readers[name].sources if not file.name.endswith((".parquet", ".jsonl"))]
        if packed:
            say(f"{name}: a resumed run reads {len(packed)} of its files, such as {packed[0]}, from their beginnings")
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
        have = {file: marks for file, _, *marks in now.get(name, [])}  # where a file lies may change
        for file, path, *marks in files:
            if have.pop(file, None) != marks:
                raise UserError(f"{path or file} of {name} changed or vanished since the run began; rule: a stream's"
                                " files stay; nearest: restore it, or start a new run.dir", BAD_DATA)  # fmt: skip
        for path in have:
            raise UserError(f"{path} of {name} was not there when the run began; rule: a stream's files stay; nearest:"
                            " move it away, or start a new run.dir", BAD_DATA)  # fmt: skip


def _validation_hashes(config: Config, folder: Path) -> frozenset[int]:
    """Hashes of the documents of data.validation, which are never trained on."""
    files = [folder / "val" / name / "documents.json" for name in config.data.validation]
    return frozenset(number for file in files if file.is_file() for number in json.loads(file.read_bytes()))


def _keep(val_fraction: float, excluded: frozenset[int], texts: Iterator[str]) -> Iterator[str] | None:
    number, texts = document_hash(texts)
    return None if held_out(number, val_fraction) or number in excluded else texts


def _check(
    config: Config, sources: dict[str, TokenShards | Recipe], val: dict[str, TokenShards], tokenizer: Tokenizer,
    training: bool = True,
) -> Dataset:  # fmt: skip
    """Refuse what is too small; the identity of it all."""
    data, specs, marks = config.data, config.data.named_sources(), [tokenizer.sha256]
    for name, source in sources.items():
        if isinstance(source, Recipe):
            options = specs[name].model_dump(mode="json", exclude={"input", "weight", "revision"})
            files = [[file.name, file.size, file.mark if not file.path else ""] for file in source.reader.sources]
            marks.append(json.dumps([name, options, files, data.val_fraction]))
        else:
            if not source.count(data) and (training or not sum(shards.count(data) for shards in val.values())):
                raise UserError(
                    f"data.seq_len={data.seq_len} needs {data.seq_len + 1} tokens in one shard, {data.field_of(name)}="
                    f"{specs[name].input} has {sum(source.sizes)} to train on; nearest:"
                    f" {max(max(source.sizes, default=0) - 1, 1)}", BAD_DATA
                )  # fmt: skip
            marks += [shard["sha256"] for split in source.manifest["splits"].values() for shard in split["shards"]]
        if len(sources) > 1:
            marks.append(f"{name} {specs[name].weight} {specs[name].at_end}")
    if config.run.eval_every and not sum(shards.count(data) for shards in val.values()):
        tokens = sum(sum(shards.sizes) for shards in val.values())
        raise UserError(
            f"data.val_fraction={data.val_fraction} holds out {tokens} tokens, fewer than one sequence; rule:"
            f" at least {data.seq_len + 1}; nearest: a larger data.val_fraction, or run.eval_every=0", BAD_DATA
        )  # fmt: skip
    (first, *others) = sources.values()
    sequences = first.count(data) if not others and isinstance(first, TokenShards) else None
    return Dataset(sources, val, tokenizer, hashlib.sha256(" ".join(marks).encode()).hexdigest(), sequences)
