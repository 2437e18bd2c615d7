"""Checkpoints: named tensors and JSON, whole or not there at all.

A step folder is written under a temporary name, every file fsynced and hashed, the manifest last, and then renamed; so
a folder named step-* is complete, and which tensor lies in which file follows from the config alone, whoever wrote it.
Its weights and tokenizer are a plain Hugging Face folder; the optimizer's tensors lie beside them by parameter name.
Only safetensors and JSON are ever read back.
"""

import itertools
import json
import math
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lm.channel import Channel
from dist_lm.checkpoint.folder import _FORMAT, _warn, delete, remove
from dist_lm.checkpoint.retention import Retention
from dist_lm.config import ModelSpec
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.disk import safetensors_head, sync_folder, write_parts
from dist_lm.errors import UserError, error_with_code
from dist_lm.model import hf

# Files are what ranks divide among them: so many at most, but none is closed before it has this many bytes.
_FILES = {"model": 16, "optimizer": 32}
_SMALLEST_FILE = {"model": 64 * 2**20, "optimizer": 2**20}
_FAILURES = (
    OSError,
    RuntimeError,
    MemoryError,
)  # of one rank, which all then answer for; torch's memory is the second


@dataclass(frozen=True)
class OwnedSlice:
    """Elements [start, stop) of a flattened parameter that this rank's optimizer works on, and what it keeps for them.

    With one process or DDP every rank holds all of everything; under ZeRO each element is held by one rank.
    """

    name: str
    start: int
    stop: int
    weight: Tensor  # flat, fp32
    state: Mapping[
        str, Tensor
    ]  # the optimizer's tensors of the weight's own shape, the same elements of them
    extra: Mapping[str, Tensor]  # its others, whole: Adam's step, Adafactor's statistics

    @classmethod
    def part(
        cls,
        name: str,
        start: int,
        size: int,
        tensor: Tensor,
        state: Mapping[str, Tensor],
        at: int = 0,
    ) -> "OwnedSlice":
        """`size` elements, from its element `at` on, of a tensor that an optimizer works on and has this state for."""
        same = {
            key: value.view(-1)[at : at + size]
            for key, value in state.items()
            if value.shape == tensor.shape
        }
        others = {key: value for key, value in state.items() if value.shape != tensor.shape}
        return cls(name, start, start + size, tensor.data.view(-1)[at : at + size], same, others)


