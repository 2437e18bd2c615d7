"""Checkpoints: named tensors and JSON, whole or not there at all.

A step folder is written under a temporary name, every file fsynced and hashed, the manifest last, and then renamed; so
a folder named step-* is complete, and which tensor lies in which file follows from the config alone, whoever wrote it.
Its weights and tokenizer are a plain Hugging Face folder; the optimizer's tensors lie beside them by parameter name.
Only safetensors and JSON are ever read back.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_lm.config import ModelConfig, UserError
from dist_lm.data.shards import FILE_NAME, SHA256, safetensors_head, sync_folder, write_parts
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.model import hf
from dist_lm.model.gpt import GPT

BAD_CHECKPOINT = 66
_FORMAT = 1
# Files are what ranks divide among them: so many at most, but none is closed before it has this many bytes.
_FILES = {"model": 16, "optimizer": 32}
_SMALLEST_FILE = {"model": 64 * 2**20, "optimizer": 2**20}
_FAILURES = (OSError, RuntimeError, MemoryError)  # of one rank, which all then answer for; torch's memory is the second
_STEP_NAME = re.compile(r"step-([0-9]{8,})")
_LARGEST_MANIFEST = 2**20  # bytes; one of 100 files has 15,000
_LARGEST_JSON = 128 * 2**20


@dataclass(frozen=True)
class Held:
    """Elements [start, stop) of a flattened parameter that this rank's optimizer works on, and what it keeps for them.

    With one process or DDP every rank holds all of everything; under ZeRO each element is held by one rank.
    """

    name: str
    start: int
    stop: int
    weight: Tensor  # flat, fp32
    state: Mapping[str, Tensor]  # the optimizer's tensors of the weight's own shape, the same elements of them
    extra: Mapping[str, Tensor]  # its others, whole: Adam's step, Adafactor's statistics

    @classmethod
    def part(
        cls, name: str, start: int, size: int, tensor: Tensor, state: Mapping[str, Tensor], at: int = 0
    ) -> "Held":  # fmt: skip
        """`size` elements, from its element `at` on, of a tensor that an optimizer works on and has this state for."""
        same = {key: value.view(-1)[at : at + size] for key, value in state.items() if value.shape == tensor.shape}
        others = {key: value for key, value in state.items() if value.shape != tensor.shape}
        return cls(name, start, start + size, tensor.data.view(-1)[at : at + size], same, others)


class Channel(Protocol):
    """How ranks talk while a checkpoint is written; the runtime has one whose messages pass beside training's."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]: ...
    def send(self, tensor: Tensor, to: int, tag: int) -> Any: ...
    def receive(self, tensor: Tensor, sender: int, tag: int) -> None: ...


@dataclass(frozen=True)
class Piece:
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
    pieces: list[Piece]


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
        self._memory = torch.empty(0, dtype=torch.uint8)  # reused: fresh memory costs as much again in page faults
        self._items: list[Item] = []  # the same for all checkpoints of a run
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(
        self, step: int, model: ModelConfig, vocab_size: int, seq_len: int, held: Callable[[], Iterable[Held]],
        texts: Mapping[str, str], tokenizer: Tokenizer,
    ) -> None:  # fmt: skip
        """Start the checkpoint of a step, after the one before has ended. All ranks."""
        self.finish()
        if not self._items:
            own = [
                [h.name, h.start, h.stop, sorted(h.state), {key: list(value.shape) for key, value in h.extra.items()}]
                for h in held()
            ]
            self._items = _plan(model, vocab_size, seq_len, self.channel.gather(own))
        work = _Work(self.run_dir, self.channel, step, self._items, self._stage(held()), texts, tokenizer, self._lost)

        def run() -> None:
            try:
                work.write()
                if self.channel.rank == 0 and not self._lost():
                    self._retention.prune(work.final)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)  # ends with a crash elsewhere
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

    def _stage(self, held: Iterable[Held]) -> dict[int, Tensor]:
        """Our pieces in host memory that training does not touch, by the numbers of their items."""
        ours: dict[str, list[tuple[int, str, Piece]]] = {}  # by parameter
        for n, item in enumerate(self._items):
            for piece in item.pieces:
                if piece.rank == self.channel.rank:
                    ours.setdefault(item.entry.param, []).append((n, item.entry.key, piece))
        size = 4 * sum(piece.stop - piece.start for pieces in ours.values() for _, _, piece in pieces)
        if size > self._memory.numel():
            self._memory = torch.empty(0, dtype=torch.uint8)  # give the old one back first
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        staged, at, values = {}, 0, self._memory[:size].view(torch.float32)
        for h in held:
            for n, key, piece in ours.get(h.name, ()):
                if key in h.extra:
                    tensor = h.extra[key].reshape(-1)
                else:
                    tensor = (h.state[key] if key else h.weight)[piece.start - h.start : piece.stop - h.start]
                assert tensor.dtype == torch.float32, f"{h.name}.{key} is {tensor.dtype}; checkpoints hold fp32"
                staged[n] = values[at : at + len(tensor)].copy_(tensor.detach(), non_blocking=True)
                at += len(tensor)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged


