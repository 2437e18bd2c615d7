"""Tells where a sequence was read from, and which steps had a passage in their sequences.

Both are for `show`: training carries the small objects along, and asks them nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from dist_lm.data.packing import DocumentSpan, PackedSequence
from dist_lm.data.prepared.sequences import TokenSequences
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer import Tokenizer


class Origin(Protocol):
    """A sequence of a step, and where it was read from."""

    @property
    def source(self) -> str:
        """The name of the source."""

    def title(self) -> str:
        """The sequence in words: its source and its number there."""

    def tokens(self) -> np.ndarray:
        """Its inputs and their targets."""

    def documents(self) -> Sequence[DocumentSpan]:
        """The documents in it, by the names and rows that a person looks for."""


class Search(Protocol):
    """Looks for a passage in the sequences of one source, which come in the order of training."""

    def look(self, step: int, sequence: Any) -> Iterator[tuple[int, str]]:
        """Steps that a sequence of this step shows to have had the passage, and where it was.

        It may be an earlier step too, whose sequence had the beginning of the passage.
        """


# --- prepared shards


class PreparedSequence(NamedTuple):
    """A sequence of prepared shards."""

    source: str
    shards: TokenSequences
    seq_len: int
    stride: int
    number: int
    epoch: int | None = None  # from 1; None: of a mixture, where epochs are not told

    def title(self) -> str:
        shard, first = self.shards.find(self.number, self.seq_len, self.stride)
        of_epoch = f" of epoch {self.epoch}" if self.epoch else ""
        last = first + self.seq_len
        return (
            f"sequence {self.number}{of_epoch}, {self.shards.files[shard]} tokens {first} to {last}"
        )

    def tokens(self) -> np.ndarray:
        (tokens,) = self.shards.read([self.number], self.seq_len, self.stride)
        return np.asarray(tokens)

    def documents(self) -> Sequence[DocumentSpan]:
        spans = self.shards.documents_of(self.number, self.seq_len, self.stride)
        return [DocumentSpan(*span) for span in spans]


class PreparedSearch:
    """Finds beforehand which sequences hold the passage, or a part of it.

    A part counts if the passage goes on in the sequence behind it in the shard.
    """

    def __init__(
        self, shards: TokenSequences, seq_len: int, stride: int, text: str, tokenizer: Tokenizer
    ):
        self._holding: set[int] = set()
        before = np.empty(0, np.int64)
        for number in range(sum(shards.counts(seq_len, stride))):
            (tokens,) = shards.read([number], seq_len, stride)
            if text in tokenizer.decode(tokens):
                self._holding.add(number)
            elif text in tokenizer.decode(np.concatenate([before[:stride], tokens])):
                self._holding |= {number - 1, number}
            before = tokens

    def look(self, step: int, sequence: PreparedSequence) -> Iterator[tuple[int, str]]:
        if sequence.number in self._holding:
            yield step, f"{sequence.source}: sequence {sequence.number}"


# --- streams


class StreamedSequence(NamedTuple):
    """A sequence of a stream."""

    source: str
    reader: Reader
    packed: PackedSequence

    def title(self) -> str:
        number = self.packed.passed + 1
        return f"source {self.source}, pass {number}, {len(self.packed.tokens)} tokens"

    def tokens(self) -> np.ndarray:
        return self.packed.tokens

    def documents(self) -> Sequence[DocumentSpan]:
        row_number = _row_numbers(self.reader)
        return [span._replace(row=row_number(*span[:2])) for span in self.packed.spans]


def _row_numbers(reader: Reader) -> Callable[[str, int], int]:
    """Gives the row as a person counts it, of a file and the row that a span names."""
    files = {file.name: number for number, file in enumerate(reader.files)}
    return cache(lambda file, row: reader.row_number(files[file], row))  # it may read the file


class StreamSearch:
    """Joins the parts of a document that sequences end in and go on with."""

    def __init__(self, text: str, tokenizer: Tokenizer, reader: Reader):
        self._text = text
        self._tokenizer = tokenizer
        self._row_number = _row_numbers(reader)
        # By file and row of a document that goes on: the step and the tokens of its newest part.
        self._ends: dict[tuple[str, int], tuple[int, np.ndarray]] = {}

    def look(self, step: int, sequence: StreamedSequence) -> Iterator[tuple[int, str]]:
        for file, row, start, stop in sequence.packed.spans:
            tokens = sequence.packed.tokens[start:stop]
            earlier, begin = self._ends.pop((file, row), (step, tokens[:0]))
            # The last token of a sequence is the first one of the next.
            going_on = tokens[min(1, len(begin)) :]
            if self._holds(np.concatenate([begin, going_on])):
                steps = {step} if self._holds(tokens) else {earlier, step}
                where = f"{file} row {self._row_number(file, row)}"
                for at in steps:
                    yield at, where
            if stop == len(sequence.packed.tokens):
                self._ends[file, row] = step, tokens

    def _holds(self, tokens: np.ndarray) -> bool:
        return self._text in self._tokenizer.decode(tokens)
