"""One checkpoint on its way to disk.

A step folder is written under a temporary name, every file fsynced and hashed, the manifest last,
and then renamed. So a folder named step-* is complete. If any rank fails, no rank's files stay, and
all ranks get the same error.
"""

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lm.channel import Channel
from dist_lm.checkpoint.folder import FORMAT, delete, remove, step_name
from dist_lm.checkpoint.layout import PlannedTensor
from dist_lm.console import warn
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.disk import safetensors_head, sync_folder, write_parts
from dist_lm.errors import CODES, UserError, error_with_code
from dist_lm.model import hf

# Failures of one rank, which make all ranks give up this checkpoint. torch raises RuntimeError
# without memory.
_FAILURES = (OSError, RuntimeError, MemoryError)

_SPARE_BYTES = 2**18  # for headers, the manifest and the blocks of the file system

Written = dict[str, Any]  # by file name, what the manifest says: {"size": bytes, "sha256": digits}


@dataclass
class CheckpointWriter:
    """Sends this rank's pieces to the ranks that write them, and writes this rank's files.

    Runs in the saver's thread. A message's tag is `first_tag` and the number of its tensor in the
    plan. Each attempt has tags of its own: what nobody received of a failed one must not meet the
    next.
    """

    run_dir: Path
    channel: Channel
    step: int
    plan: list[PlannedTensor]
    first_tag: int
    staged: Mapping[int, Tensor]  # this rank's pieces, flat, by the number of the tensor
    texts: Mapping[str, str]  # JSON files, by name
    tokenizer: Tokenizer
    lost: Callable[[], str]  # why the run folder is no longer this run's, or nothing
    make_room: Callable[[int], None]  # deletes older steps until this many bytes fit

    @property
    def aside(self) -> Path:
        return self.run_dir / f".{step_name(self.step)}.tmp"

    @property
    def final(self) -> Path:
        return self.run_dir / step_name(self.step)

    def write(self) -> None:
        """Write the checkpoint, or raise one UserError on all ranks. All ranks."""
        is_main = self.channel.rank == 0
        self._agree(self._prepare_folder if is_main else _nothing)
        sends = self._send_pieces()
        written = self._agree(self._write_files)
        for send in sends:
            send.wait()
        self._agree((lambda: self._commit(written)) if is_main else _nothing)

    def _agree(self, work: Callable[[], Written]) -> Written:
        """Do the work. Returns what all ranks wrote, or raises one error on all. All ranks."""
        parts = self.channel.gather(self._outcome(work))
        for rank, part in enumerate(parts):
            if "error" in part:
                if self.channel.rank == 0 and not self.lost():
                    shutil.rmtree(self.aside, ignore_errors=True)
                raise error_with_code(
                    f"checkpoint of step {self.step} was not written: rank {rank}: {part['error']};"
                    " older checkpoints are untouched",
                    part["code"],
                )
        written: Written = {}
        for part in parts:
            written.update(part["written"])
        return written

    def _outcome(self, work: Callable[[], Written]) -> dict[str, Any]:
        """Do the work. Returns what it wrote, or its error's text and code."""
        try:
            return {"written": work()}
        except _FAILURES as error:
            where = Path(str(getattr(error, "filename", None) or self.aside)).name
            what = getattr(error, "strerror", None) or error
            return {"error": f"{what} ({where})", "code": CODES["retryable"]}
        except UserError as error:
            return {"error": str(error), "code": error.code}

    def _refuse_lost_folder(self) -> None:
        why = self.lost()
        if why:
            raise UserError(why)

    def _prepare_folder(self) -> Written:
        """Make the temporary folder. Rank 0."""
        self._refuse_lost_folder()
        for left_over in self.run_dir.glob(".step-*.tmp"):  # ours alone: the run folder is locked
            try:
                delete(left_over)
            except OSError as error:  # it takes space, but this checkpoint can be written
                warn(f"{left_over.name} stays: {error}")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        texts = [*self.tokenizer.files().values(), *self.texts.values()]
        self.make_room(size_of(self.plan) + sum(len(text.encode()) for text in texts))
        self.aside.mkdir()
        return {}

    def _send_pieces(self) -> list[Any]:
        """Start sending what other ranks write. Returns what to wait for."""
        sends = []
        for number, values in self.staged.items():
            writer = self.plan[number].writer
            if writer != self.channel.rank:
                sends.append(self.channel.send(values, writer, self.first_tag + number))
        return sends

    def _write_files(self) -> Written:
        """Write this rank's files.

        After a failure the pieces that were sent for the others are still received.
        """
        written: Written = {}
        failure = None
        for name, numbers in self._files_of_this_rank().items():
            entries = [self.plan[number].entry for number in numbers]
            tensors = self._assembled(numbers)
            try:
                written[name] = write_tensors(self.aside / name, entries, tensors)
            except _FAILURES as error:
                failure = error
                with contextlib.suppress(*_FAILURES):
                    for _ in tensors:  # senders wait until their pieces are received
                        pass
        if failure:
            raise failure
        return written

    def _files_of_this_rank(self) -> dict[str, list[int]]:
        """The numbers of the tensors in each file that this rank writes."""
        files: dict[str, list[int]] = {}
        for number, planned in enumerate(self.plan):
            if planned.writer == self.channel.rank:
                files.setdefault(planned.file, []).append(number)
        return files

    def _assembled(self, numbers: list[int]) -> Iterator[Tensor]:
        """The tensors as their file has them, one at a time."""
        for number in numbers:
            yield self._assemble(number)

    def _assemble(self, number: int) -> Tensor:
        """A tensor as its file has it, from all ranks' pieces."""
        entry = self.plan[number].entry
        pieces = self.plan[number].pieces
        if entry.constant:
            return hf.constant(entry)
        if len(pieces) == 1 and pieces[0].rank == self.channel.rank:
            return entry.from_flat(self.staged[number])
        start = pieces[0].start
        flat = torch.empty(pieces[-1].stop - start)
        for piece in pieces:
            part = flat[piece.start - start : piece.stop - start]
            if piece.rank == self.channel.rank:
                part.copy_(self.staged[number])
            else:
                self.channel.receive(part, piece.rank, self.first_tag + number)
        return entry.from_flat(flat)

    def _commit(self, written: Written) -> Written:
        """Write what is not a tensor, the manifest last, and rename the folder. Rank 0."""
        texts = {**self.tokenizer.files(), **self.texts, **_model_index(self.plan)}
        for name, text in texts.items():
            written[name] = _write(self.aside / name, [text.encode()])
        manifest = {"format": FORMAT, "step": self.step, "files": dict(sorted(written.items()))}
        _write(self.aside / "manifest.json", [json.dumps(manifest, indent=1).encode()])
        sync_folder(self.aside)
        self._refuse_lost_folder()
        remove(self.final)  # only a folder that was passed over as damaged can be here
        self.aside.rename(self.final)
        sync_folder(self.run_dir)
        return {}