Index = list[list[Any]]  # what each rank holds: name, start, stop, keys of its state, {key: shape} of its extras


def _plan(model: ModelConfig, vocab_size: int, seq_len: int, by_rank: list[Index]) -> list[Item]:
    """All tensors of a checkpoint, in the order of the files: the weights, then what the optimizer keeps of each."""
    keys: dict[str, set[str]] = defaultdict(set)
    extras: dict[str, dict[str, list[int]]] = defaultdict(dict)
    holders: dict[tuple[str, str], list[Piece]] = defaultdict(list)  # by parameter, and key of an extra or ""
    for rank, index in enumerate(by_rank):
        for name, start, stop, state, others in index:
            keys[name].update(state)
            extras[name].update(others)
            holders[name, ""].append(Piece(rank, start, stop))
            for key, shape in others.items():
                holders[name, key].append(Piece(rank, 0, math.prod(shape)))
    kept = []
    for name, shape in hf.shapes(model, vocab_size, seq_len).items():
        kept += [hf.own_entry(name, shape, key) for key in sorted(keys[name])]
        kept += [
            hf.Entry(f"{name}.{key}", tuple(size), name, rows=(0, 1), key=key)
            for key, size in sorted(extras[name].items())
        ]
    files = _into_files("model", hf.layout(model, vocab_size, seq_len)) | _into_files("optimizer", kept)
    writers = _divide({file: sum(entry.bytes for entry in inside) for file, inside in files.items()}, len(by_rank))
    return [
        Item(entry, file, writers[file], _cover(entry, holders, writers[file]))
        for file, inside in files.items() for entry in inside
    ]  # fmt: skip


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
    return {f"{stem}-{n:05d}-of-{len(files):05d}.safetensors": inside for n, inside in enumerate(files, 1)}


