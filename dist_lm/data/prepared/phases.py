"""The phases of preparing raw text, and the beginning of a text that is read without preparing."""

from collections import Counter, deque
from collections.abc import Container, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dist_lm.config import DataConfig
from dist_lm.console import count
from dist_lm.data.prepared.encode import TextPiece, encode_pieces
from dist_lm.data.prepared.found import prepared_folders
from dist_lm.data.prepared.holdout import SplitDocument, split_documents
from dist_lm.data.prepared.manifest import MANIFEST, find_prepared, read_manifest
from dist_lm.data.prepared.progress import Progress, Say, count_kinds
from dist_lm.data.prepared.writer import (
    PROGRESS,
    ProgressFile,
    SavedState,
    SplitWriter,
    list_files,
    write_state,
    write_tokenizer,
)
from dist_lm.data.remote import is_remote
from dist_lm.data.text.files import TextFile, find_files
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.data.tokenizer_training import cutter, is_trained_spec, train_tokenizer
from dist_lm.errors import DataError, UserError
from dist_lm.outside import check, read_json

# Documents. A smaller source holds out the tail of its text instead of whole documents.
SMALL = 100


def read_beginning(
    reader: Reader,
    tokenizer: Tokenizer,
    seen: Progress,
    *,
    documents: int | None = None,
    size: int | None = None,
) -> Iterator[str]:
    """The text of the first documents in pieces, up to a number of documents or of bytes.

    `seen` counts both.
    """
    for source, row, texts in reader.documents(Counter()):
        if seen.documents == documents or (size and seen.bytes >= size):
            return
        seen.documents += 1
        for piece in tokenizer.pieces(texts, reader.where(source, row)):
            seen.add(len(piece.encode()), source)
            yield piece


