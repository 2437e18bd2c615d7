"""The plan of a checkpoint: which tensor lies in which file, who writes it, of whose pieces.

The files follow from the config alone, so any number of ranks under any strategy makes the same
ones. Who writes what follows from sizes and from what each rank owns; every rank computes the same
plan.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_lm.arithmetic import share_out
from dist_lm.config import ModelSpec
from dist_lm.model import hf

# Ranks share the writing by files. There are at most this many, but none is closed before it has
# its smallest size.
MOST_FILES = {"model": 16, "optimizer": 32}
SMALLEST_FILE = {"model": 64 * 2**20, "optimizer": 2**20}  # bytes

# What a rank tells the others about a slice, as JSON: name, start, stop, the keys of its state, and
# {key: shape} of its extra tensors.
SliceFacts = list[Any]
# Owned ranges by parameter, and by the key of an extra tensor, or "" for the parameter and its
# state.
_Holders = Mapping[tuple[str, str], "list[OwnedRange]"]


@dataclass(frozen=True)
class OwnedSlice:
    """Elements [start, stop) of a flattened parameter that this rank's optimizer works on.

    With one process or DDP every rank owns all of everything; under ZeRO each element is owned by
    one rank.
    """

    name: str  # of the parameter
    start: int
    stop: int
    weight: Tensor  # flat, fp32
    state: Mapping[str, Tensor]  # tensors of the parameter's own shape, the same elements of them
    extra: Mapping[str, Tensor]  # the others, whole: Adam's step, Adafactor's statistics

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
        """`size` elements, from its element `at` on, of a tensor that an optimizer works on.

        `state` is the optimizer's for the whole tensor.
        """
        same_shape = {}
        extra = {}
        for key, value in state.items():
            if value.shape == tensor.shape:
                same_shape[key] = value.view(-1)[at : at + size]
            else:
                extra[key] = value
        weight = tensor.data.view(-1)[at : at + size]
        return cls(name, start, start + size, weight=weight, state=same_shape, extra=extra)

    def facts(self) -> SliceFacts:
        shapes = {key: list(value.shape) for key, value in self.extra.items()}
        return [self.name, self.start, self.stop, sorted(self.state), shapes]


@dataclass(frozen=True)
class OwnedRange:
    """Elements [start, stop) of a flattened tensor, on the rank that owns them."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a checkpoint."""

    entry: hf.Entry
    file: str
    writer: int  # the rank that writes the file
    pieces: list[OwnedRange]  # they make up the tensor, in order; none for a constant


def plan_tensors(spec: ModelSpec, facts_by_rank: list[list[SliceFacts]]) -> list[PlannedTensor]:
    """All tensors in the order of the files: the weights, then the optimizer's by parameter."""
    state_keys: dict[str, set[str]] = defaultdict(set)
    extra_shapes: dict[str, dict[str, list[int]]] = defaultdict(dict)
    holders: dict[tuple[str, str], list[OwnedRange]] = defaultdict(list)
    for rank, facts in enumerate(facts_by_rank):
        for name, start, stop, keys, shapes in facts:
            state_keys[name].update(keys)
            extra_shapes[name].update(shapes)
            holders[name, ""].append(OwnedRange(rank, start, stop))
            for key, shape in shapes.items():
                holders[name, key].append(OwnedRange(rank, 0, math.prod(shape)))

    optimizer_entries = []
    for name, shape in hf.shapes(spec).items():
        for key in sorted(state_keys[name]):
            optimizer_entries.append(hf.own_entry(name, shape, key))
        for key, size in sorted(extra_shapes[name].items()):
            entry = hf.Entry(f"{name}.{key}", tuple(size), name, rows=(0, 1), key=key)
            optimizer_entries.append(entry)

    files = _into_files("model", hf.layout(spec)) | _into_files("optimizer", optimizer_entries)
    writers = share_out(
        {name: _bytes(inside) for name, inside in files.items()}, len(facts_by_rank)
    )
    planned = []
    for file, entries in files.items():
        writer = writers[file]
        for entry in entries:
            planned.append(PlannedTensor(entry, file, writer, _cover(entry, holders, writer)))
    return planned


def _into_files(stem: str, entries: list[hf.Entry]) -> dict[str, list[hf.Entry]]:
    """Fill files in the order of the tensors: as few as let many ranks share the writing evenly."""
    largest = max(SMALLEST_FILE[stem], _bytes(entries) // MOST_FILES[stem])
    files: list[list[hf.Entry]] = [[]]
    for entry in entries:
        if files[-1] and _bytes(files[-1]) + entry.bytes > largest:
            files.append([])
        files[-1].append(entry)
    if len(files) == 1 and stem == "model":  # the name that transformers expects of a lone file
        return {"model.safetensors": files[0]}
    named = {}
    for number, inside in enumerate(files, 1):
        named[f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"] = inside
    return named


def _bytes(entries: list[hf.Entry]) -> int:
    return sum(entry.bytes for entry in entries)


def _cover(entry: hf.Entry, holders: _Holders, writer: int) -> list[OwnedRange]:
    """Pieces that make up a tensor, none twice; of equal ones the writer's own."""
    if entry.constant:
        return []
    at, end = entry.span
    available = holders.get((entry.param, entry.key)) or holders[entry.param, ""]
    pieces: list[OwnedRange] = []
    for owned in sorted(
        available, key=lambda owned: (owned.start, owned.rank != writer, owned.rank)
    ):
        if owned.stop > at and at < end:
            piece = OwnedRange(owned.rank, max(at, owned.start), min(end, owned.stop))
            assert piece.start == at, f"nobody holds all of {entry.name}"
            pieces.append(piece)
            at = piece.stop
    assert at == end, f"nobody holds all of {entry.name}"
    return pieces
