"""A raw source as a row of sequences: lanes that read, shuffle in blocks, tokenize and pack, dealt out in turns.

Invariant: the sequences and their order are a function of the source, the seed and the config, never of the machine.
Turn by turn each lane gives its next sequence; a lane whose pass has ended is left out until all have ended it, then
the next pass begins, in another order. A rank reads the lanes it owns and tells the others how many sequences those
have ready, so that all ranks deal alike. Where a lane stands is a small JSON cursor; going on from it reads one block
again.
"""

import contextlib
import threading
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from dist_lm.data.files import Part
from dist_lm.data.formats import Reader
from dist_lm.data.order import (
    FOR_DOCUMENTS,
    FOR_PACKED_SEQUENCES,
    FOR_PARTS,
    Words,
    hash_words,
    permute,
)
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import DataError, UserError, error_with_code

BLOCK = 1024, 2**22  # documents or characters that fill a block: what is shuffled into each other
BATCH = 128, 2**18  # ... and what is tokenized at once
START: dict[str, Any] = {"pass": 0, "block": 0, "part": 0, "row": 0, "document": 0, "offset": 0}


class Span(NamedTuple):
    """A part of a document in a sequence: tokens[start:stop] of its T+1."""

    file: int
    row: int
    start: int
    stop: int


class PackedSequence(NamedTuple):
    """At most T+1 tokens, all but the first of them targets."""

    tokens: np.ndarray
    spans: list[Span]
    passed: int  # the pass in which the lane completed it
    after: (
        tuple["Document", int] | None
    )  # the document and place in it where the lane stands then; None: at its end


class Document(NamedTuple):
    block: dict[str, Any]  # where its block begins: what a cursor needs to read it again
    number: int  # in the block
    file: int
    row: int
    text: list[str]
    tokens: np.ndarray


@dataclass
class StreamSpec:
    """What makes the sequences of a stream, the same for all its lanes and on all ranks."""

    reader: Reader
    parts: list[Part]
    tokenizer: Tokenizer
    seq_len: int
    lanes: int  # at most as many as parts
    key: Words  # of the permutations: the run's seed and the source
    keep: Callable[
        [Iterator[str]], Iterator[str] | None
    ]  # a document's text if training may see it
    best_fit: bool = False
    passes: int | None = None  # None: for ever
    block: tuple[int, int] = BLOCK

    def parts_of(self, lane: int, passed: int) -> list[Part]:
        """The parts that a lane reads in a pass: dealt out anew in each."""
        order = shuffled(len(self.parts), hash_words(self.key, FOR_PARTS, passed))
        return [self.parts[n] for n in order[lane :: self.lanes]]


def shuffled(count: int, key: Words) -> list[int]:
    """A permutation of range(count)."""
    order: list[int] = permute(np.arange(count), np.full(count, count), key.repeat(count)).tolist()
    return order