class Preparation:
    """The phases of preparing one source into a folder, in the order in which they are called.

    `settings` decide the content of the folder; another preparation of it must have the same.
    """

    def __init__(self, data: DataConfig, folder: Path, name: str, say: Say):
        self.data = data
        self.folder = folder
        self.say = say
        self.spec = data.named_sources()[name]
        self.field = data.field_of(name)  # where the input was given, for messages
        # The later fields of a source are there only if they are given: manifests of folders that
        # were prepared without them stay as they are.
        self.settings = self.spec.model_dump(
            mode="json", include={"input", "text_column", "separator"}
        )
        self.settings |= self.spec.model_dump(
            include={"template", "filter", "subset", "split"}, exclude_defaults=True
        )
        self.settings["tokenizer"] = data.tokenizer
        self.settings["val_fraction"] = data.val_fraction

    def look(self) -> dict[str, Any] | None:
        """Find what is there: the manifest of a finished preparation, or the text to prepare.

        Refuses what cannot be prepared here. Nothing is written, so doctor calls it too.
        """
        if find_prepared(self.folder):
            return self.read_finished()
        self.find_text()
        self.state = self.read_state()
        return None

    def read_finished(self) -> dict[str, Any]:
        """The manifest of a folder that was prepared before."""
        manifest = read_manifest(self.folder)
        self._check_settings(manifest.get("settings", {}))
        self.say(f"{self.folder}: prepared before, used as it is")
        self._warn_if_edited(manifest)
        return manifest

    def find_text(self) -> None:
        """Find the files of the source; those inside the folder itself are left out."""
        if prepared_folders(self.spec, self.field):
            raise DataError(
                f"{self.field}={self.spec.input!r} is a prepared folder already; rule: text"
            )
        self.reader = Reader(self.spec, self._find_files(), self.data.bad_rows, self.field)
        self.reader.refuse_missing_hub()

    def _find_files(self) -> list[TextFile]:
        folder = self.folder.resolve()
        files = []
        for file in find_files(self.spec, self.field):
            if not file.path or folder not in Path(file.path).resolve().parents:
                files.append(file)
        return files

    def _warn_if_edited(self, manifest: dict[str, Any]) -> None:
        """Warn if a text of this machine has another size than it had, or is newer."""
        if any(map(is_remote, self.spec.inputs)):
            return
        try:
            files = self._find_files()
        except DataError:  # it is gone: the preparation is all that is left of it
            return
        before = {source["name"]: source["bytes"] for source in manifest["sources"]}
        prepared_at = (self.folder / MANIFEST).stat().st_mtime_ns
        for file in files:
            if not file.path:  # a hub dataset
                return
            size = before.pop(file.name, None)
            if size != file.size or int(file.mark) > prepared_at:
                self._say_edited(file.path)
                return
        if before:
            self._say_edited(next(iter(before)))

    def _say_edited(self, file: str) -> None:
        self.say(
            f"warning: {file} is not as it was when {self.folder} was prepared (by size and time);"
            f" the earlier text is trained on; nearest: another run.dir, or remove {self.folder}"
        )

    def read_state(self) -> SavedState | None:
        """The state that an interrupted preparation with the same settings left, or None."""
        path = self.folder / PROGRESS
        if not path.is_file():
            return None

        def refuse(why: str) -> UserError:
            return DataError(f"{path}: {why}; nearest: remove {self.folder}, and prepare again")

        content = read_json(path, refuse)
        check(content, ProgressFile, refuse)
        state: SavedState = content  # type: ignore[assignment]
        self._check_settings(state["settings"])
        for before, now in zip_longest(state["sources"], list_files(self.reader)):
            if before != now:
                raise DataError(
                    f"{self.folder}: the text changed since its preparation began: {before} is"
                    f" now {now}; nearest: remove the folder"
                )
        finished = sum(len(split["shards"]) for split in state["splits"].values())
        self.say(
            f"{self.folder}: going on after {finished} finished shards; their text is read again"
            " but not encoded again"
        )
        return state

    def begin(self, tokenizer: Tokenizer | None) -> SavedState:
        """Read the text once to learn the tokenizer, and to see whether the source is small.

        If there is nothing to learn, only the first documents are read.
        """
        spec = self.data.tokenizer
        is_trained = tokenizer is None and is_trained_spec(spec)
        learns = is_trained and spec != "byte"
        seen = Progress("read", self.reader, self.say)
        if learns:
            pieces = read_beginning(self.reader, cutter(spec), seen)
            tokenizer = train_tokenizer(spec, pieces)
        else:
            if is_trained:
                tokenizer = cutter(spec)
            elif tokenizer is None:
                tokenizer = load_tokenizer(spec)
            pieces = read_beginning(self.reader, tokenizer, seen, documents=SMALL)
            deque(pieces, maxlen=0)
        self._say_seen(seen, is_whole=learns)
        is_small = seen.documents < SMALL
        size = seen.bytes if learns or is_small else None
        return self.begin_folder(tokenizer, size, self.tail_of(seen.bytes) if is_small else None)

    def tail_of(self, size: int) -> int:
        """The first byte or token of the held-out tail of a small source of this size."""
        return round(size * (1 - self.data.val_fraction))

    def begin_folder(self, tokenizer: Tokenizer, size: int | None, tail: int | None) -> SavedState:
        """Make the folder, with its tokenizer and a progress file in which no shard is finished.

        `size` and `tail` are the fields `bytes` and `tail` of that file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(self.folder, tokenizer)
        state = SavedState(
            bytes=size,
            tail=tail,
            settings=self.settings,
            sources=list_files(self.reader),
            splits={},
        )
        write_state(self.folder, state)
        return state

    def write_shards(
        self, state: SavedState, tokenizer: Tokenizer, excluded: Container[int], processes: int
    ) -> tuple[dict[str, Any], Counter[str]]:
        """Encode what no finished shard has.

        Returns the splits' entries in the manifest, and what was left out.
        """
        reason = tokenizer.why_slow()
        if reason and not tokenizer.atomic:
            self.say(f"encoding with tokenizers, not with the faster tiktoken: {reason}")
        skipped: Counter[str] = Counter()
        writers = {}
        for split in ("train", "val"):
            writers[split] = SplitWriter(self.folder, split, tokenizer, state)
        progress = Progress("prepared", self.reader, self.say, state["bytes"])
        documents = split_documents(
            reader=self.reader,
            val_fraction=self.data.val_fraction,
            tail_begin=state["tail"],
            skipped=skipped,
            excluded=excluded,
        )
        pieces = self._unfinished_pieces(documents, writers, progress)
        for piece, ids in encode_pieces(pieces, tokenizer, self.folder, processes):
            writers[piece.split].add(piece, ids)
        splits = {split: writer.close() for split, writer in writers.items()}
        progress.show(end=True)
        return splits, skipped

    def say_result(self, manifest: dict[str, Any]) -> None:
        """Say how much there is, and what was left out."""
        for split, entry in manifest["splits"].items():
            lost = f", {entry['unknown']:,} of them for unknown text" if entry["unknown"] else ""
            shards = count(len(entry["shards"]), "shard")
            self.say(
                f"{split}: {count(entry['documents'], 'document')},"
                f" {count(entry['bytes'], 'byte')} of text,"
                f" {count(entry['tokens'], 'token')}{lost} in {shards}"
            )
            if not entry["shards"]:
                self.say(
                    f"{split}: nothing is held out; nearest: a larger data.val_fraction, or text of"
                    " more lines"
                )
        if manifest["skipped"]:
            self.say(f"skipped: {count_kinds(manifest['skipped'])}")

    def _say_seen(self, seen: Progress, is_whole: bool) -> None:
        """Say what the first look at the text has shown; `is_whole`: it went to the end."""
        if not seen.documents:
            setting = f"{self.field}={self.spec.input!r}"
            number = len(self.reader.files)
            raise DataError(f"{setting}: no document with text in {count(number, 'file')}")
        is_small = seen.documents < SMALL
        if is_whole or is_small:
            self.say(
                f"found {count(seen.documents, 'document')}, {count(seen.bytes, 'byte')} of text in"
                f" {self.spec.title}"
            )
        if is_small and self.data.val_fraction:
            self.say(
                f"fewer than {SMALL} documents: the last {self.data.val_fraction:.1%} of text is"
                " held out, cut at a line end"
            )

    def _unfinished_pieces(
        self,
        documents: Iterator[SplitDocument],
        writers: dict[str, SplitWriter],
        progress: Progress,
    ) -> Iterator[TextPiece]:
        """The pieces that finished shards do not hold; those that they hold are only counted."""
        for document in documents:
            progress.documents += 1
            writer = writers[document.split]
            for piece in writer.cut(self.reader, document):
                progress.add(len(piece.text.encode()), document.source)
                if piece.place >= writer.place:
                    yield piece

    def _check_settings(self, before: dict[str, Any]) -> None:
        """Refuse a folder that was begun with other settings."""
        for name in {**self.settings, **before}:  # a field that is not given may have been
            value = self.settings.get(name)
            if before.get(name) == value:
                continue
            section = self.field.removesuffix("input")
            if name in ("tokenizer", "val_fraction"):
                section = "data."
            raise DataError(
                f"{self.folder} was prepared with {section}{name}={before.get(name)!r}, not"
                f" {value!r}; rule: one folder, one preparation; nearest: another folder, or"
                " remove this one"
            )