def size_of(plan: list[PlannedTensor]) -> int:
    """The bytes that the tensors of a checkpoint take, and a little more for the rest of it."""
    return _SPARE_BYTES + sum(planned.entry.bytes for planned in plan)


def _nothing() -> Written:
    """The work of a rank that only waits for the others."""
    return {}


def _model_index(plan: list[PlannedTensor]) -> dict[str, str]:
    """The index that transformers expects beside several model files."""
    tensors = [planned for planned in plan if planned.file.startswith("model-")]
    if not tensors:
        return {}
    index = {
        "metadata": {"total_size": sum(planned.entry.bytes for planned in tensors)},
        "weight_map": {planned.entry.name: planned.file for planned in tensors},
    }
    return {"model.safetensors.index.json": json.dumps(index, indent=1)}


def write_tensors(path: Path, entries: list[hf.Entry], tensors: Iterable[Tensor]) -> dict[str, Any]:
    """Write a safetensors file, holding one tensor at a time; its size and hash."""
    sizes = ((entry.name, "F32", entry.shape, entry.bytes) for entry in entries)
    head = safetensors_head(sizes, __metadata__={"format": "pt"})
    return _write(path, itertools.chain([head], map(_bytes_of, tensors)))


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file; what the manifest says about it."""
    size, sha256 = write_parts(path, parts)
    return {"size": size, "sha256": sha256}


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
