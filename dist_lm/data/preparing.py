"""Raw text -> token shards: a prepared folder, the same bytes from any number of processes, killed or not.

Documents are held out by a hash of their text, so that none ever moves from validation into training. Also what a
stream keeps beside itself: its tokenizer, and its first held-out documents as shards.
"""

import hashlib
import json
import shutil
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator
from itertools import accumulate, chain, pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.config import DataConfig
from dist_lm.data.encode import TextPiece, _encode
from dist_lm.data.files import find_files
from dist_lm.data.formats import Reader
from dist_lm.data.manifest import FORMAT, MANIFEST, find_prepared, read_manifest
from dist_lm.data.shards import write_shard
from dist_lm.data.tokenizer import (
    Tokenizer,
    cutter,
    is_trained_spec,
    load_tokenizer,
    train_tokenizer,
)
from dist_lm.disk import write_file, write_json
from dist_lm.errors import DataError

SHARD_TOKENS = 2**25
SMALL = 100  # documents; a smaller source holds out the tail of its text instead of whole documents
LEARNED_BYTES = (
    2**26
)  # of text at the beginning of each source from which a stream's tokenizer is learned
LOOKED_AT = 1000  # documents among which a stream must have one for validation
PROGRESS = "progress.json"
_HASHED = 2**20  # characters of a document that decide whether it is held out

Say = Callable[[str], None]


