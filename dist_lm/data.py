"""Shards -> batches in order, read ahead; and raw text -> shards.

A batch is a pure function of (seed, step): `Batches` asks order.py which sequences a rank trains on, and threads that
read ahead change only the speed. All ranks get micro-batches of equal shape and number; what a rank lacks is filled
with rows that have no targets.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, count, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dist_lm.config import Config, DataConfig, Plan, UserError
from dist_lm.model import NO_TARGET
from dist_lm.order import Ints, rank_places, row_keys, sequence_ids
from dist_lm.shards import (
    FORMAT,
    MANIFEST,
    TokenShards,
    find_prepared,
    read_manifest,
    write_file,
    write_json,
    write_shard,
)
from dist_lm.sources import Source, find_sources, read_documents
from dist_lm.text import (
    NoCutError,
    Tokenizer,
    cutter,
    is_trained_spec,
    load_tokenizer,
    read_frame,
    train_tokenizer,
    write_frame,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BAD_DATA = 65
_ORDER_STEPS = 64  # steps whose order is computed at once: one numpy call costs as much as thousands of positions
_AHEAD = 4  # batches read ahead per worker


@dataclass(frozen=True)
class Micro:
    """The rows of one forward and backward."""

    tokens_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor | None  # document numbers, when documents must not see each other
    dropout_keys_B: Tensor | None  # one hash a row, from which its dropout masks follow

    def to(self, device: torch.device) -> Micro:
        moved = (t if t is None else t.to(device, non_blocking=True) for t in self.__dict__.values())
        return Micro(*moved)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Batch:
    """This rank's part of one step's global batch."""

    micros: list[Micro]
    targets: int  # how many on this rank
    row_hashes: int  # sum of a hash of each row and its place: adds up over ranks to one value for the global batch


class Batches:
    """Batches of a split, one after another from `first_step`; an index of steps starts at 0."""

    def __init__(
        self, shards: TokenShards, data: DataConfig, plan: Plan, rank: int, device: torch.device, *,
        seed: int, eot: int, first_step: int = 0, end_position: int | None = None, dropout: bool = False,
        hash_rows: bool = False,
    ):  # fmt: skip
        self.shards, self.data, self.plan, self.device = shards, data, plan, device
        self.seed, self.eot, self.dropout, self.hash_rows = seed, eot, dropout, hash_rows
        self.count = sum(shards.counts(data.seq_len, data.stride))  # sequences in an epoch
        self.places = rank_places(rank, plan.world_size, data.global_batch)
        self.end_position = end_position  # positions from here on have no targets
        self.next_step = first_step
        self._order = lru_cache(maxsize=2)(self._compute_order)
        self._pool = ThreadPoolExecutor(data.workers, "batches") if data.workers else None
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
        return Batch([micro.to(self.device) for micro in batch.micros], batch.targets, batch.row_hashes)

    def ids(self, step: int) -> Ints:
        """The sequences of this rank's places at a step."""
        chunk, inside = divmod(step, _ORDER_STEPS)
        ids: Ints = self._order(chunk)[inside]
        return ids

    def read(self, step: int) -> Batch:
        """Read a step's rows and cut them into micro-batches; a function of (seed, step, rank, plan) alone."""
        length, positions = self.data.seq_len, step * self.data.global_batch + self.places
        real = len(positions) if self.end_position is None else int((positions < self.end_position).sum())
        rows = self.plan.micro_batch * self.plan.accumulation
        table = np.zeros((rows, length + 1), dtype=np.int64)
        if real:
            table[:real] = self.shards.read(self.ids(step)[:real], length, self.data.stride)
        tokens_NT, targets_NT = table[:, :-1], table[:, 1:].copy()
        targets_NT[real:] = NO_TARGET
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
        tokens, targets = self._tensor(tokens_NT), self._tensor(targets_NT)
        size = self.plan.micro_batch
        cuts = [slice(at, at + size) for at in range(0, rows, size)]
        micros = [
            Micro(tokens[c], targets[c], segments_NT if segments_NT is None else segments_NT[c],
                  keys_N if keys_N is None else keys_N[c])
            for c in cuts
        ]  # fmt: skip
        hashes = _hash_rows(table[:real], self.places) if self.hash_rows else 0
        return Batch(micros, int((targets_NT != NO_TARGET).sum()), hashes)

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _compute_order(self, chunk: int) -> Ints:
        steps = np.arange(chunk * _ORDER_STEPS, (chunk + 1) * _ORDER_STEPS, dtype=np.int64)
        positions = (steps[:, None] * self.data.global_batch + self.places).reshape(-1)
        return sequence_ids(positions, self.count, self.seed).reshape(len(steps), -1)

    def _tensor(self, array: Ints) -> Tensor:
        import torch  # slow, and preparing needs none of it

        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def _hash_rows(rows_NT: Ints, places: Ints) -> int:
    total = 0
    for place, row in zip(places, rows_NT.astype("<u4"), strict=False):
        total += int.from_bytes(hashlib.blake2b(row.tobytes() + int(place).to_bytes(8), digest_size=8).digest())
    return (total + 2**63) % 2**64 - 2**63  # a signed 64-bit integer, whose sums over ranks wrap alike everywhere


