"""Write a prepared folder: the tokenizer, then shards, and last of all the manifest.

Invariant: a folder with a manifest is whole. One without it has a progress file, which says what is
finished, so that an interrupted preparation goes on to the same bytes.
"""

from array import array
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
from pydantic import Field

from dist_lm.config import DataConfig
from dist_lm.data.prepared.encode import TextPiece
from dist_lm.data.prepared.holdout import SplitDocument
from dist_lm.data.prepared.manifest import FORMAT, MANIFEST, ShardEntry, SourceEntry
from dist_lm.data.prepared.shard_file import write_shard
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.disk import write_file, write_json
from dist_lm.outside import CheckedModel, Count

SHARD_TOKENS = 2**25
PROGRESS = "progress.json"


class SplitState(TypedDict):
    """The finished part of a split."""

    shards: list[dict[str, Any]]  # their entries in the manifest
    unknown: int  # tokens of them that stand for unknown text
    place: tuple[int, int] | list[int]  # of the piece in which the next shard begins ...
    skip: int  # ... after this many of its tokens


class SavedState(TypedDict, total=False):
    """The progress file of a preparation."""

    bytes: int | None  # of text in all, if all was read before
    tail: int | None  # bytes of text before the held-out tail, if the source is small
    settings: dict[str, Any]
    sources: list[dict[str, Any]]
    splits: dict[str, SplitState]


class SplitProgress(CheckedModel):
    """A `SplitState` that was read back."""

    shards: list[ShardEntry]
    unknown: Count
    place: Annotated[list[Count], Field(min_length=2, max_length=2)]
    skip: Count


class ProgressFile(CheckedModel):
    """A `SavedState` that was read back."""

    bytes: Count | None
    tail: Count | None
    settings: dict[str, Any]
    sources: list[SourceEntry]
    splits: dict[Literal["train", "val"], SplitProgress]


def list_files(reader: Reader) -> list[dict[str, Any]]:
    """The files of a source as a manifest lists them."""
    return [{"name": file.name, "bytes": file.size} for file in reader.files]


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer's files, tokenizer.json last: if it is there, all are."""
    for name, text in reversed(tokenizer.files().items()):
        write_file(folder / name, [text.encode()])


def write_state(folder: Path, state: SavedState) -> None:
    """Write the progress file."""
    write_json(folder / PROGRESS, state)


def write_manifest(
    folder: Path,
    data: DataConfig,
    tokenizer: Tokenizer,
    reader: Reader,
    splits: dict[str, Any],
    more: dict[str, Any],
) -> dict[str, Any]:
    """Write the manifest, which makes a folder a prepared one."""
    manifest = {
        "format": FORMAT,
        "tokenizer": {
            "name": data.tokenizer,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eot": tokenizer.eot,
            "unk": tokenizer.unk,
            "dtype": tokenizer.dtype.name,
        },
        **more,
        "splits": splits,
        "sources": list_files(reader),
    }
    write_json(folder / MANIFEST, manifest)
    (folder / PROGRESS).unlink()
    return manifest


class SplitWriter:
    """The token stream of a split, cut into shards of SHARD_TOKENS.

    `cut` takes the documents in order; `add` takes the tokens of their pieces, without those that
    finished shards hold (all pieces before `place`).
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, state: SavedState):
        self.folder = folder
        self.split = split
        self.tokenizer = tokenizer
        self.state = state  # of the whole preparation; written after each shard
        nothing = SplitState(shards=[], unknown=0, place=[0, 0], skip=0)
        finished = state["splits"].get(split, nothing)
        self.shards = finished["shards"]
        self.unknown = finished["unknown"]
        document, piece = finished["place"]
        self.place = (document, piece)
        self.skip = finished["skip"]
        # The shard that is being filled: its tokens, and for each document in it the first token,
        # the number of the file, and the row.
        self.buffer = np.empty(SHARD_TOKENS, tokenizer.dtype)
        self.filled = 0
        self.starts = array("q")
        self.sources = array("q")
        self.rows = array("q")
        # Documents, and bytes of their text, those in finished shards too.
        self.documents = 0
        self.bytes = 0

    def cut(self, reader: Reader, document: SplitDocument) -> Iterator[TextPiece]:
        """The next document's text in pieces that encode as the whole does."""
        number = self.documents
        self.documents += 1
        where = reader.where(document.source, document.row)
        texts = self.tokenizer.pieces(document.texts, where)
        for n, (text, following) in enumerate(pairwise(chain(texts, [""]))):
            self.bytes += len(text.encode())
            yield TextPiece(
                split=self.split,
                place=(number, n),
                source=document.source,
                row=document.row,
                text=text,
                last=not following,
            )

    def add(self, piece: TextPiece, ids: np.ndarray) -> None:
        """Add the tokens of the next piece, and end-of-text after a document."""
        if piece.last:
            ids = np.append(ids, self.tokenizer.dtype.type(self.tokenizer.eot))
        at = self.skip if piece.place == self.place else 0
        while at < len(ids):
            is_beginning = piece.place[1] == 0 and at == 0
            if is_beginning or not self.filled:
                self.starts.append(self.filled)
                self.sources.append(piece.source)
                self.rows.append(piece.row)
            taken = min(len(ids) - at, SHARD_TOKENS - self.filled)
            self.buffer[self.filled : self.filled + taken] = ids[at : at + taken]
            self.filled += taken
            at += taken
            if self.filled == SHARD_TOKENS:
                self.finish(piece.place, at)

    def finish(self, place: tuple[int, int], skip: int) -> None:
        """Write the tokens so far as a shard, and note that.

        The next shard begins in the piece at `place` after `skip` tokens.
        """
        if not self.filled:
            return
        tokens = self.buffer[: self.filled]
        if self.tokenizer.unk is not None:
            self.unknown += int((tokens == self.tokenizer.unk).sum())
        path = self.folder / f"{self.split}-{len(self.shards):05d}.safetensors"
        entry = write_shard(path, tokens, self.starts, self.sources, self.rows)
        self.shards.append(entry)
        self.place = place
        self.skip = skip
        self.state["splits"][self.split] = SplitState(
            shards=self.shards, unknown=self.unknown, place=place, skip=skip
        )
        write_state(self.folder, self.state)
        self.filled = 0
        for column in (self.starts, self.sources, self.rows):
            del column[:]

    def close(self) -> dict[str, Any]:
        """Write the last shard; returns the split's entry in the manifest."""
        self.finish((self.documents, 0), 0)
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": sum(shard["tokens"] for shard in self.shards),
            "unknown": self.unknown,
            "shards": self.shards,
        }
