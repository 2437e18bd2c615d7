"""Checkpoints: named tensors and JSON, whole or not there at all.

A step folder is written under a temporary name, every file fsynced and hashed, the manifest last, and then renamed; so
a folder named step-* is complete, and which tensor lies in which file follows from the config alone, whoever wrote it.
Its weights and tokenizer are a plain Hugging Face folder; the optimizer's tensors lie beside them by parameter name.
Only safetensors and JSON are ever read back.
"""

import contextlib
import hashlib
import itertools
import json
import math
import re
import shutil
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_lm import hf
from dist_lm.config import ModelConfig, UserError
from dist_lm.model import GPT
from dist_lm.shards import safetensors_head, sync_folder, write_parts
from dist_lm.text import Tokenizer

BAD_CHECKPOINT = 66
_FORMAT = 1
# Files are what ranks divide among them: so many at most, but none is closed before it has this many bytes.
_FILES = {"model": 16, "optimizer": 32}
_SMALLEST_FILE = {"model": 64 * 2**20, "optimizer": 2**20}
_FAILURES = (OSError, RuntimeError, MemoryError)  # of one rank, which all then answer for; torch's memory is the second
_STEP_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]+")


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
        self, run_dir: Path, channel: Channel, keep_last: int = 2, keep_every: int = 0, lost: Callable[[], str] = str
    ):  # fmt: skip
        """`lost` says why the run folder is no longer this run's, or nothing. Rank 0 asks it before it changes one."""
        self.run_dir, self.channel, self._lost = run_dir, channel, lost
        self._keep = (keep_last, keep_every)
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
                    prune(self.run_dir, *self._keep)
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
            shutil.rmtree(left_over)
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
        final = self.run_dir / f"step-{self.step:08d}"
        self._refuse_lost_folder()
        remove(final)  # only a folder that was passed over as damaged can be here
        self.aside.rename(final)
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


def remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill midway leaves no half of it under its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.old.tmp")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def prune(run_dir: Path, keep_last: int, keep_every: int) -> None:
    """Keep the newest `keep_last`, the best by validation loss, and every multiple of `keep_every`. Rank 0."""
    try:
        folders = step_folders(run_dir)
        losses = {folder: loss for folder in folders if (loss := read_state(folder).get("val_loss")) is not None}
        best = min(losses, key=losses.__getitem__, default=None)
        for folder in folders[:-keep_last]:
            if folder != best and not (keep_every and step_of(folder) % keep_every == 0):
                remove(folder)
    except (OSError, UserError) as error:  # the checkpoint just written is not worse for it
        print(f"warning: older checkpoints stay: {error}", file=sys.stderr)


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
    """Check every file's size and hash against the manifest."""

    def refuse(file: str, why: str) -> UserError:
        return UserError(f"{folder.name}/{file}: {why}", BAD_CHECKPOINT)

    manifest = _read_json(folder / "manifest.json")
    if manifest.get("format") != _FORMAT or not isinstance(manifest.get("files"), dict):
        raise refuse("manifest.json", f"is not of format {_FORMAT}")
    if manifest.get("step") != step_of(folder):
        raise refuse("manifest.json", f"belongs to step {manifest.get('step')}")
    extra = {path.name for path in folder.iterdir()} - set(manifest["files"]) - {"manifest.json"}
    if extra:
        raise refuse(min(extra), "is not in the manifest")
    for name, facts in manifest["files"].items():
        path = folder / name
        if not _FILE_NAME.fullmatch(name) or path.is_symlink() or not path.is_file():
            raise refuse(name, "is missing or not a regular file")
        if path.stat().st_size != facts["size"]:
            raise refuse(name, f"has {path.stat().st_size} bytes, the manifest says {facts['size']}")
        try:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    raise refuse(name, "does not match its hash in the manifest")
        except OSError as error:
            raise refuse(name, f"cannot be read ({error.strerror})") from error
    return manifest


def read_state(folder: Path) -> dict[str, Any]:
    """Everything of a step that is not a tensor."""
    return _read_json(folder / "state.json")


def locate(name: str, say: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of the model that `name` means: a run (its newest valid step), a step, a transformers folder or a hub
    name."""
    path = Path(name)
    if (path / "config.json").is_file():
        if (path / "manifest.json").exists():
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


def set_aside_newer(run_dir: Path, chosen: Path, say: Callable[[str], None]) -> None:
    """Going back to a step starts another trajectory: later steps of the old one must not be resumed by mistake."""
    for folder in step_folders(run_dir):
        if step_of(folder) > step_of(chosen):
            aside = next(p for n in range(1000) if not (p := run_dir / f"replaced-{n}-{folder.name}").exists())
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not valid JSON"
        raise UserError(f"{path.parent.name}/{path.name}: {reason}", BAD_CHECKPOINT) from error
    if not isinstance(content, dict):
        raise UserError(f"{path.parent.name}/{path.name}: must be a JSON object", BAD_CHECKPOINT)
    return content
