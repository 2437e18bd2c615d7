"""Documents -> sequences of at most T+1 tokens, the last one also the first of the next sequence.

A packer takes a lane's documents a few at a time, already tokenized, and gives sequences. With each
it tells where the lane then stands, so that a later run can make the next one.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dist_lm.data.order import FOR_PACKED_SEQUENCES, Words, hash_words, shuffled
from dist_lm.errors import CheckpointError


class Document(NamedTuple):
    """A document of a lane."""

    block: dict[str, Any]  # where its block begins: what a cursor needs to read it again
    number: int  # in its block, after the shuffle
    file: str  # the name that the source has for it
    row: int  # as the reader of the file counts
    text: list[str]  # in pieces; empty once it is tokenized
    tokens: np.ndarray  # with the end of text; empty until it is tokenized


class LanePoint(NamedTuple):
    """Where a lane stands between two sequences. The packer decides what the offset counts."""

    document: Document
    offset: int


class DocumentSpan(NamedTuple):
    """A part of a document in a sequence: tokens[start:stop] of its T+1."""

    file: str
    row: int
    start: int
    stop: int


class PackedSequence(NamedTuple):
    """At most T+1 tokens, all but the first of them targets."""

    tokens: np.ndarray
    spans: list[DocumentSpan]
    passed: int  # the pass in which the lane completed it
    after: LanePoint | None  # where the lane then stands; None: at its end


class Packer(Protocol):
    """Makes sequences of a lane's documents."""

    def pack(self, documents: list[Document], passed: int) -> list[PackedSequence]:
        """The sequences that the next few documents of a pass complete."""

    def rest(self, passed: int) -> list[PackedSequence]:
        """The sequence of what is left, when no document will follow."""


class ConcatPacker:
    """Cuts the tokens of all documents, one after another, every T tokens.

    The offset of a place counts tokens of its document. A sequence may begin in one pass and be
    completed in the next.
    """

    def __init__(self, seq_len: int, offset: int):
        self._seq_len = seq_len
        self._pending: deque[Document] = deque()  # from the one in which the next sequence begins
        self._offset = offset  # where in that one

    def pack(self, documents: list[Document], passed: int) -> list[PackedSequence]:
        self._pending.extend(documents)
        if self._offset >= len(self._pending[0].tokens):  # after each cut it is inside
            raise CheckpointError(
                f"a lane stands at token {self._offset} of a document of"
                f" {len(self._pending[0].tokens)}; rule: a state.json that train wrote"
            )
        count = (self._left() - 1) // self._seq_len
        return [self._cut(self._seq_len + 1, passed) for _ in range(count)]

    def rest(self, passed: int) -> list[PackedSequence]:
        left = self._left()
        if left <= 1:  # a token alone has no target
            return []
        return [self._cut(left, passed)._replace(after=None)]

    def _left(self) -> int:
        """Tokens from where the next sequence begins."""
        return sum([len(document.tokens) for document in self._pending]) - self._offset

    def _cut(self, size: int, passed: int) -> PackedSequence:
        """The next `size` tokens. The last one stays, because the next sequence begins with it."""
        stretches: list[_Stretch] = []
        begin = self._offset
        missing = size
        for document in self._pending:
            end = min(len(document.tokens), begin + missing)
            stretches.append(_Stretch(document, begin, end))
            missing -= end - begin
            begin = 0
            if not missing:
                break
        self._offset += size - 1
        while self._offset >= len(self._pending[0].tokens):
            self._offset -= len(self._pending.popleft().tokens)
        return _join(stretches, passed, LanePoint(self._pending[0], self._offset))


class BestFitPacker:
    """Keeps documents whole, as far as they fit, and fills each sequence up with several.

    Only documents that come together are packed together, so how many come must not vary. The
    offset of a place counts the sequences made of the documents that came with its document.
    """

    def __init__(self, seq_len: int, key: Words, lane: int, offset: int):
        self._seq_len = seq_len
        self._key = key
        self._lane = lane
        self._skipped = offset  # sequences of the first few documents that an earlier run took

    def pack(self, documents: list[Document], passed: int) -> list[PackedSequence]:
        fitted = best_fit([len(document.tokens) for document in documents], self._seq_len)
        first = documents[0]
        block = first.block
        place = block["pass"], block["block"], first.number
        key = hash_words(self._key, FOR_PACKED_SEQUENCES, self._lane, *place)
        made = []
        for count, number in enumerate(shuffled(len(fitted), key), 1):
            if count > self._skipped:
                stretches = [_Stretch(documents[n], begin, end) for n, begin, end in fitted[number]]
                made.append(_join(stretches, passed, LanePoint(first, count)))
        self._skipped = 0
        return made

    def rest(self, passed: int) -> list[PackedSequence]:
        return []


class Fragment(NamedTuple):
    """tokens[begin:end] of a document, which is given by its number."""

    document: int
    begin: int
    end: int


def best_fit(sizes: Sequence[int], length: int) -> list[list[Fragment]]:
    """Put whole documents into sequences of `length` inputs, each where it leaves the least room.

    Only those longer than a sequence are cut; every token is an input once. A sequence that a
    document fills and does not end in has its next token too, as a target.
    """
    sequences: list[list[Fragment]] = []
    fragments: list[Fragment] = []
    for number, size in enumerate(sizes):
        begin = 0
        while size - begin > length:
            sequences.append([Fragment(number, begin, begin + length + 1)])
            begin += length
        fragments.append(Fragment(number, begin, size))
    rooms: list[tuple[int, int]] = []  # (inputs left, number of the sequence), sorted
    for fragment in sorted(fragments, key=lambda fragment: fragment.begin - fragment.end):
        size = fragment.end - fragment.begin
        at = bisect_left(rooms, (size, -1))
        if at == len(rooms):  # it fits nowhere: begin a sequence
            sequences.append([])
            rooms.append((length, len(sequences) - 1))
        room, number = rooms.pop(at)
        sequences[number].append(fragment)
        insort(rooms, (room - size, number))
    return sequences


class _Stretch(NamedTuple):
    """tokens[begin:end] of a document."""

    document: Document
    begin: int
    end: int


def _join(stretches: list[_Stretch], passed: int, after: LanePoint) -> PackedSequence:
    tokens = [document.tokens[begin:end] for document, begin, end in stretches]
    spans = []
    start = 0
    for document, begin, end in stretches:
        stop = start + end - begin
        spans.append(DocumentSpan(document.file, document.row, start, stop))
        start = stop
    return PackedSequence(np.concatenate(tokens), spans, passed, after)