# --- a run's data


@dataclass(frozen=True)
class Dataset:
    """A prepared folder, opened."""

    train: TokenShards
    val: TokenShards
    tokenizer: Tokenizer
    train_sequences: int  # in an epoch
    identity: str  # hash of the tokenizer and of every shard's hash: equal exactly where the tokens are


def open_dataset(config: Config, on_main: Callable[[Callable[[], Any]], Any]) -> Dataset:
    """Open `data.input`; raw text is prepared first, once, into the run folder, by rank 0 while the others wait."""
    data, folder = config.data, Path(config.data.input)
    if not find_prepared(folder):
        folder = Path(config.run.dir) / "data"
        on_main(lambda: prepare_dataset(data, folder, len(os.sched_getaffinity(0))) and None)
    tokenizer = Tokenizer.load(folder)
    train, val = TokenShards(folder, "train"), TokenShards(folder, "val")
    sequences = {split: sum(s.counts(data.seq_len, data.stride)) for split, s in (("train", train), ("val", val))}
    if not sequences["train"]:
        raise UserError(
            f"data.seq_len={data.seq_len} needs {data.seq_len + 1} tokens in one shard, data.input={data.input} has"
            f" {sum(train.sizes)} to train on; nearest: {max(max(train.sizes, default=0) - 1, 1)}", BAD_DATA
        )  # fmt: skip
    if config.run.eval_every and not sequences["val"]:
        raise UserError(
            f"data.val_fraction={data.val_fraction} holds out {sum(val.sizes)} tokens, fewer than one sequence; rule:"
            f" at least {data.seq_len + 1}; nearest: a larger data.val_fraction, or run.eval_every=0", BAD_DATA
        )  # fmt: skip
    hashes = [train.manifest["tokenizer"]["sha256"]]
    hashes += [shard["sha256"] for split in train.manifest["splits"].values() for shard in split["shards"]]
    identity = hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    return Dataset(train, val, tokenizer, sequences["train"], identity)


# --- raw text -> shards

SHARD_TOKENS = 2**25
SMALL = 100  # documents; a smaller source holds out the tail of its text instead of whole documents
PROGRESS = "progress.json"
JOB, JOB_PIECES = 2**20, 2**13  # characters, and texts at most, in one job of an encoding process
WORKER = "import sys; from dist_lm.text import serve; serve(sys.argv[1])"
_HASHED = 2**20  # characters of a document that decide whether it is held out
_DECIDING = ("input", "text_column", "separator", "tokenizer", "val_fraction")  # fields that decide the content


