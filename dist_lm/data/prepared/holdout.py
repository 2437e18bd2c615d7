"""Decides which documents are held out for validation.

Invariant: a document is held out by a hash of its text alone, so that it never moves from
validation into training. Only a small source, with too few documents for that, holds out the tail
of its text instead.
"""

import hashlib
from collections import Counter
from collections.abc import Container, Iterator
from itertools import chain
from typing import NamedTuple

from dist_lm.data.text.formats import Reader

_HASHED = 2**20  # characters of a document that decide whether it is held out


class SplitDocument(NamedTuple):
    """A document, or the part of it that belongs to a split."""

    split: str
    source: int  # number of the file in the source
    row: int
    texts: Iterator[str]  # stretches of its text, to be used up before the next document


def document_hash(texts: Iterator[str]) -> tuple[int, Iterator[str]]:
    """64 bits of a document's text (of a very long one's beginning), and the text as it was."""
    head: list[str] = []
    size = 0
    while size < _HASHED:
        text = next(texts, "")
        if not text:
            break
        head.append(text)
        size += len(text)
    hashed = "".join(head)[:_HASHED].encode()
    digest = hashlib.blake2b(hashed, digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest, "little"), chain(head, texts)


def held_out(number: int, val_fraction: float) -> bool:
    """Whether a document with this hash is a validation document."""
    return number < val_fraction * 2**64


def split_documents(
    reader: Reader,
    val_fraction: float,
    tail_begin: int | None,
    skipped: Counter[str],
    excluded: Container[int],
) -> Iterator[SplitDocument]:
    """The documents of a source with their splits, in its order.

    With `tail_begin`, the text from that byte on is held out. Documents whose hash is among
    `excluded` are left out, and `skipped` counts what was left out.
    """
    tail = None if tail_begin is None else _Tail(tail_begin)
    for source, row, stretches in reader.documents(skipped):
        number, texts = document_hash(stretches)
        if number in excluded:
            skipped["validation documents of other sources"] += 1
        elif tail:
            yield from tail.split(source, row, texts)
        elif held_out(number, val_fraction):
            yield SplitDocument("val", source, row, texts)
        else:
            yield SplitDocument("train", source, row, texts)


class _Tail:
    """Cuts a small source's text in two: training first, the tail for validation."""

    def __init__(self, begin: int):
        self.begin = begin  # bytes of text before the tail
        self.position = 0  # bytes of text read
        self.rest = b""  # what follows the cut in the stretch that was cut

    def split(self, source: int, row: int, texts: Iterator[str]) -> Iterator[SplitDocument]:
        """The part of a document before the tail, and the part in it, if there are any."""
        if self.position < self.begin:
            yield SplitDocument("train", source, row, self._before_tail(texts))
            if self.rest:
                texts = chain([self.rest.decode()], texts)
                self.rest = b""
        first = next(texts, "")
        if first:
            yield SplitDocument("val", source, row, chain([first], texts))

    def _before_tail(self, texts: Iterator[str]) -> Iterator[str]:
        """The text up to the last line end before the tail, or else up to the next one after."""
        for text in texts:
            raw = text.encode()
            wanted = self.begin - self.position
            self.position += len(raw)
            end = 0
            if wanted < len(raw):
                end = raw.rfind(b"\n", 0, max(wanted, 0)) + 1 or raw.find(b"\n") + 1
            if end:
                self.rest = raw[end:]
                yield raw[:end].decode()
                return
            yield text
