"""Make a prepared folder of files of raw tokens, such as nanoGPT's train.bin.

A file has nothing but tokens, each of two or four bytes, little endian. An end-of-text token ends a
document. The tokens are copied as they are, one by one in their order, so that everything that
reads prepared folders reads them.
"""

import hashlib
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_lm.config import DataConfig
from dist_lm.console import count
from dist_lm.data.prepared.encode import TextPiece
from dist_lm.data.prepared.holdout import held_out
from dist_lm.data.prepared.phases import SMALL, Preparation
from dist_lm.data.prepared.progress import Progress, Say, count_kinds
from dist_lm.data.prepared.writer import (
    SavedState,
    SplitWriter,
)
from dist_lm.data.remote import is_remote
from dist_lm.data.text.files import TextFile
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import DataError

_CHUNK = 2**22  # tokens that are looked at at once
_HASHED = 2**18  # tokens of a document that decide whether it is held out


class TokenDocument(NamedTuple):
    """A document of a file of tokens."""

    source: int  # number of the file in the source
    row: int  # number of the document in the file, from 1
    tokens: np.ndarray  # without the end of text
    has_end: bool  # whether an end of text follows; the last document of a file may lack it

    def number(self) -> int:
        """64 bits of its tokens, by which it may be held out."""
        raw = self.tokens[:_HASHED].astype("<u4").tobytes()
        digest = hashlib.blake2b(raw, digest_size=8, person=b"validation").digest()
        return int.from_bytes(digest, "little")


class TokenPreparation(Preparation):
    """The phases of preparing files of tokens."""

    def __init__(self, data: DataConfig, folder: Path, name: str, say: Say):
        super().__init__(data, folder, name, say)
        self.settings["dtype"] = data.dtype

    def find_text(self) -> None:
        for one in self.spec.inputs:
            if is_remote(one):
                raise DataError(
                    f"{self.field}={one!r}: files of tokens are read from a local disk; nearest:"
                    " a copy of it here"
                )
        super().find_text()

    def begin(self, tokenizer: Tokenizer | None) -> SavedState:
        named = load_named(self.data)
        if tokenizer is not None and tokenizer.sha256 != named.sha256:
            raise DataError(
                f"{self.field}={self.spec.title}: data.tokenizer={self.data.tokenizer} is another"
                " one than the other sources have; rule: one for all"
            )
        seen = 0
        total = sum(len(map_tokens(file, self.data.dtype)) for file in self.reader.files)
        for _ in documents(self.reader, self.data.dtype, named):
            seen += 1
            if seen == SMALL:
                break
        is_small = seen < SMALL
        if is_small and self.data.val_fraction:
            self.say(
                f"fewer than {SMALL} documents: the last {self.data.val_fraction:.1%} of the tokens"
                " are held out"
            )
        return self.begin_folder(named, None, self.tail_of(total) if is_small else None)

    def write_shards(
        self, state: SavedState, tokenizer: Tokenizer, excluded: Container[int], processes: int
    ) -> tuple[dict[str, Any], Counter[str]]:
        skipped = Counter[str]()
        writers = {}
        for split in ("train", "val"):
            writers[split] = SplitWriter(self.folder, split, tokenizer, state)
        progress = Progress("copied", self.reader, self.say)
        found = documents(self.reader, self.data.dtype, tokenizer)
        if state["tail"] is not None:
            found = _cut_at(state["tail"], found)
        position = 0
        for document in found:
            number = document.number()
            is_tail = state["tail"] is not None and position >= state["tail"]
            is_held_out = state["tail"] is None and held_out(number, self.data.val_fraction)
            position += len(document.tokens) + document.has_end
            progress.documents += 1
            if number in excluded:
                skipped["validation documents of other sources"] += 1
                continue
            add_document(writers["val" if is_tail or is_held_out else "train"], document)
            progress.add(document.tokens.nbytes, document.source)
        splits = {split: writer.close() for split, writer in writers.items()}
        progress.show(end=True)
        return splits, skipped

    def say_result(self, manifest: dict[str, Any]) -> None:
        for split, entry in manifest["splits"].items():
            self.say(
                f"{split}: {count(entry['documents'], 'document')},"
                f" {count(entry['tokens'], 'token')} in {count(len(entry['shards']), 'shard')}"
            )
        if manifest["skipped"]:
            self.say(f"skipped: {count_kinds(manifest['skipped'])}")


def load_named(data: DataConfig) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; the settings refuse one that is to be learned."""
    if data.tokenizer == "byte":
        return train_tokenizer("byte", [])
    return load_tokenizer(data.tokenizer)


def add_document(writer: SplitWriter, document: TokenDocument) -> None:
    """Add a document's tokens as they are, unless finished shards hold them."""
    piece = TextPiece(
        split=writer.split,
        place=(writer.documents, 0),
        source=document.source,
        row=document.row,
        text="",
        last=document.has_end,
    )
    writer.documents += 1
    if piece.place >= writer.place:
        writer.add(piece, document.tokens.astype(writer.tokenizer.dtype))


def documents(reader: Reader, dtype: str | None, tokenizer: Tokenizer) -> Iterator[TokenDocument]:
    """The documents of all files of a source, in order."""
    for source, file in enumerate(reader.files):
        tokens = map_tokens(file, dtype)
        row = 1
        begin = 0
        for start in range(0, len(tokens), _CHUNK):
            chunk = tokens[start : start + _CHUNK]
            _refuse_unknown(file, chunk, start, tokenizer)
            for end in (np.flatnonzero(chunk == tokenizer.eot) + start).tolist():
                yield TokenDocument(source, row, tokens[begin:end], has_end=True)
                begin = end + 1
                row += 1
        if begin < len(tokens):
            yield TokenDocument(source, row, tokens[begin:], has_end=False)


def map_tokens(file: TextFile, dtype: str | None) -> np.ndarray:
    """The tokens of a file, read from disk only where they are touched."""
    assert dtype, "the settings of files of tokens have their type"
    kind = np.dtype(dtype).newbyteorder("<")
    if file.size % kind.itemsize or not file.size:
        raise DataError(
            f"{file.path}: {file.size} bytes are no tokens of data.dtype={dtype}; rule: a multiple"
            f" of {kind.itemsize}"
        )
    tokens = np.memmap(file.path, kind, "r")
    head = tokens[: 2**20]
    if kind.itemsize == 2 and len(head) > 1 and head.any() and not head[1::2].any():
        raise DataError(
            f"{file.path}: every second token is 0 with data.dtype={dtype}; nearest: uint32"
        )
    return tokens


def _refuse_unknown(file: TextFile, chunk: np.ndarray, start: int, tokenizer: Tokenizer) -> None:
    """Refuse tokens that the tokenizer does not have."""
    largest = int(chunk.max())
    if largest >= tokenizer.vocab_size:
        place = start + int(chunk.argmax())
        raise DataError(
            f"{file.path}: token {place} is {largest}, and the tokenizer has"
            f" {tokenizer.vocab_size} tokens; rule: data.tokenizer and data.dtype are those that"
            " the file was made with"
        )


def _cut_at(tail: int, found: Iterator[TokenDocument]) -> Iterator[TokenDocument]:
    """The documents, the one in which the held-out tail begins cut in two."""
    position = 0
    for document in found:
        size = len(document.tokens) + document.has_end
        before = tail - position
        position += size
        if not 0 < before < size:
            yield document
            continue
        yield document._replace(tokens=document.tokens[:before], has_end=False)
        yield document._replace(tokens=document.tokens[before:])