def prepare_dataset(
    data: DataConfig,
    folder: str | Path,
    processes: int = 1,
    say: Say = print,
    name: str = "text",
    excluded: Container[int] = (),
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Make a prepared folder of a source (else of `data.input`), or go on with one; the manifest. One process calls it.

    Documents whose hash is among `excluded` are left out: they are validation documents of another source. A tokenizer
    is learned as `data.tokenizer` says, unless one is given.
    """
    work = _Preparation(data, Path(folder), name, say)
    if find_prepared(folder):
        return work.read_finished()
    work.find_text()
    state = work.read_progress() or work.begin(tokenizer)
    tokenizer = Tokenizer.load(folder)
    splits, skipped = work.write_shards(state, tokenizer, excluded, processes)
    more = {"settings": work.settings, "skipped": dict(sorted(skipped.items()))}
    manifest = _write_manifest(work.folder, data, tokenizer, work.reader, splits, more)
    work.say_result(manifest)
    return manifest


class _Preparation:
    """The phases of preparing one source into a folder."""

    def __init__(self, data: DataConfig, folder: Path, name: str, say: Say):
        self.data, self.folder, self.say = data, folder, say
        self.spec, self.field = data.named_sources()[name], data.field_of(name)
        # what decides the content of the folder; the later fields of a source only where they are given
        self.settings = self.spec.model_dump(include={"input", "text_column", "separator"})
        given = self.spec.model_dump(
            include={"template", "filter", "subset", "split"}, exclude_defaults=True
        )
        self.settings |= given | {"tokenizer": data.tokenizer, "val_fraction": data.val_fraction}

    def read_finished(self) -> dict[str, Any]:
        manifest = read_manifest(self.folder)
        self._refuse_other(manifest.get("settings", {}))
        self.say(f"{self.folder}: prepared before, used as it is")
        return manifest

    def find_text(self) -> None:
        if find_prepared(self.spec.input):
            raise DataError(
                f"{self.field}={self.spec.input!r} is a prepared folder already; rule: text"
            )
        found, inside = find_files(self.spec, self.field), self.folder.resolve()
        sources = [
            source
            for source in found
            if not source.path or inside not in Path(source.path).resolve().parents
        ]
        self.reader = Reader(self.spec, sources, self.data.bad_rows, self.field)

    def read_progress(self) -> dict[str, Any] | None:
        """What an interrupted preparation with the same settings left; None if nothing."""
        for stray in self.folder.glob("tmp-*"):
            stray.unlink()
        if not (self.folder / PROGRESS).is_file():
            return None
        state: dict[str, Any] = json.loads((self.folder / PROGRESS).read_bytes())
        self._refuse_other(state["settings"])
        for before, now in zip_longest(state["sources"], _listed(self.reader)):
            if before != now:
                raise DataError(
                    f"{self.folder}: the text changed since its preparation began: {before} is now {now};"
                    " nearest: remove the folder"
                )
        done = sum(len(split["shards"]) for split in state["splits"].values())
        self.say(
            f"{self.folder}: going on after {done} finished shards; their text is read again but not encoded again"
        )
        return state

    def begin(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Read the text once, if need be, to learn the tokenizer and where a small source's held-out tail begins."""
        data, spec = self.data, self.data.tokenizer
        trained = not tokenizer and is_trained_spec(spec)
        learns = trained and spec != "byte"
        tokenizer = tokenizer or (cutter(spec) if trained else load_tokenizer(spec))
        found = Progress("read", self.reader, self.say)
        pieces = _beginning(self.reader, tokenizer, found, documents=None if learns else SMALL)
        if learns:
            tokenizer = train_tokenizer(spec, pieces)
        else:
            deque(pieces, maxlen=0)
        if not found.documents:
            where = f"{self.field}={self.spec.input!r}"
            raise DataError(f"{where}: no document with text in {len(self.reader.files)} files")
        small = found.documents < SMALL
        if learns or small:
            self.say(
                f"found {found.documents:,} documents, {found.bytes:,} bytes of text in {self.spec.input}"
            )
        if small and data.val_fraction:
            self.say(
                f"fewer than {SMALL} documents: the last {data.val_fraction:.1%} of text is held out, cut at a line end"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_tokenizer(self.folder, tokenizer)
        state = {
            "bytes": found.bytes if learns or small else None,
            "tail": round(found.bytes * (1 - data.val_fraction)) if small else None,
            "settings": self.settings,
            "sources": _listed(self.reader),
            "splits": {},
        }
        write_json(self.folder / PROGRESS, state)
        return state

    def write_shards(
        self, state: dict[str, Any], tokenizer: Tokenizer, excluded: Container[int], processes: int
    ) -> tuple[dict[str, Any], Counter[str]]:
        """Encode what no finished shard has; the splits' entries in the manifest, and what was left out."""
        skipped: Counter[str] = Counter()
        writers = {
            split: _Writer(self.folder, split, tokenizer, state) for split in ("train", "val")
        }
        progress = Progress("prepared", self.reader, self.say, state["bytes"])

        def unfinished() -> Iterator[TextPiece]:
            for split, source, row, texts in _documents(
                self.data, self.reader, state["tail"], skipped, excluded
            ):
                progress.documents += 1
                writer = writers[split]
                for piece in writer.cut(self.reader, source, row, texts):
                    progress.add(len(piece.text.encode()), source)
                    if piece.place >= writer.place:
                        yield piece

        for piece, ids in _encode(unfinished(), tokenizer, self.folder, processes):
            writers[piece.split].add(piece, ids)
        splits = {split: writer.close() for split, writer in writers.items()}
        progress.show(end=True)
        return splits, skipped

    def say_result(self, manifest: dict[str, Any]) -> None:
        for split, entry in manifest["splits"].items():
            lost = f", {entry['unknown']:,} of them for unknown text" if entry["unknown"] else ""
            self.say(
                f"{split}: {entry['documents']:,} documents, {entry['bytes']:,} bytes of text,"
                f" {entry['tokens']:,} tokens{lost} in {len(entry['shards'])} shards"
            )
            if not entry["shards"]:
                self.say(
                    f"{split}: nothing is held out; nearest: a larger data.val_fraction, or text of more lines"
                )
        if manifest["skipped"]:
            self.say(
                "skipped: "
                + ", ".join(f"{number:,} {kind}" for kind, number in manifest["skipped"].items())
            )

    def _refuse_other(self, have: dict[str, Any]) -> None:
        for name, value in self.settings.items():
            if have.get(name) != value:
                section = (
                    "data."
                    if name in ("tokenizer", "val_fraction")
                    else self.field.removesuffix("input")
                )
                raise DataError(
                    f"{self.folder} was prepared with {section}{name}={have.get(name)!r}, not {value!r};"
                    " rule: one folder, one preparation; nearest: another folder, or remove this one"
                )


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    for name, text in reversed(
        tokenizer.files().items()
    ):  # tokenizer.json last: where it is, all is there
        write_file(folder / name, [text.encode()])


def _listed(reader: Reader) -> list[dict[str, Any]]:
    return [{"name": source.name, "bytes": source.size} for source in reader.files]


def _write_manifest(
    folder: Path,
    data: DataConfig,
    tokenizer: Tokenizer,
    reader: Reader,
    splits: dict[str, Any],
    more: dict[str, Any],
) -> dict[str, Any]:
    """What makes a folder a prepared one, last of all."""
    facts = {
        "name": data.tokenizer,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "unk": tokenizer.unk,
        "dtype": tokenizer.dtype.name,
    }
    manifest = {
        "format": FORMAT,
        "tokenizer": facts,
        **more,
        "splits": splits,
        "sources": _listed(reader),
    }
    write_json(folder / MANIFEST, manifest)
    (folder / PROGRESS).unlink()
    return manifest


# --- what a stream keeps beside itself


def learn_tokenizer(data: DataConfig, readers: list[Reader], folder: Path, say: Say) -> None:
    """The tokenizer of several sources or of streams, made once: from the beginning of each, if it is to be learned."""
    if (folder / "tokenizer.json").is_file():
        return

    def beginnings() -> Iterator[str]:
        whole = cutter(data.tokenizer)
        for reader in readers:
            found = Progress("read for the tokenizer", reader, say)
            yield from _beginning(reader, whole, found, size=LEARNED_BYTES)
            say(
                f"{data.tokenizer} learns from {found.documents:,} documents, {found.bytes:,} bytes of text in"
                f" {reader.spec.input}"
            )

    trained = is_trained_spec(data.tokenizer)
    tokenizer = (
        train_tokenizer(data.tokenizer, beginnings()) if trained else load_tokenizer(data.tokenizer)
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, tokenizer)


def keep_validation(
    data: DataConfig,
    reader: Reader,
    tokenizer: Tokenizer,
    folder: Path,
    wanted: int,
    say: Say,
    *,
    whole: bool = False,
) -> list[int]:
    """Write the first held-out documents of a source, in its order, as shards of at least so many tokens.

    `whole`: all its documents are for validation. Their hashes are kept beside them, and returned.
    """
    kept = folder / "documents.json"
    if kept.is_file():
        return list(json.loads(kept.read_bytes()))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    writer, hashes, tokens = _Writer(folder, "val", tokenizer, {"splits": {}}), list[int](), 0
    seen = Progress("looked for validation in", reader, say)
    for source, row, texts in reader.documents(Counter()):
        seen.documents += 1
        number, texts = document_hash(texts)
        if whole or held_out(number, data.val_fraction):
            for piece in writer.cut(reader, source, row, texts):
                ids = np.array(tokenizer.encode(piece.text), tokenizer.dtype)
                writer.add(piece, ids)
                tokens += len(ids)
            hashes.append(number)
        elif not hashes and seen.documents >= LOOKED_AT:
            break
        seen.add(0, source)
        if tokens >= wanted:
            break
    if not hashes:
        raise DataError(
            f"data.val_fraction={data.val_fraction} holds out none of the first {seen.documents} documents of"
            f" {reader.spec.input}; rule: a stream's first held-out documents validate it; nearest: prepare it, a"
            " larger data.val_fraction, a source in data.validation, or run.eval_every=0"
        )
    splits = {
        "train": {"documents": 0, "bytes": 0, "tokens": 0, "unknown": 0, "shards": []},
        "val": writer.close(),
    }
    _write_tokenizer(folder, tokenizer)
    _write_manifest(folder, data, tokenizer, reader, splits, {})
    write_json(kept, hashes)
    say(f"{folder.name}: {len(hashes):,} documents of {reader.spec.input} are kept for validation")
    return hashes


# --- documents and their pieces


def document_hash(texts: Iterator[str]) -> tuple[int, Iterator[str]]:
    """64 bits of a document's text (of a very long one's beginning), and the text as it was."""
    head: list[str] = []
    while sum(map(len, head)) < _HASHED and (text := next(texts, "")):
        head.append(text)
    digest = hashlib.blake2b(
        "".join(head)[:_HASHED].encode(), digest_size=8, person=b"validation"
    ).digest()
    return int.from_bytes(digest, "little"), chain(head, texts)


def held_out(number: int, val_fraction: float) -> bool:
    """Whether a document is a validation document: a function of its hash alone."""
    return number < val_fraction * 2**64


def _beginning(
    reader: Reader,
    tokenizer: Tokenizer,
    found: "Progress",
    *,
    documents: int | None = None,
    size: int | None = None,
) -> Iterator[str]:
    """The text of the first documents in pieces, up to a number of documents or of bytes; `found` counts both."""
    for source, row, texts in reader.documents(Counter()):
        if found.documents == documents or (size and found.bytes >= size):
            return
        found.documents += 1
        for piece in tokenizer.pieces(texts, reader.where(source, row)):
            found.add(len(piece.encode()), source)
            yield piece


def _documents(
    data: DataConfig,
    reader: Reader,
    tail: int | None,
    skipped: Counter[str],
    excluded: Container[int],
) -> Iterator[tuple[str, int, int, Iterator[str]]]:
    """(split, source, row, texts) of each document, used up in turn; `tail`: bytes of text before the held-out ones."""
    position, rest = 0, b""

    def before_tail(texts: Iterator[str]) -> Iterator[str]:
        """A document's text up to the last line end before the tail, or else the next one after; `rest` follows."""
        nonlocal position, rest
        assert tail is not None, "only a source that holds out its tail comes here"
        for text in texts:
            raw = text.encode()
            wanted, position = tail - position, position + len(raw)
            end = (
                (raw.rfind(b"\n", 0, max(wanted, 0)) + 1 or raw.find(b"\n") + 1)
                if wanted < len(raw)
                else 0
            )
            if end:
                rest = raw[end:]
                yield raw[:end].decode()
                return
            yield text

    for source, row, texts in reader.documents(skipped):
        number, texts = document_hash(texts)
        if number in excluded:
            skipped["validation documents of other sources"] += 1
            continue
        if tail is None:
            yield "val" if held_out(number, data.val_fraction) else "train", source, row, texts
            continue
        if position < tail:
            rest = b""
            yield "train", source, row, before_tail(texts)
            texts = chain([rest.decode()] if rest else [], texts)
        if first := next(texts, ""):
            yield "val", source, row, chain([first], texts)


class _Writer:
    """The token stream of a split, cut into shards of SHARD_TOKENS; notes in the progress file what is finished."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, state: dict[str, Any]):
        self.folder, self.split, self.tokenizer, self.state = folder, split, tokenizer, state
        done = state["splits"].get(split, {"shards": [], "unknown": 0, "place": [0, 0], "skip": 0})
        self.shards: list[dict[str, Any]] = done["shards"]
        self.unknown: int = done["unknown"]
        self.place: tuple[int, int] = tuple(
            done["place"]
        )  # the piece in which the next shard begins ...
        self.skip: int = done["skip"]  # ... after so many of its tokens
        self.buffer = np.empty(SHARD_TOKENS, tokenizer.dtype)
        self.filled = 0
        self.columns = (
            array("q"),
            array("q"),
            array("q"),
        )  # start, source and row of each document in the shard
        self.documents = self.bytes = 0  # of text, those in finished shards too

    def cut(
        self, reader: Reader, source: int, row: int, texts: Iterator[str]
    ) -> Iterator[TextPiece]:
        """The next document's text in pieces that encode as the whole does."""
        pieces, document = self.tokenizer.pieces(texts, reader.where(source, row)), self.documents
        self.documents += 1
        for n, (text, following) in enumerate(pairwise(chain(pieces, [""]))):
            self.bytes += len(text.encode())
            yield TextPiece(self.split, (document, n), source, row, text, last=not following)

    def add(self, piece: TextPiece, ids: np.ndarray) -> None:
        if piece.last:
            ids = np.append(ids, self.tokenizer.dtype.type(self.tokenizer.eot))
        at = self.skip if piece.place == self.place else 0
        while at < len(ids):
            if not self.filled or (piece.place[1] == 0 and at == 0):
                for column, value in zip(
                    self.columns, (self.filled, piece.source, piece.row), strict=True
                ):
                    column.append(value)
            taken = min(len(ids) - at, SHARD_TOKENS - self.filled)
            self.buffer[self.filled : self.filled + taken] = ids[at : at + taken]
            self.filled, at = self.filled + taken, at + taken
            if self.filled == SHARD_TOKENS:
                self.finish(piece.place, at)

    def finish(self, place: tuple[int, int], skip: int) -> None:
        """Write the tokens so far as a shard; the next one begins in the piece at `place` after `skip` tokens."""
        if not self.filled:
            return
        tokens = self.buffer[: self.filled]
        if self.tokenizer.unk is not None:
            self.unknown += int((tokens == self.tokenizer.unk).sum())
        path = self.folder / f"{self.split}-{len(self.shards):05d}.safetensors"
        self.shards.append(write_shard(path, tokens, *self.columns))
        self.place, self.skip = place, skip
        self.state["splits"][self.split] = {
            "shards": self.shards,
            "unknown": self.unknown,
            "place": place,
            "skip": skip,
        }
        write_json(self.folder / PROGRESS, self.state)
        self.filled = 0
        for column in self.columns:
            del column[:]

    def close(self) -> dict[str, Any]:
        """Write the last shard; the split's entry in the manifest."""
        self.finish((self.documents, 0), 0)
        tokens = sum(shard["tokens"] for shard in self.shards)
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": tokens,
            "unknown": self.unknown,
            "shards": self.shards,
        }


class Progress:
    """What was read, said in one updating line on a terminal, else in a line every ten seconds."""

    def __init__(self, verb: str, reader: Reader, say: Say, total: int | None = None):
        self.verb, self.total, self.say, self.begin = verb, total, say, time.monotonic()
        self.ends = list(accumulate(source.size for source in reader.files))
        self.terminal = sys.stdout.isatty() and say is print
        self.pause = 0.2 if self.terminal else 10.0
        self.due = self.begin + self.pause
        self.documents = self.bytes = 0
        self.source, self.before = 0, 0  # the source being read, and the bytes of text before it

    def add(self, size: int, source: int) -> None:
        self.bytes += size
        if source != self.source:
            self.source, self.before = source, self.bytes
        if time.monotonic() >= self.due:
            self.show()

    def show(self, end: bool = False) -> None:
        now = time.monotonic()
        self.due = now + self.pause
        rate = self.bytes / max(now - self.begin, 1e-9)
        line = f"{self.verb} {self.documents:,} documents, {self.bytes / 1e6:,.1f} MB, {rate / 1e6:.2f} MB/s"
        # bytes of text in all: known from the survey, or as the sources so far had them for their size on disk
        read = self.ends[self.source - 1] if self.source else 0
        ratio = self.before / read if read else 1
        left = (self.total or ratio * self.ends[-1]) - self.bytes
        if left > 0 and not end:
            line += f", about {left / max(rate, 1):,.0f} s left"
        if self.terminal:
            print(f"\r{line:<78}", end="\n" if end else "", flush=True)
        else:
            self.say(line)