class Piece(NamedTuple):
    """A stretch of a document, encoded at once; its place counts documents of the split and pieces of the document."""

    split: str
    place: tuple[int, int]
    source: int
    row: int
    text: str  # empty if its tokens are in a finished shard
    last: bool


def prepare_dataset(
    data: DataConfig, folder: str | Path, processes: int = 1, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Make a prepared folder of `data.input`, or go on with one; the manifest. One process calls it."""
    folder, settings = Path(folder), {name: getattr(data, name) for name in _DECIDING}
    if find_prepared(folder):
        manifest = read_manifest(folder)
        _refuse_other(folder, manifest["settings"], settings)
        say(f"{folder}: prepared before, used as it is")
        return manifest
    if find_prepared(data.input):
        raise UserError(f"data.input={data.input!r} is a prepared folder already; rule: text", BAD_DATA)
    sources = [s for s in find_sources(data) if not s.path or folder.resolve() not in Path(s.path).resolve().parents]
    listed = [{"name": source.name, "bytes": source.size} for source in sources]
    state = _read_progress(folder, settings, listed)
    if state is None:
        tokenizer, state = _survey(data, sources, say)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in tokenizer.files().items():
            write_file(folder / name, [text.encode()])
        state |= {"settings": settings, "sources": listed, "tokenizer": tokenizer.sha256, "splits": {}}
        write_json(folder / PROGRESS, state)
    else:
        tokenizer = Tokenizer.load(folder)
        done = sum(len(split["shards"]) for split in state["splits"].values())
        say(f"{folder}: going on after {done} finished shards; their text is read again but not encoded again")
    counts = {split: {"documents": 0, "bytes": 0} for split in ("train", "val")}
    skipped: Counter[str] = Counter()
    writers = {split: _Writer(folder, split, tokenizer, state) for split in counts}
    pieces = _pieces(data, sources, tokenizer, state["tail"], counts, skipped)
    pieces = (piece._replace(text="") if piece.place < writers[piece.split].place else piece for piece in pieces)
    progress = Progress("prepared", state["bytes"], sources, say)
    for piece, ids in _encode(pieces, tokenizer, folder, processes):
        if ids is not None:
            writers[piece.split].add(piece, ids)
        progress.show(counts.values(), piece.source)
    for split, writer in writers.items():
        writer.finish((counts[split]["documents"], 0), 0)
    progress.show(counts.values(), end=True)
    manifest = {
        "format": FORMAT,
        "tokenizer": {"name": data.tokenizer, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size,
                      "eot": tokenizer.eot, "unk": tokenizer.unk, "dtype": tokenizer.dtype.name},
        "settings": settings,
        "skipped": dict(sorted(skipped.items())),
        "splits": {split: counts[split] | writers[split].summary() for split in counts},
        "sources": listed,
    }  # fmt: skip
    write_json(folder / MANIFEST, manifest)
    (folder / PROGRESS).unlink()
    for split, entry in manifest["splits"].items():
        lost = f", {entry['unknown']:,} of them for unknown text" if entry["unknown"] else ""
        say(f"{split}: {entry['documents']:,} documents, {entry['bytes']:,} bytes of text, {entry['tokens']:,} tokens"
            f"{lost} in {len(entry['shards'])} shards")  # fmt: skip
        if not entry["shards"]:
            say(f"{split}: nothing is held out; nearest: a larger data.val_fraction, or text of more lines")
    if skipped:
        say("skipped: " + ", ".join(f"{number:,} {kind}" for kind, number in sorted(skipped.items())))
    return manifest


def held_out(text: str, val_fraction: float) -> bool:
    """Whether a document is a validation document: a function of its text alone (of a very long one's beginning)."""
    digest = hashlib.blake2b(text[:_HASHED].encode(), digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


def _refuse_other(folder: Path, have: dict[str, Any], want: dict[str, Any]) -> None:
    for name, value in want.items():
        if have.get(name) != value:
            raise UserError(
                f"{folder} was prepared with data.{name}={have.get(name)!r}, not {value!r};"
                " rule: one folder, one preparation; nearest: another folder, or remove this one", BAD_DATA
            )  # fmt: skip


def _read_progress(folder: Path, settings: dict[str, Any], listed: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What an interrupted preparation with the same settings left; None if nothing."""
    for stray in folder.glob("tmp-*"):
        stray.unlink()
    if not (folder / PROGRESS).is_file():
        return None
    state: dict[str, Any] = json.loads((folder / PROGRESS).read_bytes())
    _refuse_other(folder, state["settings"], settings)
    for before, now in zip_longest(state["sources"], listed):
        if before != now:
            raise UserError(f"{folder}: the text changed since its preparation began: {before} is now {now};"
                            " nearest: remove the folder", BAD_DATA)  # fmt: skip
    return state


def _survey(data: DataConfig, sources: list[Source], say: Callable[[str], None]) -> tuple[Tokenizer, dict[str, Any]]:
    """Read the text once, if need be, to learn the tokenizer and where a small source's held-out tail begins."""
    trained = is_trained_spec(data.tokenizer)
    tokenizer = cutter(data.tokenizer) if trained else load_tokenizer(data.tokenizer)
    learns = trained and data.tokenizer != "byte"
    found, progress = {"documents": 0, "bytes": 0}, Progress("read", None, sources, say)

    def pieces() -> Iterator[str]:
        for source, row, texts in read_documents(sources, data, Counter()):
            if found["documents"] >= SMALL and not learns:
                return
            found["documents"] += 1
            for piece in _cut(tokenizer, texts, sources[source], row):
                found["bytes"] += len(piece.encode())
                progress.show([found], source)
                yield piece

    if learns:
        tokenizer = train_tokenizer(data.tokenizer, pieces())
    else:
        deque(pieces(), maxlen=0)
    if not found["documents"]:
        raise UserError(f"data.input={data.input!r}: no document with text in {len(sources)} files", BAD_DATA)
    small = found["documents"] < SMALL
    if learns or small:
        say(f"found {found['documents']:,} documents, {found['bytes']:,} bytes of text in {data.input}")
    if small and data.val_fraction:
        say(f"fewer than {SMALL} documents: the last {data.val_fraction:.1%} of text is held out, cut at a line end")
    tail = round(found["bytes"] * (1 - data.val_fraction)) if small else None
    return tokenizer, {"bytes": found["bytes"] if learns or small else None, "tail": tail}


def _documents(
    data: DataConfig, sources: list[Source], tail: int | None, skipped: Counter[str]
) -> Iterator[tuple[str, int, int, Iterator[str]]]:
    """(split, source, row, texts) of each document, used up in turn; `tail`: bytes of text before the held-out ones."""
    position, rest = 0, b""

    def before_tail(texts: Iterator[str]) -> Iterator[str]:
        """A document's text up to the last line end before the tail, or else the next one after; `rest` follows."""
        nonlocal position, rest
        assert tail is not None, "only a source that holds out its tail comes here"
        for text in texts:
            raw = text.encode()
            wanted, position = tail - position, position + len(raw)
            end = (raw.rfind(b"\n", 0, max(wanted, 0)) + 1 or raw.find(b"\n") + 1) if wanted < len(raw) else 0
            if end:
                rest = raw[end:]
                yield raw[:end].decode()
                return
            yield text

    for source, row, texts in read_documents(sources, data, skipped):
        if tail is None:
            head: list[str] = []
            while sum(map(len, head)) < _HASHED and (text := next(texts, "")):
                head.append(text)
            split = "val" if held_out("".join(head), data.val_fraction) else "train"
            yield split, source, row, chain(head, texts)
            continue
        if position < tail:
            rest = b""
            yield "train", source, row, before_tail(texts)
            texts = chain([rest.decode()] if rest else [], texts)
        if first := next(texts, ""):
            yield "val", source, row, chain([first], texts)


def _pieces(
    data: DataConfig, sources: list[Source], tokenizer: Tokenizer, tail: int | None,
    counts: dict[str, dict[str, int]], skipped: Counter[str],
) -> Iterator[Piece]:  # fmt: skip
    """Every document's text in pieces that encode as the whole does; counts documents and bytes as it goes."""
    for split, source, row, texts in _documents(data, sources, tail, skipped):
        document = counts[split]["documents"]
        counts[split]["documents"] += 1
        pieces = _cut(tokenizer, texts, sources[source], row)
        text = next(pieces, "")
        for n in count():
            following = next(pieces, "")
            counts[split]["bytes"] += len(text.encode())
            yield Piece(split, (document, n), source, row, text, not following)
            if not following:
                break
            text = following


def _cut(tokenizer: Tokenizer, texts: Iterator[str], source: Source, row: int) -> Iterator[str]:
    try:
        yield from tokenizer.pieces(texts)
    except NoCutError as error:
        raise UserError(f"{source.path or source.name}: row {row}: {error}", BAD_DATA) from error


class _Writer:
    """The token stream of a split, cut into shards of SHARD_TOKENS; notes in the progress file what is finished."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, state: dict[str, Any]):
        self.folder, self.split, self.tokenizer, self.state = folder, split, tokenizer, state
        done = state["splits"].get(split, {"shards": [], "unknown": 0, "place": [0, 0], "skip": 0})
        self.shards: list[dict[str, Any]] = done["shards"]
        self.unknown: int = done["unknown"]
        self.place: tuple[int, int] = tuple(done["place"])  # the piece in which the next shard begins ...
        self.skip: int = done["skip"]  # ... after so many of its tokens
        self.buffer = np.empty(SHARD_TOKENS, tokenizer.dtype)
        self.filled = 0
        self.documents = array("q"), array("q"), array("q")  # start, source, row

    def add(self, piece: Piece, ids: np.ndarray) -> None:
        if piece.last:
            ids = np.append(ids, self.tokenizer.dtype.type(self.tokenizer.eot))
        at = self.skip if piece.place == self.place else 0
        while at < len(ids):
            if not self.filled or (piece.place[1] == 0 and at == 0):
                for column, value in zip(self.documents, (self.filled, piece.source, piece.row), strict=True):
                    column.append(value)
            taken = min(len(ids) - at, SHARD_TOKENS - self.filled)
            self.buffer[self.filled : self.filled + taken] = ids[at : at + taken]
            self.filled, at = self.filled + taken, at + taken
            if self.filled == SHARD_TOKENS:
                self.finish(piece.place, at)

    def finish(self, place: tuple[int, int], skip: int) -> None:
        """Write the tokens so far as a shard; the next one begins in the piece at `place` after `skip` tokens."""
        if not self.filled:
            return
        tokens = self.buffer[: self.filled]
        if self.tokenizer.unk is not None:
            self.unknown += int((tokens == self.tokenizer.unk).sum())
        path = self.folder / f"{self.split}-{len(self.shards):05d}.safetensors"
        self.shards.append(write_shard(path, tokens, *self.documents))
        self.place, self.skip = place, skip
        self.state["splits"][self.split] = {
            "shards": self.shards, "unknown": self.unknown, "place": place, "skip": skip
        }  # fmt: skip
        write_json(self.folder / PROGRESS, self.state)
        self.filled = 0
        for column in self.documents:
            del column[:]

    def summary(self) -> dict[str, Any]:
        tokens = sum(shard["tokens"] for shard in self.shards)
        return {"tokens": tokens, "unknown": self.unknown, "shards": self.shards}


def _jobs(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    job: list[Piece] = []
    size = 0
    for piece in pieces:
        job.append(piece)
        size += len(piece.text)
        if size >= JOB or len(job) >= JOB_PIECES:
            yield job
            job, size = [], 0
    yield job


def _encode(
    pieces: Iterator[Piece], tokenizer: Tokenizer, folder: Path, processes: int
) -> Iterator[tuple[Piece, np.ndarray | None]]:
    """Pieces with their tokens, in order; texts go in jobs to worker processes, a few jobs ahead of the writer."""
    if processes == 1:
        for piece in pieces:
            yield piece, np.array(tokenizer.encode(piece.text), tokenizer.dtype) if piece.text else None
        return
    # Workers are plain subprocesses, each fed by a thread: nothing is pickled, the caller's main module is not imported
    # again, and a worker ends when its pipe closes, however the parent ends.
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    # Ctrl-C reaches the parent alone.
    command, pipe = [sys.executable, "-P", "-c", WORKER, str(folder)], subprocess.PIPE
    workers = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, process_group=0) for _ in range(processes)
    ]
    idle = queue.SimpleQueue[subprocess.Popen[bytes]]()
    for worker in workers:
        idle.put(worker)

    def encode(job: list[Piece]) -> list[np.ndarray | None]:
        texts = [piece.text.encode() for piece in job if piece.text]
        worker = idle.get()
        assert worker.stdin and worker.stdout, "both are pipes"
        try:
            write_frame(worker.stdin, texts)
            answer = read_frame(worker.stdout)
        except BrokenPipeError:
            answer = None
        finally:
            idle.put(worker)
        if answer is None:
            raise RuntimeError(f"an encoding process ended with exit code {worker.wait()}")
        arrays = iter(answer)
        return [np.frombuffer(next(arrays), tokenizer.dtype) if piece.text else None for piece in job]

    pool, jobs = ThreadPoolExecutor(processes, "encode"), _jobs(pieces)
    waiting: deque[tuple[list[Piece], Future[list[np.ndarray | None]]]] = deque()
    try:
        while True:
            while len(waiting) < 2 * processes and (job := next(jobs, None)) is not None:
                waiting.append((job, pool.submit(encode, job)))
            if not waiting:
                return
            job, future = waiting.popleft()
            yield from zip(job, future.result(), strict=True)
    finally:
        for worker in workers:
            worker.kill()
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.communicate()


class Progress:
    """One updating line on a terminal, else a line every ten seconds."""

    def __init__(self, verb: str, total: int | None, sources: list[Source], say: Callable[[str], None]):
        self.verb, self.total, self.say, self.begin = verb, total, say, time.monotonic()
        self.ends = list(accumulate(source.size for source in sources))
        self.terminal = sys.stdout.isatty() and say is print
        self.pause = 0.2 if self.terminal else 10.0
        self.due = self.begin + self.pause
        self.source, self.before = 0, 0  # the source being read, and the bytes of text before it

    def show(self, counts: Iterable[dict[str, int]], source: int = 0, end: bool = False) -> None:
        documents, done = (sum(values) for values in zip(*((c["documents"], c["bytes"]) for c in counts), strict=True))
        if source != self.source:
            self.source, self.before = source, done
        now = time.monotonic()
        if now < self.due and not end:
            return
        self.due = now + self.pause
        rate = done / max(now - self.begin, 1e-9)
        line = f"{self.verb} {documents:,} documents, {done / 1e6:,.1f} MB, {rate / 1e6:.2f} MB/s"
        # bytes of text in all: known from the survey, or as the sources so far had them for their size on disk
        ratio = self.before / self.ends[self.source - 1] if self.source else 1
        left = (self.total or ratio * self.ends[-1]) - done
        if left > 0 and not end:
            line += f", about {left / max(rate, 1):,.0f} s left"
        if self.terminal:
            print(f"\r{line:<78}", end="\n" if end else "", flush=True)
        else:
            self.say(line)
