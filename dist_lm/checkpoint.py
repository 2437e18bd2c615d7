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
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dist_lm import hf
from dist_lm.config import ModelConfig, UserError
from dist_lm.model import GPT
from dist_lm.optim import create_state
from dist_lm.text import Tokenizer

BAD_CHECKPOINT = 66
_FORMAT = 1
_FILE_BYTES = 2 * 2**30  # a tensor file is closed once it is larger
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_STEP_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Source:
    """A tensor to be saved: its name, shape and dtype are known before its bytes are."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def model_sources(model: ModelConfig, vocab_size: int, seq_len: int, weights: Mapping[str, Tensor]) -> list[Source]:
    """The weights as the family's own names and shapes."""

    def source(entry: hf.Entry) -> Source:
        return Source(entry.name, entry.shape, torch.float32, lambda: hf.export_tensor(entry, weights))

    return [source(entry) for entry in hf.layout(model, vocab_size, seq_len)]


def optimizer_sources(parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer) -> list[Source]:
    """The optimizer's tensors as parameter.key."""
    found = []
    for name, parameter in parameters:
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                found.append(Source(f"{name}.{key}", tuple(value.shape), value.dtype, lambda value=value: value))  # type: ignore[misc]
    return found


# --- writing


def save(
    run_dir: Path, step: int, weights: list[Source], optimizer: list[Source], texts: Mapping[str, str],
    tokenizer: Tokenizer, *, rank: int, world: int, gather: Callable[[Any], list[Any]],
) -> Path:  # fmt: skip
    """Write the checkpoint of a step. All ranks: each writes every world-th tensor file, rank 0 also the small ones.

    If any rank fails, no rank's files stay, older checkpoints are untouched, and all ranks raise the same UserError.
    """
    final = run_dir / f"step-{step:08d}"
    aside = run_dir / f".{final.name}.tmp"
    model_files = _into_files("model", weights)
    if len(model_files) > 1:
        texts = {**texts, "model.safetensors.index.json": _index(model_files)}
    files = list({**model_files, **_into_files("optimizer", optimizer)}.items())

    def prepare_folder() -> dict[str, Any]:
        for left_over in run_dir.glob(".step-*.tmp"):  # ours alone: the run folder is locked
            shutil.rmtree(left_over)
        aside.mkdir(parents=True)
        return {}

    def write_own() -> dict[str, Any]:
        return {name: write_tensors(aside / name, sources) for name, sources in files[rank::world]}

    def commit(written: dict[str, Any]) -> dict[str, Any]:
        tokenizer.save(aside)
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        for path in set(aside.iterdir()) - {aside / name for name in written}:
            written[path.name] = _finish_small(path)
        manifest = {"format": _FORMAT, "step": step, "files": dict(sorted(written.items()))}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _finish_small(aside / "manifest.json")
        sync_folder(aside)
        remove(final)  # only a folder that was passed over as damaged can be here
        aside.rename(final)
        sync_folder(run_dir)
        return {}

    _agreed(prepare_folder if rank == 0 else dict, gather, step, aside)
    written = _agreed(write_own, gather, step, aside)
    _agreed((lambda: commit(written)) if rank == 0 else dict, gather, step, aside)
    return final


def _agreed(
    work: Callable[[], dict[str, Any]], gather: Callable[[Any], list[Any]], step: int, aside: Path
) -> dict[str, Any]:
    """Do the work; the union of what all ranks made, or one error on all of them. All ranks."""
    try:
        said = gather({"made": work()})
    except OSError as error:
        said = gather({"error": f"{error.strerror or error} ({Path(str(error.filename or aside)).name})"})
    failed = [f"rank {rank}: {part['error']}" for rank, part in enumerate(said) if "error" in part]
    if failed:
        with contextlib.suppress(OSError):
            shutil.rmtree(aside)
        raise UserError(f"checkpoint of step {step} was not written: {failed[0]}; older checkpoints are untouched", 70)
    return {name: made for part in said for name, made in part["made"].items()}


