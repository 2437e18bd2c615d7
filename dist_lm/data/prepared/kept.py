"""Keeps on disk a stream's tokenizer, and its first held-out documents as shards."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from dist_lm.config import DataConfig
from dist_lm.console import count
from dist_lm.data.prepared.holdout import SplitDocument, document_hash, held_out
from dist_lm.data.prepared.phases import read_beginning
from dist_lm.data.prepared.progress import Progress, Say, count_kinds
from dist_lm.data.prepared.token_files import add_document, documents
from dist_lm.data.prepared.writer import SplitWriter, write_manifest, write_tokenizer
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.data.tokenizer_training import cutter, is_trained_spec, train_tokenizer
from dist_lm.disk import write_json
from dist_lm.errors import DataError, UserError
from dist_lm.outside import parse_json, read_bytes

# Bytes of text at the beginning of each source, from which a stream's tokenizer is learned.
LEARNED_BYTES = 2**26
LOOKED_AT = 1000  # documents among which a stream must have one for validation
# A split without documents, as a manifest has it.
_NOTHING = {"documents": 0, "bytes": 0, "tokens": 0, "unknown": 0, "shards": []}


def learn_tokenizer(data: DataConfig, readers: list[Reader], folder: Path, say: Say) -> None:
    """Make the tokenizer of several sources or of streams, unless it is there.

    If it is to be learned, it is learned from the beginning of each source.
    """
    if (folder / "tokenizer.json").is_file():
        return
    if is_trained_spec(data.tokenizer):
        tokenizer = train_tokenizer(data.tokenizer, _read_beginnings(data, readers, say))
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, tokenizer)


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
    """Write the first held-out documents of a source as shards of at least `wanted` tokens.

    `whole`: all its documents are for validation. Returns their hashes, which are kept beside them.
    """
    hashes_file = folder / "documents.json"
    if hashes_file.is_file():
        return read_hashes(hashes_file)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    writer = SplitWriter(folder, "val", tokenizer, {"splits": {}})
    val_fraction = 1.0 if whole else data.val_fraction
    seen = Progress("looked for validation in", reader, say)
    skipped = Counter[str]()
    if reader.spec.holds_tokens:
        hashes = _copy_first(data, reader, writer, wanted)
    else:
        hashes = _write_first_held_out(reader, writer, val_fraction, wanted, seen, skipped)
    if not hashes:
        raise DataError(
            f"data.val_fraction={data.val_fraction} holds out none of the first {seen.documents}"
            f" documents of {reader.spec.title}; rule: a stream's first held-out documents validate"
            " it; nearest: prepare it, a larger data.val_fraction, a source in data.validation, or"
            " run.eval_every=0"
        )
    write_tokenizer(folder, tokenizer)
    splits = {"train": _NOTHING, "val": writer.close()}
    write_manifest(folder, data, tokenizer, reader, splits, {"skipped": dict(skipped)})
    write_json(hashes_file, hashes)
    kept = count(len(hashes), "document")
    say(f"{folder.name}: {kept} of {reader.spec.title} kept for validation")
    if whole and skipped:
        say(f"{folder.name}: skipped: {count_kinds(skipped)}")
    return hashes


def read_hashes(file: Path) -> list[int]:
    """The hashes of the documents that are kept for validation."""

    def refuse(why: str) -> UserError:
        return DataError(f"{file}: {why}; nearest: remove {file.parent}, which is then made again")

    hashes = parse_json(read_bytes(file, refuse), refuse)
    if not isinstance(hashes, list) or not all(type(number) is int for number in hashes):
        raise refuse("must be a list of whole numbers")
    return hashes


def validation_hashes(folder: Path, names: Iterable[str]) -> frozenset[int]:
    """Hashes of all documents that a run keeps for its validation sets, and never trains on.

    `folder` is the run's data folder, `names` are those of the sets.
    """
    hashes: set[int] = set()
    for name in names:
        file = folder / "val" / name / "documents.json"
        if file.is_file():
            hashes.update(read_hashes(file))
    return frozenset(hashes)


def _read_beginnings(data: DataConfig, readers: list[Reader], say: Say) -> Iterator[str]:
    """The beginning of each source, in pieces."""
    tokenizer = cutter(data.tokenizer)
    for reader in readers:
        seen = Progress("read for the tokenizer", reader, say)
        yield from read_beginning(reader, tokenizer, seen, size=LEARNED_BYTES)
        say(
            f"{data.tokenizer} learns from {seen.documents:,} documents, {seen.bytes:,} bytes of"
            f" text in {reader.spec.title}"
        )


def _copy_first(data: DataConfig, reader: Reader, writer: SplitWriter, wanted: int) -> list[int]:
    """Copy the first documents of files of tokens; returns their hashes."""
    hashes: list[int] = []
    tokens = 0
    for document in documents(reader, data.dtype, writer.tokenizer):
        add_document(writer, document)
        hashes.append(document.number())
        tokens += len(document.tokens)
        if tokens >= wanted:
            break
    return hashes


def _write_first_held_out(
    reader: Reader,
    writer: SplitWriter,
    val_fraction: float,
    wanted: int,
    seen: Progress,
    skipped: Counter[str],
) -> list[int]:
    """Write held-out documents until there are enough tokens; returns their hashes.

    `skipped` counts what is left out on the way. It gives up if the first LOOKED_AT documents have
    none.
    """
    tokenizer = writer.tokenizer
    hashes: list[int] = []
    tokens = 0
    for source, row, stretches in reader.documents(skipped):
        seen.documents += 1
        number, texts = document_hash(stretches)
        if held_out(number, val_fraction):
            for piece in writer.cut(reader, SplitDocument(writer.split, source, row, texts)):
                (ids,) = tokenizer.encode_arrays([piece.text])
                writer.add(piece, ids)
                tokens += len(ids)
            hashes.append(number)
        elif not hashes and seen.documents >= LOOKED_AT:
            break
        seen.add(0, source)
        if tokens >= wanted:
            break
    return hashes
