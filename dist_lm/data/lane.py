"""A lane: one of the independent sub-streams of a raw source, read by one rank.

It reads its documents pass after pass in blocks, shuffles each block, tokenizes and packs. Where it
stands is its cursor, a small JSON object; going on from it reads one block again.
"""

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from dist_lm.data.order import FOR_DOCUMENTS, FOR_PARTS, Words, hash_words, shuffled
from dist_lm.data.packing import BestFitPacker, ConcatPacker, Document, PackedSequence, Packer
from dist_lm.data.text.files import Part
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import CheckpointError, UserError


class Amount(NamedTuple):
    """An amount of text. It is reached when either number is reached."""

    documents: int
    characters: int


LARGEST_BLOCK = Amount(1024, 2**22)  # what is shuffled into each other
LARGEST_BATCH = Amount(128, 2**18)  # what is tokenized at once

# A cursor has the pass; the block in it, with the part and row at which the block begins; the
# document in the shuffled block; and the packer's offset. If something was left out, it also has
# the counts of what: `skipped` before the block, to count on from, and `left_out` with the block.
START: dict[str, Any] = {"pass": 0, "block": 0, "part": 0, "row": 0, "document": 0, "offset": 0}


@dataclass
class StreamSpec:
    """All that decides the sequences of a stream, the same for its lanes and on all ranks."""

    name: str  # of the source
    reader: Reader
    parts: list[Part]
    tokenizer: Tokenizer
    seq_len: int
    lanes: int  # at most as many as parts
    key: Words  # of the permutations: the run's seed and the source
    # Returns a document's text if training may see it.
    keep: Callable[[Iterator[str]], Iterator[str] | None]
    best_fit: bool = False
    passes: int | None = None  # None: forever
    block: Amount = LARGEST_BLOCK

    def parts_of(self, lane: int, passed: int) -> list[Part]:
        """The parts that a lane reads in a pass; each pass deals them out in another way."""
        order = shuffled(len(self.parts), hash_words(self.key, FOR_PARTS, passed))
        return [self.parts[number] for number in order[lane :: self.lanes]]

    def packer(self, lane: int, offset: int) -> Packer:
        if self.best_fit:
            return BestFitPacker(self.seq_len, self.key, lane, offset)
        return ConcatPacker(self.seq_len, offset)


class Status(NamedTuple):
    """The state of a lane in a pass."""

    ready: int  # sequences that can be taken
    has_ended: bool  # nothing more of the pass will come
    is_empty: bool  # no document was found so far, in any pass