@dataclass(frozen=True)
class OwnedRange:
    """Elements [start, stop) of a flattened tensor, on the rank that holds them."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class Item:
    """A tensor of a checkpoint: in which file it lies, who writes that, and which pieces of it make it up."""

    entry: hf.Entry
    file: str
    writer: int
    pieces: list[OwnedRange]


# --- writing


class Saver:
    """Writes the checkpoints of a run, one at a time, beside the training that goes on.

    `begin` copies what this rank holds into host memory, which is all that training waits for. A thread then sends each
    piece to the rank that writes its file, and writes, hashes and commits. Which tensor lies in which file follows from
    the config alone; which rank writes a file from their sizes. If any rank fails, no rank's files stay, older
    checkpoints are untouched, and all ranks get the same UserError, from `poll` or `finish`.
    """

    def __init__(
        self,
        run_dir: Path,
        channel: Channel,
        keep_last: int = 2,
        keep_every: int = 0,
        resumed: Path | None = None,
        lost: Callable[[], str] = str,
    ):
        """`resumed` is the folder that this run goes on from; it has been verified.

        `lost` says why the run folder is no longer this run's, or nothing. Rank 0 asks it before it changes one.
        """
        self.run_dir, self.channel, self._lost = run_dir, channel, lost
        self._retention = Retention(run_dir, keep_last, keep_every)
        if resumed:
            self._retention.trust(resumed)
        self._memory = torch.empty(
            0, dtype=torch.uint8
        )  # reused: fresh memory costs as much again in page faults
        self._items: list[Item] = []  # the same for all checkpoints of a run
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(
        self,
        step: int,
        spec: ModelSpec,
        owned: Callable[[], Iterable[OwnedSlice]],
        texts: Mapping[str, str],
        tokenizer: Tokenizer,
    ) -> None:
        """Start the checkpoint of a step, after the one before has ended. All ranks."""
        self.finish()
        if not self._items:
            own = [
                [
                    h.name,
                    h.start,
                    h.stop,
                    sorted(h.state),
                    {key: list(value.shape) for key, value in h.extra.items()},
                ]
                for h in owned()
            ]
            self._items = _plan(spec, self.channel.gather(own))
        work = _Work(
            self.run_dir,
            self.channel,
            step,
            self._items,
            self._stage(owned()),
            texts,
            tokenizer,
            self._lost,
        )

        def run() -> None:
            try:
                work.write()
                if self.channel.rank == 0 and not self._lost():
                    self._retention.prune(work.final)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(
            target=run, name="checkpoint", daemon=True
        )  # ends with a crash elsewhere
        self._thread.start()

    def poll(self) -> None:
        """Raise what went wrong with a checkpoint that has ended."""
        if self._thread and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint being written; raise what went wrong with it."""
        if self._thread:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error:
            raise error

    def _stage(self, owned: Iterable[OwnedSlice]) -> dict[int, Tensor]:
        """Our pieces in host memory that training does not touch, by the numbers of their items."""
        ours: dict[str, list[tuple[int, str, OwnedRange]]] = {}  # by parameter
        for n, item in enumerate(self._items):
            for piece in item.pieces:
                if piece.rank == self.channel.rank:
                    ours.setdefault(item.entry.param, []).append((n, item.entry.key, piece))
        size = 4 * sum(
            piece.stop - piece.start for pieces in ours.values() for _, _, piece in pieces
        )
        if size > self._memory.numel():
            self._memory = torch.empty(0, dtype=torch.uint8)  # give the old one back first
            self._memory = torch.empty(
                size, dtype=torch.uint8, pin_memory=torch.cuda.is_available()
            )
        staged, at, values = {}, 0, self._memory[:size].view(torch.float32)
        for h in owned:
            for n, key, piece in ours.get(h.name, ()):
                if key in h.extra:
                    tensor = h.extra[key].reshape(-1)
                else:
                    tensor = (h.state[key] if key else h.weight)[
                        piece.start - h.start : piece.stop - h.start
                    ]
                assert tensor.dtype == torch.float32, (
                    f"{h.name}.{key} is {tensor.dtype}; checkpoints hold fp32"
                )
                staged[n] = values[at : at + len(tensor)].copy_(tensor.detach(), non_blocking=True)
                at += len(tensor)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged


Index = list[
    list[Any]
]  # what each rank holds: name, start, stop, keys of its state, {key: shape} of its extras


def _plan(spec: ModelSpec, by_rank: list[Index]) -> list[Item]:
    """All tensors of a checkpoint, in the order of the files: the weights, then what the optimizer keeps of each."""
    keys: dict[str, set[str]] = defaultdict(set)
    extras: dict[str, dict[str, list[int]]] = defaultdict(dict)
    holders: dict[tuple[str, str], list[OwnedRange]] = defaultdict(
        list
    )  # by parameter, and key of an extra or ""
    for rank, index in enumerate(by_rank):
        for name, start, stop, state, others in index:
            keys[name].update(state)
            extras[name].update(others)
            holders[name, ""].append(OwnedRange(rank, start, stop))
            for key, shape in others.items():
                holders[name, key].append(OwnedRange(rank, 0, math.prod(shape)))
    kept = []
    for name, shape in hf.shapes(spec).items():
        kept += [hf.own_entry(name, shape, key) for key in sorted(keys[name])]
        kept += [
            hf.Entry(f"{name}.{key}", tuple(size), name, rows=(0, 1), key=key)
            for key, size in sorted(extras[name].items())
        ]
    files = _into_files("model", hf.layout(spec)) | _into_files("optimizer", kept)
    writers = _divide(
        {file: sum(entry.bytes for entry in inside) for file, inside in files.items()}, len(by_rank)
    )
    return [
        Item(entry, file, writers[file], _cover(entry, holders, writers[file]))
        for file, inside in files.items()
        for entry in inside
    ]


