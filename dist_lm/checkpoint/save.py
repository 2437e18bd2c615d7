"""The saver: checkpoints are written beside the training that goes on.

A checkpoint is named tensors and JSON, whole or not there at all. Its weights and tokenizer are a
plain Hugging Face folder; the optimizer's tensors lie beside them by parameter name. Only
safetensors and JSON are ever read back.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dist_lm.channel import Channel
from dist_lm.checkpoint.host_memory import HostMemory
from dist_lm.checkpoint.layout import OwnedRange, OwnedSlice, PlannedTensor, plan_tensors
from dist_lm.checkpoint.retention import Retention
from dist_lm.checkpoint.writing import CheckpointWriter, size_of
from dist_lm.config import ModelSpec
from dist_lm.data.tokenizer import Tokenizer

_ATTEMPTS_WITH_OWN_TAGS = 1024  # then tags are used again, which must stay small integers


class Saver:
    """Writes the checkpoints of a run, one at a time.

    `begin` waits for the checkpoint before, if that is still being written, and copies what this
    rank owns into host memory. Training waits for no more than that: a thread does the rest. If any
    rank fails, older checkpoints are untouched, and all ranks get the same UserError, from `poll`
    or `finish`.
    """

    def __init__(
        self,
        run_dir: Path,
        channel: Channel,
        keep_last: int = 2,
        keep_every: int = 0,
        reach: int = 0,
        resumed: Path | None = None,
        lost: Callable[[], str] = str,
    ):
        """`keep_last`, `keep_every` and `reach` are as Retention means them.

        `resumed` is the folder that this run goes on from; it has been verified.

        `lost` returns why the run folder is no longer this run's, or nothing. Rank 0 asks it before
        it changes one.
        """
        self.run_dir = run_dir
        self.channel = channel
        self._lost = lost
        self._retention = Retention(run_dir, keep_last, keep_every, reach)
        if resumed:
            self._retention.trust(resumed)
        self._memory = HostMemory()
        self._plan: list[PlannedTensor] = []  # the same for all checkpoints of a run
        self._attempts = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def make_ready(
        self,
        spec: ModelSpec,
        owned: Callable[[], Iterable[OwnedSlice]],
        make_memory: bool,
    ) -> None:
        """Plan the checkpoints, and warn if few of them fit on the disk. All ranks.

        `make_memory` also begins to make the host memory for them. It is for GPUs, whose first save
        would else wait until the memory is locked.
        """
        self._make_plan(spec, owned)
        if make_memory:
            self._memory.make_ahead(_elements(self._pieces_of_this_rank()))

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
        self._make_plan(spec, owned)
        self._attempts += 1
        writer = CheckpointWriter(
            run_dir=self.run_dir,
            channel=self.channel,
            step=step,
            plan=self._plan,
            first_tag=self._attempts % _ATTEMPTS_WITH_OWN_TAGS * len(self._plan),
            staged=self._stage(owned()),
            texts=texts,
            tokenizer=tokenizer,
            lost=self._lost,
            make_room=self._retention.make_room,
        )
        # A daemon, so that it ends with a crash elsewhere.
        self._thread = threading.Thread(
            target=self._write, args=(writer,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _make_plan(self, spec: ModelSpec, owned: Callable[[], Iterable[OwnedSlice]]) -> None:
        """Plan once, because the checkpoints of a run are alike. Warn if few fit. All ranks."""
        if self._plan:
            return
        facts = [part.facts() for part in owned()]
        self._plan = plan_tensors(spec, self.channel.gather(facts))
        if self.channel.rank == 0:
            with contextlib.suppress(OSError):
                self._retention.warn_if_short(size_of(self._plan))

    def poll(self) -> None:
        """If the checkpoint being written has ended, raise what went wrong with it."""
        if self._thread and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint being written; raise what went wrong with it."""
        if self._thread:
            self._thread.join()
        error = self._error
        self._thread = None
        self._error = None
        if error:
            raise error

    def _write(self, writer: CheckpointWriter) -> None:
        """The thread: write, then delete what need not stay."""
        try:
            writer.write()
            if self.channel.rank == 0 and not self._lost():
                self._retention.prune(writer.final)
        except BaseException as error:
            self._error = error

    def _stage(self, owned: Iterable[OwnedSlice]) -> dict[int, Tensor]:
        """Copy this rank's pieces to host memory that training does not touch, by tensor number."""
        pieces_by_parameter = self._pieces_of_this_rank()
        host = self._memory.of(_elements(pieces_by_parameter))

        staged = {}
        at = 0
        for part in owned:
            for number, piece in pieces_by_parameter.get(part.name, []):
                values = _values(part, self._plan[number].entry.key, piece)
                copy = host[at : at + len(values)]
                staged[number] = copy.copy_(values, non_blocking=True)
                at += len(values)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged

    def _pieces_of_this_rank(self) -> dict[str, list[tuple[int, OwnedRange]]]:
        """By parameter: the number of a tensor in the plan, and this rank's piece of it."""
        found: dict[str, list[tuple[int, OwnedRange]]] = {}
        for number, planned in enumerate(self._plan):
            for piece in planned.pieces:
                if piece.rank == self.channel.rank:
                    found.setdefault(planned.entry.param, []).append((number, piece))
        return found


def _elements(pieces_by_parameter: Mapping[str, list[tuple[int, OwnedRange]]]) -> int:
    """How many elements the pieces have."""
    elements = 0
    for pieces in pieces_by_parameter.values():
        elements += sum(piece.stop - piece.start for _, piece in pieces)
    return elements


def _values(part: OwnedSlice, key: str, piece: OwnedRange) -> Tensor:
    """The elements of a piece: of the weight if the key is empty, else of an optimizer's tensor."""
    if key in part.extra:
        values = part.extra[key].reshape(-1)
    else:
        whole = part.state[key] if key else part.weight
        values = whole[piece.start - part.start : piece.stop - part.start]
    assert values.dtype == torch.float32, (
        f"{part.name}.{key} is {values.dtype}; checkpoints hold fp32"
    )
    return values.detach()