class Lane:
    """One sub-stream of a source: its documents pass after pass, as sequences. One thread at a time reads it."""

    def __init__(self, spec: StreamSpec, number: int, cursor: dict[str, Any] | None = None):
        cursor = cursor or START
        self.spec, self.number = spec, number
        self.ready: deque[PackedSequence] = deque()
        self.ended = cursor["pass"] - 1  # the newest pass of which nothing is left to read
        self.is_empty = True  # no document was found so far
        self.cursor = (
            cursor  # where it stands after what was taken; what was only read ahead does not count
        )
        self._pass, self._block = cursor["pass"], cursor["block"]
        self._skipped = Counter[str](cursor.get("skipped", {}))  # what was left out so far ...
        self._before = self._skipped  # ... and before the newest document
        self._found = self._open(cursor["part"], cursor["row"])
        self._documents: Iterator[Document] = iter(())
        # A lane begins with little, for its first sequences to come soon; what best fit packs together must not vary.
        self._batch = BATCH if spec.best_fit else (1, BATCH[1] // 16)
        self._pending: deque[Document] = deque()  # tokens that no sequence begins behind
        self._offset = self._rewind = cursor["offset"]
        self._passed_over = cursor["document"]
        self._lock = threading.Lock()
        self._failure: UserError | None = None

    def count(self, passed: int) -> int:
        """How many sequences of a pass are ready."""
        return sum(made.passed == passed for made in tuple(self.ready))

    def fill(self, passed: int, wanted: int) -> None:
        """Read until so many sequences of a pass are ready, or all that it has."""
        with self._lock:
            while self.ended < passed and self.count(passed) < wanted:
                self._read_some()

    def read_ahead(self, most: int) -> None:
        """Read a little more in the background; what goes wrong is said when it is needed."""
        if self._lock.acquire(blocking=False):
            try:
                if len(self.ready) < most and self.ended + 1 != self.spec.passes:
                    with contextlib.suppress(UserError):
                        self._read_some()
            finally:
                self._lock.release()

    def take(self) -> PackedSequence:
        taken = self.ready.popleft()
        if taken.after:
            document, offset = taken.after
            self.cursor = {**document.block, "document": document.number, "offset": offset}
        else:
            self.cursor = {
                **START,
                "pass": taken.passed + 1,
                **_counts(skipped=self._skipped, left_out=self._skipped),
            }
        return taken

    def _open(self, part: int = 0, row: int = 0) -> Iterator[tuple[int, int, int, list[str]]]:
        """(number of the part in this pass, file, row, text) of the documents that training may see."""
        spec, parts = self.spec, self.spec.parts_of(self.number, self._pass)[part:]
        for number, at, texts in spec.reader.documents(self._skipped, parts, row):
            self._before = self._skipped.copy()
            if (kept := spec.keep(texts)) is None:
                continue
            file = parts[number].file
            yield (
                part + number,
                file,
                at,
                list(spec.tokenizer.pieces(kept, spec.reader.where(file, at))),
            )

    def _read_some(self) -> None:
        if self._failure:  # its readers are spent: what they would give now is not the rest
            raise self._failure
        try:
            self._read()
        except UserError as error:
            self._failure = error
            raise

    def _read(self) -> None:
        """Tokenize the next few documents and make sequences of them; at the end of the pass begin the next one."""
        documents = _few(self._documents, self._batch) or _few(self._next_block(), self._batch)
        if documents:
            self.is_empty = False
            self._batch = min(2 * self._batch[0], BATCH[0]), min(2 * self._batch[1], BATCH[1])
            self._encode(documents)
            return
        self.ended = self._pass
        if (
            self.ended + 1 == self.spec.passes and self._left() > 1
        ):  # nothing follows: what is left is filled up
            self.ready.append(self._cut(self._left())._replace(after=None))
        self._pass, self._block = self._pass + 1, 0
        self._found = self._open()

    def _next_block(self) -> Iterator[Document]:
        """The documents of the next block in their new order; none where the pass has ended."""
        found: list[tuple[int, int, list[str]]] = []
        size, block = 0, dict[str, Any]()
        for part, file, row, text in self._found:
            if not found:
                block = {"pass": self._pass, "block": self._block, "part": part, "row": row}
                block |= _counts(skipped=self._before)
            found.append((file, row, text))
            size += sum(map(len, text))
            if len(found) >= self.spec.block[0] or size >= self.spec.block[1]:
                break
        block |= _counts(left_out=self._skipped)
        order = shuffled(
            len(found),
            hash_words(self.spec.key, FOR_DOCUMENTS, self.number, self._pass, self._block),
        )
        nothing = np.empty(0, self.spec.tokenizer.dtype)
        made = (Document(block, n, *found[place], nothing) for n, place in enumerate(order))
        self._documents = islice(made, self._passed_over, None)
        self._block, self._passed_over = self._block + bool(found), 0
        return self._documents

    def _encode(self, documents: list[Document]) -> None:
        tokenizer, length = self.spec.tokenizer, self.spec.seq_len
        encoded = iter(tokenizer.encode_batch([document.text[0] for document in documents]))
        for n, document in enumerate(documents):
            parts = [np.array(next(encoded), tokenizer.dtype)]
            for piece in document.text[
                1:
            ]:  # a long document comes in pieces: no list of all its tokens
                parts.append(np.array(tokenizer.encode(piece), tokenizer.dtype))
            parts.append(np.array([tokenizer.eot], tokenizer.dtype))
            documents[n] = document._replace(text=[], tokens=np.concatenate(parts))
        if self.spec.best_fit:
            self._pack(documents)
            return
        self._pending.extend(documents)
        for _ in range((self._left() - 1) // length):
            self.ready.append(self._cut(length + 1))

    def _left(self) -> int:
        """Tokens that are in no sequence yet."""
        return sum([len(document.tokens) for document in self._pending], -self._offset)

    def _cut(self, size: int) -> PackedSequence:
        """The next so many tokens, the last of which also begins the next sequence, if there is one."""
        stretches, begin, wanted = list[tuple[Document, int, int]](), self._offset, size
        for document in self._pending:
            end = min(len(document.tokens), begin + wanted)
            stretches.append((document, begin, end))
            wanted -= end - begin
            begin = 0
            if not wanted:
                break
        self._offset += size - 1
        while self._offset >= len(self._pending[0].tokens):
            self._offset -= len(self._pending.popleft().tokens)
        return self._row(stretches, (self._pending[0], self._offset))

    def _pack(self, documents: list[Document]) -> None:
        """Sequences of whole documents of these few; the offset of a cursor counts sequences."""
        rows = best_fit([len(document.tokens) for document in documents], self.spec.seq_len)
        first = documents[0]
        place = first.block["pass"], first.block["block"], first.number
        order = shuffled(
            len(rows), hash_words(self.spec.key, FOR_PACKED_SEQUENCES, self.number, *place)
        )
        for n, row in enumerate(order):
            if n >= self._rewind:
                stretches = [(documents[number], begin, end) for number, begin, end in rows[row]]
                self.ready.append(self._row(stretches, (first, n + 1)))
        self._rewind = 0

    def _row(
        self, stretches: list[tuple[Document, int, int]], after: tuple[Document, int] | None
    ) -> PackedSequence:
        spans, place = list[Span](), 0
        for document, begin, end in stretches:
            spans.append(Span(document.file, document.row, place, place + end - begin))
            place += end - begin
        tokens = np.concatenate([document.tokens[begin:end] for document, begin, end in stretches])
        return PackedSequence(tokens, spans, self._pass, after)


def _counts(**counts: Counter[str]) -> dict[str, Any]:
    """What a cursor has if something was left out: `skipped` before its block, to count on from, `left_out` with it."""
    return {name: dict(count) for name, count in counts.items() if count}


def _few(documents: Iterator[Document], most: tuple[int, int]) -> list[Document]:
    """The next documents, up to a number or an amount of text."""
    few, size = list[Document](), 0
    while len(few) < most[0] and size < most[1] and (document := next(documents, None)):
        few.append(document)
        size += sum(map(len, document.text))
    return few


def best_fit(sizes: Sequence[int], length: int) -> list[list[tuple[int, int, int]]]:
    """Sequences as (document, begin, end): whole documents, each put where it leaves the least room.

    Only those longer than a sequence are cut; every token is an input once. A sequence that a document fills and does
    not end in has its next token too, as a target.
    """
    rows, parts = list[list[tuple[int, int, int]]](), list[tuple[int, int, int]]()
    for number, size in enumerate(sizes):
        begin = 0
        while size - begin > length:
            rows.append([(number, begin, begin + length + 1)])
            begin += length
        parts.append((number, begin, size))
    rooms: list[tuple[int, int]] = []  # (inputs left, row), sorted
    for part in sorted(parts, key=lambda part: part[1] - part[2]):
        size = part[2] - part[1]
        at = bisect_left(rooms, (size, -1))
        if at == len(rooms):
            rows.append([])
            rooms.append((length, len(rows) - 1))
        room, row = rooms.pop(at)
        rows[row].append(part)
        insort(rooms, (room - size, row))
    return rows


class Stream:
    """The lanes of a source, dealt out in turns. All ranks hold one and deal alike; each reads the lanes it owns."""

    def __init__(
        self,
        spec: StreamSpec,
        state: dict[str, Any] | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        pool: Executor | None = None,
        shift: int = 0,
    ):
        begun, state = bool(state), state or {"pass": 0, "turn": 0, "done": [], "lanes": {}}
        self.spec, self.rank, self.world, self.shift = spec, rank, world, shift
        self.gather, self.pool = gather, pool
        self.passed, self.turn, self.done = state["pass"], state["turn"], set(state["done"])
        own = [n for n in range(spec.lanes) if self.owner(n) == rank]
        self.lanes = {n: Lane(spec, n, state["lanes"].get(str(n))) for n in own}
        self._forget()
        self._empty = not begun

    def owner(self, lane: int) -> int:
        """The rank that reads a lane; `shift` lays the first lanes of several sources on different ranks."""
        return (lane + self.shift) % self.world

    @property
    def over(self) -> bool:
        return bool(self.spec.passes == self.passed)

    def snapshot(self) -> dict[str, Any]:
        """Where the stream stands, with the cursors of this rank's lanes."""
        return {
            "pass": self.passed,
            "turn": self.turn,
            "done": sorted(self.done),
            "lanes": {str(number): lane.cursor for number, lane in self.lanes.items()},
        }

    def deal(self, count: int) -> list[tuple[int, PackedSequence | None]]:
        """The lanes of the next `count` sequences, and own ones themselves; fewer at the last pass's end. All ranks."""
        dealt: list[tuple[int, PackedSequence | None]] = []
        while len(dealt) < count and not self.over:
            waiting = [n for n in range(self.spec.lanes) if n not in self.done]
            if not waiting:
                self._next_pass()
                continue
            lane = next((n for n in waiting if n >= self.turn), waiting[0])
            if self._known[lane]:
                self._known[lane] -= 1
                self.turn = lane + 1
                dealt.append((lane, self.lanes[lane].take() if lane in self.lanes else None))
            elif lane in self._closed:
                self.done.add(lane)
            else:
                self._look(waiting, -(-(count - len(dealt)) // len(waiting)))
        if self.pool:
            for own in self.lanes.values():
                if len(own.ready) < 2 * count:
                    self.pool.submit(own.read_ahead, 2 * count)
        return dealt

    def _next_pass(self) -> None:
        if (
            self._empty
        ):  # else some document in some lane ends in a sequence, if only after many passes
            raise DataError(
                f"{self.spec.reader.spec.input}: no document to train on; rule: at least one"
            )
        self.passed, self.turn, self.done = self.passed + 1, 0, set()
        self._forget()

    def _forget(self) -> None:
        self._known, self._closed, self._empty = [0] * self.spec.lanes, set[int](), True

    def _look(self, lanes: Sequence[int], wanted: int) -> None:
        """Read on, and exchange how many sequences of this pass the lanes have ready. All ranks."""
        own = {n: self.lanes[n] for n in lanes if n in self.lanes}
        refusal = None
        try:
            each: Any = self.pool.map if self.pool else map
            list(each(lambda lane: lane.fill(self.passed, wanted), own.values()))
        except UserError as error:
            refusal = [str(error), error.code]
        found = [
            [n, lane.count(self.passed), lane.ended >= self.passed, lane.is_empty]
            for n, lane in own.items()
        ]
        for rank, (said, theirs) in enumerate(self.gather([refusal, found])):
            if said:
                raise error_with_code(
                    said[0] if self.world == 1 else f"rank {rank}: {said[0]}", said[1]
                )
            for lane, ready, ended, empty in theirs:
                self._known[lane] = ready
                self._closed |= {lane} if ended else set()
                self._empty &= empty