def _into_files(stem: str, sources: list[Source]) -> dict[str, list[Source]]:
    """Fill files in the order of the tensors. The name of a lone model file is what transformers expects."""
    files: list[list[Source]] = [[]]
    for source in sources:
        if files[-1] and sum(s.bytes for s in files[-1]) + source.bytes > _FILE_BYTES:
            files.append([])
        files[-1].append(source)
    if len(files) == 1 and stem == "model":
        return {"model.safetensors": files[0]}
    return {f"{stem}-{n:05d}-of-{len(files):05d}.safetensors": part for n, part in enumerate(files, 1)}


def _index(files: Mapping[str, list[Source]]) -> str:
    total = sum(source.bytes for sources in files.values() for source in sources)
    where = {source.name: name for name, sources in files.items() for source in sources}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1)


def write_tensors(path: Path, sources: list[Source]) -> dict[str, Any]:
    """Write one safetensors file, hashing on the way and holding one tensor at a time; its size and hash."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for source in sources:
        offsets = [at, at := at + source.bytes]
        header[source.name] = {"dtype": _DTYPES[source.dtype], "shape": source.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for chunk in itertools.chain([len(text).to_bytes(8, "little"), text], map(_bytes_of, sources)):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _bytes_of(source: Source) -> Any:
    tensor = source.get().detach().cpu().contiguous()
    assert tuple(tensor.shape) == source.shape and tensor.dtype == source.dtype, f"{source.name} is not what it was"
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _finish_small(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        content = file.read()
        os.fsync(file.fileno())
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill midway leaves no half of it under its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.old.tmp")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def prune(run_dir: Path, keep_last: int, keep_every: int) -> None:
    """Keep the newest `keep_last`, the best by validation loss, and every multiple of `keep_every`. Rank 0."""
    folders = step_folders(run_dir)
    losses = [(read_state(folder).get("val_loss"), folder) for folder in folders]
    _, best = min((pair for pair in losses if pair[0] is not None), default=(None, None))
    for folder in folders[:-keep_last]:
        if folder != best and not (keep_every and step_of(folder) % keep_every == 0):
            remove(folder)


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
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
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


def read_weights(folder: Path, model: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Tensor]:
    """The weights by our parameter names, on CPU."""
    with _open_tensors(sorted(folder.glob("model*.safetensors"))) as get:
        return hf.import_tensors(model, vocab_size, seq_len, get)


def read_model(name: str) -> tuple[GPT, Tokenizer, Path]:
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
    model.load_state_dict(read_weights(folder, description, vocab_size, seq_len), assign=True)
    return model.eval(), tokenizer, folder


def restore_optimizer(
    folder: Path, parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> None:
    """Bring the optimizer's state into being and fill it by parameter name."""
    create_state(optimizer)
    with _open_tensors(sorted(folder.glob("optimizer-*.safetensors"))) as get:
        for source in optimizer_sources(parameters, optimizer):
            try:
                source.get().copy_(get(source.name))
            except KeyError:
                raise UserError(
                    f"{folder.name} lacks {source.name} of the optimizer; rule: resume with the same optimizer",
                    BAD_CHECKPOINT,
                ) from None


@contextlib.contextmanager
def _open_tensors(paths: list[Path]) -> Any:
    """A function from tensor name to tensor over several safetensors files."""
    with contextlib.ExitStack() as stack:
        where = {}
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error})", BAD_CHECKPOINT) from error
            where.update(dict.fromkeys(file.keys(), file))

        def get(name: str) -> Tensor:
            tensor: Tensor = where[name].get_tensor(name)  # KeyError where there is none
            return tensor

        yield get


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not valid JSON"
        raise UserError(f"{path.parent.name}/{path.name}: {reason}", BAD_CHECKPOINT) from error
    if not isinstance(content, dict):
        raise UserError(f"{path.parent.name}/{path.name}: must be a JSON object", BAD_CHECKPOINT)
    return content