def _into_files(stem: str, entries: list[hf.Entry]) -> dict[str, list[hf.Entry]]:
    """Fill files in the order of the tensors: as few as let many ranks share the writing evenly."""
    files: list[list[hf.Entry]] = [[]]
    largest = max(_SMALLEST_FILE[stem], sum(entry.bytes for entry in entries) // _FILES[stem])
    for entry in entries:
        if files[-1] and sum(other.bytes for other in files[-1]) + entry.bytes > largest:
            files.append([])
        files[-1].append(entry)
    if len(files) == 1 and stem == "model":  # the name that transformers expects of a lone file
        return {"model.safetensors": files[0]}
    return {
        f"{stem}-{n:05d}-of-{len(files):05d}.safetensors": inside
        for n, inside in enumerate(files, 1)
    }


def _divide(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Which rank writes each file: the largest first, each to the rank with the least so far."""
    loads, writers = [0] * world, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        writers[name] = min(range(world), key=lambda rank: loads[rank])
        loads[writers[name]] += sizes[name]
    return writers


def _cover(
    entry: hf.Entry, holders: Mapping[tuple[str, str], list[OwnedRange]], writer: int
) -> list[OwnedRange]:
    """Pieces that make up a tensor, none twice; the writer's own where several ranks hold the same."""
    if entry.constant:
        return []
    at, end = entry.span
    found = []
    available = holders.get((entry.param, entry.key)) or holders[entry.param, ""]
    for piece in sorted(
        available, key=lambda piece: (piece.start, piece.rank != writer, piece.rank)
    ):
        if piece.stop > at and at < end:
            found.append(OwnedRange(piece.rank, max(at, piece.start), min(end, piece.stop)))
            assert found[-1].start == at, f"nobody holds all of {entry.name}"
            at = found[-1].stop
    assert at == end, f"nobody holds all of {entry.name}"
    return found


@dataclass
class _Work:
    """One checkpoint on its way to disk; runs in the saver's thread. Messages are tagged with an item's number."""

    run_dir: Path
    channel: Channel
    step: int
    items: list[Item]
    staged: Mapping[int, Tensor]
    texts: Mapping[str, str]
    tokenizer: Tokenizer
    lost: Callable[[], str]

    @property
    def aside(self) -> Path:
        return self.run_dir / f".step-{self.step:08d}.tmp"

    @property
    def final(self) -> Path:
        return self.run_dir / f"step-{self.step:08d}"

    def write(self) -> None:
        rank = self.channel.rank
        self._agreed(self._prepare_folder if rank == 0 else dict)
        sends = [
            self.channel.send(values, self.items[n].writer, n)
            for n, values in self.staged.items()
            if self.items[n].writer != rank
        ]
        written = self._agreed(self._write_own)
        for send in sends:
            send.wait()
        self._agreed((lambda: self._commit(written)) if rank == 0 else dict)

    def _refuse_lost_folder(self) -> None:
        if why := self.lost():
            raise UserError(why)

    def _prepare_folder(self) -> dict[str, Any]:
        self._refuse_lost_folder()
        for left_over in self.run_dir.glob(".step-*.tmp"):  # ours alone: the run folder is locked
            try:
                delete(left_over)
            except OSError as error:  # it takes space, but this checkpoint can be written
                _warn(f"{left_over.name} stays: {error}")
        self.aside.mkdir(parents=True)
        return {}

    def _write_own(self) -> dict[str, Any]:
        written, failure = {}, None
        own = [n for n, item in enumerate(self.items) if item.writer == self.channel.rank]
        for name, numbers in itertools.groupby(own, lambda n: self.items[n].file):
            inside = list(numbers)
            tensors = (self._assemble(n) for n in inside)
            try:
                written[name] = write_tensors(
                    self.aside / name, [self.items[n].entry for n in inside], tensors
                )
            except _FAILURES as error:
                failure = error
                for _ in tensors:  # senders wait for what is theirs to be taken
                    pass
        if failure:
            raise failure
        return written

    def _assemble(self, n: int) -> Tensor:
        """An item as its file holds it, from all ranks' pieces."""
        entry, pieces = self.items[n].entry, self.items[n].pieces
        if entry.constant:
            return hf.constant(entry)
        if len(pieces) == 1 and pieces[0].rank == self.channel.rank:
            return entry.from_flat(self.staged[n])
        start = pieces[0].start
        flat = torch.empty(pieces[-1].stop - start)
        for piece in pieces:
            part = flat[piece.start - start : piece.stop - start]
            if piece.rank == self.channel.rank:
                part.copy_(self.staged[n])
            else:
                self.channel.receive(part, piece.rank, n)
        return entry.from_flat(flat)

    def _commit(self, written: dict[str, Any]) -> dict[str, Any]:
        for name, text in {**self.tokenizer.files(), **self.texts, **_index(self.items)}.items():
            written[name] = _write(self.aside / name, [text.encode()])
        manifest = {"format": _FORMAT, "step": self.step, "files": dict(sorted(written.items()))}
        _write(self.aside / "manifest.json", [json.dumps(manifest, indent=1).encode()])
        sync_folder(self.aside)
        self._refuse_lost_folder()
        remove(self.final)  # only a folder that was passed over as damaged can be here
        self.aside.rename(self.final)
        sync_folder(self.run_dir)
        return {}

    def _agreed(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do the work; the union of what all ranks made, or one error on all of them. All ranks."""
        try:
            outcome: dict[str, Any] = {"made": work()}
        except _FAILURES as error:
            where = Path(str(getattr(error, "filename", None) or self.aside)).name
            outcome = {
                "error": f"{getattr(error, 'strerror', None) or error} ({where})",
                "code": 70,
            }
        except UserError as error:
            outcome = {"error": str(error), "code": error.code}
        said = self.channel.gather(outcome)
        failed = [(rank, part) for rank, part in enumerate(said) if "error" in part]
        if failed:
            if self.channel.rank == 0 and not self.lost():
                shutil.rmtree(self.aside, ignore_errors=True)
            rank, part = failed[0]
            raise error_with_code(
                f"checkpoint of step {self.step} was not written: rank {rank}: {part['error']}; older checkpoints are"
                " untouched",
                part["code"],
            )
        return {name: made for part in said for name, made in part["made"].items()}


def _index(items: list[Item]) -> dict[str, str]:
    """The index that transformers expects beside several model files."""
    models = [item for item in items if item.file.startswith("model-")]
    if not models:
        return {}
    total = sum(item.entry.bytes for item in models)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {item.entry.name: item.file for item in models},
    }
    return {"model.safetensors.index.json": json.dumps(index, indent=1)}


def write_tensors(path: Path, entries: list[hf.Entry], tensors: Iterable[Tensor]) -> dict[str, Any]:
    """Write one safetensors file, hashing on the way and holding one tensor at a time; its size and hash."""
    sizes = ((entry.name, "F32", entry.shape, entry.bytes) for entry in entries)
    head = safetensors_head(sizes, __metadata__={"format": "pt"})
    return _write(path, itertools.chain([head], map(_bytes_of, tensors)))


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file; what the manifest says of it."""
    size, sha256 = write_parts(path, parts)
    return {"size": size, "sha256": sha256}


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


# --- deleting


# --- finding and checking


# --- reading back