class Lane:
    """The sequences of a lane, pass after pass.

    One thread at a time reads; `take` may run beside it.
    """

    def __init__(self, spec: StreamSpec, number: int, cursor: dict[str, Any] | None = None):
        # Where it stands after what was taken. What was only read ahead does not count.
        self.cursor = cursor or START
        self.ready: deque[PackedSequence] = deque()
        self._spec = spec
        self._documents = _DocumentReader(spec, number, self.cursor)
        self._packer = spec.packer(number, self.cursor["offset"])
        # A lane begins with little text, so that its first sequences come soon. With best fit the
        # sequences depend on what is packed together, so there the amount must not vary.
        small = Amount(1, LARGEST_BATCH.characters // 16)
        self._batch = LARGEST_BATCH if spec.best_fit else small
        self._ended = self.cursor["pass"] - 1  # the newest pass of which nothing is left to read
        self._is_empty = True
        self._lock = threading.Lock()  # of who reads
        self._failure: UserError | None = None

    def fill(self, passed: int, wanted: int) -> Status:
        """Read until a pass has `wanted` sequences ready, or all that there are."""
        with self._lock:
            self._refuse_forgotten(passed)
            while self._ended < passed and self._count(passed) < wanted:
                self._read_or_fail()
                self._refuse_forgotten(passed)
            return Status(self._count(passed), self._ended >= passed, self._is_empty)

    def read_ahead(self, most: int) -> None:
        """Read a little more, in the background. If it fails, `fill` raises the error later."""
        if not self._lock.acquire(blocking=False):  # another thread is reading
            return
        try:
            if len(self.ready) < most and self._ended + 1 != self._spec.passes:
                with contextlib.suppress(UserError):
                    self._read_or_fail()
        finally:
            self._lock.release()

    def take(self) -> PackedSequence:
        taken = self.ready.popleft()
        if taken.after:
            document, offset = taken.after
            self.cursor = {**document.block, "document": document.number, "offset": offset}
        else:
            skipped = self._documents.skipped
            self.cursor = {**START, "pass": taken.passed + 1}
            self.cursor |= _counts(skipped=skipped, left_out=skipped)
        return taken

    def _refuse_forgotten(self, passed: int) -> None:
        """Refuse a sequence of an earlier pass: it would have been taken before this pass began.

        So a stream that claims to be many passes ahead of its lanes costs one sequence to refute,
        and not the reading of all these passes.
        """
        if self.ready and self.ready[0].passed < passed:
            raise CheckpointError(
                f"a lane of {self._spec.name} has text left in pass {self.ready[0].passed}, and the"
                f" others are in pass {passed}; rule: a state.json that train wrote"
            )

    def _count(self, passed: int) -> int:
        """The number of sequences of a pass that are ready."""
        return sum(made.passed == passed for made in tuple(self.ready))

    def _read_or_fail(self) -> None:
        """Read a little; after a failure raise it again, because the readers are spent by it."""
        if self._failure:
            raise self._failure
        try:
            self._read()
        except UserError as error:
            self._failure = error
            raise

    def _read(self) -> None:
        """Make sequences of the next few documents; at the end of the pass begin the next one."""
        passed = self._documents.passed
        documents = self._documents.next_few(self._batch)
        if documents:
            self._is_empty = False
            self._batch = _doubled(self._batch)
            self.ready.extend(self._packer.pack(self._tokenize(documents), passed))
            return
        if passed + 1 == self._spec.passes:
            self.ready.extend(self._packer.rest(passed))
        self._ended = passed
        self._documents.begin_next_pass()

    def _tokenize(self, documents: list[Document]) -> list[Document]:
        tokenizer = self._spec.tokenizer
        beginnings = tokenizer.encode_arrays([document.text[0] for document in documents])
        tokenized = []
        for document, beginning in zip(documents, beginnings, strict=True):
            # A long document comes in pieces, so that there is never a list of all its tokens.
            parts = [beginning, *tokenizer.encode_arrays(document.text[1:])]
            parts.append(np.array([tokenizer.eot], tokenizer.dtype))
            tokenized.append(document._replace(text=[], tokens=np.concatenate(parts)))
        return tokenized


def _doubled(batch: Amount) -> Amount:
    return Amount(
        min(2 * batch.documents, LARGEST_BATCH.documents),
        min(2 * batch.characters, LARGEST_BATCH.characters),
    )


class _Found(NamedTuple):
    """A document that training may see, in the order of the source."""

    part: int  # its number in the pass
    file: str
    row: int
    text: list[str]  # in pieces


class _DocumentReader:
    """The documents of a lane, block by block, each block shuffled; one pass after another."""

    def __init__(self, spec: StreamSpec, lane: int, cursor: dict[str, Any]):
        self.passed: int = cursor["pass"]  # the pass that is read
        self.skipped = Counter[str](cursor.get("skipped", {}))  # what was left out so far
        self._skipped_before = self.skipped  # the same before the newest document
        self._spec = spec
        self._lane = lane
        self._found = self._find(cursor["part"], cursor["row"])
        self._next_block: int = cursor["block"]
        self._passed_over: int = cursor["document"]  # documents of it that an earlier run took
        self._block: Iterator[Document] = iter(())  # what is left of the newest block

    def next_few(self, most: Amount) -> list[Document]:
        """The next documents, about as many as `most`, of one block; none where the pass ends."""
        return _few(self._block, most) or _few(self._read_block(), most)

    def begin_next_pass(self) -> None:
        self.passed += 1
        self._next_block = 0
        self._found = self._find(part=0, row=0)

    def _find(self, part: int, row: int) -> Iterator[_Found]:
        """The documents of the pass that training may see, from a row of a part on."""
        spec = self._spec
        parts = spec.parts_of(self._lane, self.passed)[part:]
        for number, at, texts in spec.reader.documents(self.skipped, parts, row):
            self._skipped_before = self.skipped.copy()
            kept = spec.keep(texts)
            if kept is None:
                continue
            file = parts[number].file
            pieces = list(spec.tokenizer.pieces(kept, spec.reader.where(file, at)))
            yield _Found(part + number, spec.reader.files[file].name, at, pieces)

    def _read_block(self) -> Iterator[Document]:
        """Read the next block and shuffle it; an empty one where the pass ends."""
        found: list[_Found] = []
        characters = 0
        begin: dict[str, Any] = {}
        for document in self._found:
            if not found:
                begin = {"pass": self.passed, "block": self._next_block}
                begin |= {"part": document.part, "row": document.row}
                begin |= _counts(skipped=self._skipped_before)
            found.append(document)
            characters += sum(map(len, document.text))
            if len(found) >= self._spec.block.documents:
                break
            if characters >= self._spec.block.characters:
                break
        if self._passed_over > len(found):
            raise CheckpointError(
                f"a lane of {self._spec.name} stands at document {self._passed_over} of"
                f" {len(found)}; rule: a state.json that train wrote"
            )
        begin |= _counts(left_out=self.skipped)
        self._block = islice(self._shuffle(found, begin), self._passed_over, None)
        self._passed_over = 0
        if found:
            self._next_block += 1
        return self._block

    def _shuffle(self, found: list[_Found], begin: dict[str, Any]) -> list[Document]:
        place = self._lane, self.passed, self._next_block
        order = shuffled(len(found), hash_words(self._spec.key, FOR_DOCUMENTS, *place))
        no_tokens = np.empty(0, self._spec.tokenizer.dtype)
        documents = []
        for number, at in enumerate(order):
            _, file, row, text = found[at]
            documents.append(Document(begin, number, file, row, text, no_tokens))
        return documents


def _few(documents: Iterator[Document], most: Amount) -> list[Document]:
    """The next documents, up to an amount; the last one may exceed it."""
    few: list[Document] = []
    characters = 0
    while len(few) < most.documents and characters < most.characters:
        document = next(documents, None)
        if document is None:
            break
        few.append(document)
        characters += sum(map(len, document.text))
    return few


def _counts(**counts: Counter[str]) -> dict[str, Any]:
    """The counts of a cursor, without those that are empty."""
    return {name: dict(count) for name, count in counts.items() if count}