def _divide(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Which rank writes each file: the largest first, each to the rank with the least so far."""
    loads, writers = [0] * world, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        writers[name] = min(range(world), key=lambda rank: loads[rank])
        loads[writers[name]] += sizes[name]
    return writers


def _cover(entry: hf.Entry, holders: Mapping[tuple[str, str], list[Piece]], writer: int) -> list[Piece]:
    """Pieces that make up a tensor, none twice; the writer's own where several ranks hold the same."""
    if entry.constant:
        return []
    at, end = entry.span
    found = []
    available = holders.get((entry.param, entry.key)) or holders[entry.param, ""]
    for piece in sorted(available, key=lambda piece: (piece.start, piece.rank != writer, piece.rank)):
        if piece.stop > at and at < end:
            found.append(Piece(piece.rank, max(at, piece.start), min(end, piece.stop)))
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
            for n, values in self.staged.items() if self.items[n].writer != rank
        ]  # fmt: skip
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
                written[name] = write_tensors(self.aside / name, [self.items[n].entry for n in inside], tensors)
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
            outcome = {"error": f"{getattr(error, 'strerror', None) or error} ({where})", "code": 70}
        except UserError as error:
            outcome = {"error": str(error), "code": error.code}
        said = self.channel.gather(outcome)
        failed = [(rank, part) for rank, part in enumerate(said) if "error" in part]
        if failed:
            if self.channel.rank == 0 and not self.lost():
                shutil.rmtree(self.aside, ignore_errors=True)
            rank, part = failed[0]
            raise UserError(
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
    index = {"metadata": {"total_size": total}, "weight_map": {item.entry.name: item.file for item in models}}
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


def delete(path: Path) -> None:
    """Delete a folder and all that is in it. A link is deleted itself; what it points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill midway leaves no half of it under its name."""
    if os.path.lexists(folder):
        doomed = folder.with_name(f".{folder.name}.old.tmp")
        delete(doomed)
        folder.rename(doomed)
        delete(doomed)


class Retention:
    """Decides which steps of a run stay, and deletes the others. Rank 0 uses it, in the saver's thread.

    The newest `keep_last` stay, the best by validation loss, every multiple of `keep_every`, and always the step that
    was just saved. Only valid steps count: those that this process saved or verified. A step of an earlier start is
    verified when its turn comes, once. A damaged step may be readable later and a link may lead anywhere, so neither
    counts, is deleted or is renamed.
    """

    def __init__(self, run_dir: Path, keep_last: int, keep_every: int):
        self.run_dir, self.keep_last, self.keep_every = run_dir, keep_last, keep_every
        self._valid: dict[Path, bool] = {}  # what is known of each step folder

    def trust(self, folder: Path) -> None:
        """This process saved or verified the folder."""
        self._valid[folder] = True

    def prune(self, saved: Path) -> None:
        """Delete what need not stay, now that `saved` is written. What cannot be deleted is only worth a warning."""
        self.trust(saved)
        try:
            superseded = self._superseded(saved)
        except OSError as error:
            _warn(f"older checkpoints stay: {error}")
            return
        for folder in superseded:
            try:
                remove(folder)
            except OSError as error:
                _warn(f"{folder.name} stays: {error}")

    def _superseded(self, saved: Path) -> list[Path]:
        """The valid steps that need not stay."""
        losses = self._losses()
        if len(losses) <= self.keep_last:
            return []  # and nothing need be verified
        newest = self._first_valid(sorted(losses, key=step_of, reverse=True), self.keep_last)
        evaluated = [folder for folder in losses if losses[folder] < math.inf]  # this leaves out NaN too
        best = self._first_valid(sorted(evaluated, key=losses.__getitem__), 1)
        staying = {saved, *newest, *best}
        if self.keep_every:
            staying.update(folder for folder in losses if step_of(folder) % self.keep_every == 0)
        return [folder for folder in losses if folder not in staying and self._is_valid(folder)]

    def _losses(self) -> dict[Path, float]:
        """The validation loss of each step folder whose state can be read, infinite where there was no evaluation."""
        losses = {}
        for folder in step_folders(self.run_dir):
            if folder.is_symlink():
                continue
            try:
                loss = read_state(folder).get("val_loss")
            except UserError:  # damaged
                continue
            losses[folder] = loss if isinstance(loss, float) else math.inf
        return losses

    def _first_valid(self, folders: list[Path], count: int) -> list[Path]:
        """The first valid ones. It looks at no more folders than it must, because a look may read all of a folder."""
        return list(itertools.islice(filter(self._is_valid, folders), count))

    def _is_valid(self, folder: Path) -> bool:
        """Whether this process saved or verified the folder. The first look at an older one reads all of it."""
        if folder not in self._valid:
            try:
                verify(folder)
                self._valid[folder] = True
            except UserError as error:
                _warn(f"a damaged checkpoint is left alone: {error}")
                self._valid[folder] = False
        return self._valid[folder]


def _warn(what: str) -> None:
    print(f"warning: {what}", file=sys.stderr)


# --- finding and checking


def step_of(folder: Path) -> int:
    found = _STEP_NAME.fullmatch(folder.name)
    assert found, f"{folder} is no step folder"
    return int(found[1])


def step_folders(run_dir: Path) -> list[Path]:
    """All step folders, oldest first."""
    return sorted((p for p in run_dir.glob("step-*") if p.is_dir() and _STEP_NAME.fullmatch(p.name)), key=step_of)


def newest_valid(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over. Refuses if there are only bad ones."""
    passed_over: list[str] = []
    for folder in reversed(step_folders(run_dir)):
        try:
            verify(folder)
            return folder, passed_over
        except UserError as error:
            passed_over.append(str(error))
    if passed_over:
        raise UserError(
            f"run.dir={run_dir} holds no valid checkpoint: {passed_over[0]}; rule: never restart silently at step 0;"
            " choose another run.dir, or remove the damaged folders",
            BAD_CHECKPOINT,
        )
    return None, []


def verify(folder: Path) -> dict[str, Any]:
    """Check every file's size and hash against the manifest, and return the manifest.

    A folder may have been copied or renamed to something that is not step-*: then its step is what the manifest says.
    """
    manifest = _read_manifest(folder)
    files, step = manifest["files"], manifest["step"]
    if _STEP_NAME.fullmatch(folder.name) and step != step_of(folder):
        raise _damaged(folder / "manifest.json", f"belongs to step {step}")
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{folder.name}: cannot be read ({error.strerror})", BAD_CHECKPOINT) from error
    extra = present - set(files) - {"manifest.json"}
    if extra:
        raise _damaged(folder / min(extra), "is not in the manifest")
    for name, facts in files.items():
        _check_file(folder / name, facts["size"], facts["sha256"])
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. What it says can be used as it is: types, names and hashes have been checked."""
    path = folder / "manifest.json"
    manifest = _read_json(path, _LARGEST_MANIFEST)
    if manifest.get("format") != _FORMAT or not isinstance(manifest.get("files"), dict):
        raise _damaged(path, f"is not of format {_FORMAT}")
    if not _is_count(manifest.get("step")):
        raise _damaged(path, "its step is not a number >= 0")
    for name, facts in manifest["files"].items():
        if not FILE_NAME.fullmatch(name):
            raise _damaged(path, f"{_printable(name)} is not a file name")
        if not isinstance(facts, dict) or facts.keys() != {"size", "sha256"}:
            raise _damaged(path, f"{_printable(name)} must have a size and a sha256, nothing else")
        if not _is_count(facts["size"]):
            raise _damaged(path, f"the size of {_printable(name)} is not a number >= 0")
        if not isinstance(facts["sha256"], str) or not SHA256.fullmatch(facts["sha256"]):
            raise _damaged(path, f"the sha256 of {_printable(name)} is not 64 hexadecimal digits")
    return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int too


def _check_file(path: Path, size: int, sha256: str) -> None:
    """Refuse a file that is not what the manifest says."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _damaged(path, "is missing or not a regular file")
        with _open_regular(path) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise _damaged(path, f"has {found} bytes, the manifest says {size}")
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise _damaged(path, "does not match its hash in the manifest")
    except FileNotFoundError as error:
        raise _damaged(path, "is missing or not a regular file") from error
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path.parent.name or '.'}/{_printable(path.name)}: {why}", BAD_CHECKPOINT)


def _printable(name: str) -> str:
    """A file name for a message. One that we did not write may be long or hold control characters."""
    return name if FILE_NAME.fullmatch(name) and len(name) <= 255 else ascii(name[:255])


def read_state(folder: Path) -> dict[str, Any]:
    """Everything of a step that is not a tensor."""
    return _read_json(folder / "state.json")


def locate(name: str, say: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of the model that `name` means: a run (its newest valid step), a step, a transformers folder or a hub
    name."""
    path = Path(name)
    if (path / "config.json").is_file():
        if os.path.lexists(path / "manifest.json"):
            verify(path)
        return path
    if path.is_dir():
        folder, passed_over = newest_valid(path)
        for why in passed_over:
            say(f"warning: passed over {why}")
        if folder is None:
            raise UserError(f"{name}: holds neither a checkpoint (step-*) nor a config.json", BAD_CHECKPOINT)
        return folder
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(f"{name}: no such folder; rule: a run, a step folder, a transformers folder or hub name",
                        BAD_CHECKPOINT)  # fmt: skip
    from huggingface_hub import snapshot_download  # slow, and only for hub names

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of the hub's client, of its HTTP library, of the system
        raise UserError(f"{name}: neither a folder here nor readable from the hub ({type(error).__name__})",
                        BAD_CHECKPOINT) from error  # fmt: skip


def set_aside_newer(run_dir: Path, step: int, say: Callable[[str], None]) -> None:
    """Going back to a step starts another trajectory: later steps of the old one must not be resumed by mistake."""
    for folder in step_folders(run_dir):
        if step_of(folder) > step:
            aside = next(p for n in range(1000) if not os.path.lexists(p := run_dir / f"replaced-{n}-{folder.name}"))
            folder.rename(aside)
            say(f"{folder.name} is of another trajectory now and was renamed to {aside.name}")


# --- reading back


def read_description(folder: Path) -> tuple[ModelConfig, int, int]:
    """Model, vocabulary size and context length of a folder, from its config.json."""
    return hf.from_config_json(_read_json(folder / "config.json"))


def tokenizer_hash(folder: Path) -> str | None:
    """Hash of the tokenizer that lies with a model, if one does."""
    return Tokenizer.load(folder).sha256 if (folder / "tokenizer.json").is_file() else None


def read_weights(
    folder: Path, model: ModelConfig, vocab_size: int, seq_len: int, average: bool = False
) -> dict[str, Tensor]:
    """The weights by our parameter names, on CPU; or the moving average of them that the run kept beside."""
    with _open_tensors(folder, "optimizer" if average else "model") as get:
        if not average:
            return hf.import_tensors(model, vocab_size, seq_len, get)
        try:
            return hf.import_tensors(model, vocab_size, seq_len, get, hf.own_layout(model, vocab_size, seq_len, "ema"))
        except hf.MissingTensor as error:
            raise UserError(
                f"{folder} holds no average of its weights; rule: trained with run.ema > 0", BAD_CHECKPOINT
            ) from error


def read_model(name: str, average: bool = False) -> tuple[GPT, Tokenizer, Path]:
    """A model ready to be used, its tokenizer, and the folder they came from; on CPU, in fp32."""
    folder = locate(name, lambda text: print(text, file=sys.stderr))
    description, vocab_size, seq_len = read_description(folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the model {vocab_size}; rule: no more",
            BAD_CHECKPOINT,
        )
    model = GPT(description, vocab_size, seq_len)
    model.load_state_dict(read_weights(folder, description, vocab_size, seq_len, average), assign=True)
    return model.eval(), tokenizer, folder


@torch.no_grad()
def restore(
    folder: Path, model: ModelConfig, vocab_size: int, seq_len: int, held: Iterable[Held], optimizer: bool
) -> None:
    """Fill what this rank holds, reading little more of the files than that; with the optimizer's tensors or without.

    What a longer context of the folder has beyond `seq_len` is left out.
    """
    context = read_description(folder)[2]
    entries: dict[str, list[hf.Entry]] = {}
    for entry in hf.layout(model, vocab_size, context):
        entries.setdefault(entry.param, []).append(entry)
    shapes = hf.shapes(model, vocab_size, seq_len)
    with _open_tensors(folder, *(("model", "optimizer") if optimizer else ("model",))) as get:
        for constant in entries.get("", ()):
            hf.import_part(constant, get, None, 0, model)
        for h in held:
            for entry in entries[h.name]:
                hf.import_part(entry, get, h.weight, h.start, model)
            for key, values in {**h.state, **h.extra}.items() if optimizer else ():
                name = f"{h.name}.{key}"
                try:
                    if key in h.state:
                        hf.import_part(hf.own_entry(h.name, shapes[h.name], key), get, values, h.start, model)
                    else:
                        values.copy_(get(name)[...])
                except (KeyError, hf.MissingTensor):
                    raise UserError(
                        f"{folder.name} lacks {name} of the optimizer; rule: resume with the same optimizer",
                        BAD_CHECKPOINT,
                    ) from None


@contextlib.contextmanager
def _open_tensors(folder: Path, *stems: str) -> Any:
    """A function from tensor name to tensor over the safetensors files whose names begin so."""
    with contextlib.ExitStack() as stack:
        where = {}
        for path in sorted(path for stem in stems for path in folder.glob(f"{stem}*.safetensors")):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error})", BAD_CHECKPOINT) from error
            where.update(dict.fromkeys(file.keys(), file))
        yield lambda name: where[name].get_slice(name)  # KeyError where there is none


def _read_json(path: Path, largest: int = _LARGEST_JSON) -> dict[str, Any]:
    """A JSON object of a checkpoint. Whatever lies there instead is refused with a UserError, after bounded work."""
    try:
        with _open_regular(path) as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    if len(data) > largest:
        raise _damaged(path, f"has more than {largest} bytes")
    try:
        content = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "not valid JSON") from error
    if not isinstance(content, dict):
        raise _damaged(path, "must be a JSON object")
    return content


def _open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; refuses pipes and devices, where opening or reading may wait for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")
