"""What rank 0 makes in the run folder before the sources of a run can be opened.

A run goes on with what an earlier start of it has made there.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import RootModel

from dist_lm.config import Config, DataConfig, SourceConfig
from dist_lm.console import count
from dist_lm.data.prepared.kept import keep_validation, learn_tokenizer, validation_hashes
from dist_lm.data.prepared.preparing import preparation_of, prepare_dataset
from dist_lm.data.prepared.progress import Say
from dist_lm.data.text.files import TextFile, find_files
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer import Tokenizer, tokenizer_of
from dist_lm.disk import write_json
from dist_lm.errors import DataError, UserError
from dist_lm.outside import check, read_json


def prepare_alone(data: DataConfig, folder: Path, name: str, say: Say) -> None:
    """Prepare the only source of a run, which also has its validation. Rank 0."""
    prepare_dataset(data, folder, _cores(), say, name)  # each rank reads the manifest itself


class Groundwork:
    """Makes what several sources or streams need before they can be opened. Rank 0.

    These are a tokenizer, validation documents, and shards or lists of files. Each step finds what
    an earlier start of the run has made, and leaves it as it is.
    """

    def __init__(self, config: Config, folder: Path, prepared: Mapping[str, list[str]], say: Say):
        self._config = config
        self._folder = folder  # where everything is put
        self._prepared = prepared  # inputs that are prepared folders, by name
        self._say = say
        data = config.data
        self._raw = self._readers(data.named_sources())  # sources that are text
        self._raw_validation = self._readers(data.validation)
        # Tokens of a validation set: as many as an evaluation reads.
        self._val_tokens = config.run.eval_batches * data.global_batch * data.seq_len + 1

    def run(self) -> dict[str, dict[str, list[Any]]]:
        """Make everything ready; the files and parts of each stream."""
        data = self._config.data
        self._folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self._make_tokenizer()
        for name, reader in self._raw_validation.items():
            self._keep_validation(name, reader, tokenizer, whole=True)
        excluded = validation_hashes(self._folder, data.validation)
        if excluded and self._prepared:
            self._say(
                "warning: prepared folders are trained on as they are: documents of"
                " data.validation may be in them"
            )
        if not data.stream:
            for name in self._raw:
                own = self._folder / "sources" / name
                prepare_dataset(data, own, _cores(), self._say, name, excluded, tokenizer)
            return {}
        record = self._folder / "streams.json"
        streams = self._find_streams()
        if streams and not record.is_file():
            write_json(record, _files_of(streams))
        for name, reader in self._raw.items():
            self._describe(name, reader, len(streams[name]["parts"]))
            if self._config.run.eval_every and data.val_fraction:
                self._keep_first_held_out(name, reader, tokenizer)
        return streams

    def look(self) -> list[TextFile]:
        """The files of all text. Refuses what run() would; nothing is read or written."""
        if self._prepared:
            self._make_tokenizer()
        if self._config.data.stream:
            self._find_streams()
        else:
            for name in self._raw:
                own = self._folder / "sources" / name
                preparation_of(self._config.data, own, name, self._say).look()
        for reader in self._raw_validation.values():
            reader.refuse_missing_hub()
        readers = [*self._raw.values(), *self._raw_validation.values()]
        return list(chain.from_iterable(reader.files for reader in readers))

    def _find_streams(self) -> dict[str, dict[str, list[Any]]]:
        """The files and parts of each stream, which are as they were when the run began."""
        streams: dict[str, dict[str, list[Any]]] = {}
        for name, reader in self._raw.items():
            parts = reader.parts(self._config.data.lanes)
            streams[name] = {"files": [*reader.files], "parts": [*parts]}
        record = self._folder / "streams.json"
        if record.is_file():
            _refuse_changed(_files_of(streams), _read_record(record))
        return streams

    def _readers(self, specs: Mapping[str, SourceConfig]) -> dict[str, Reader]:
        data = self._config.data
        readers = {}
        for name, spec in specs.items():
            if name not in self._prepared:
                label = data.field_of(name)
                readers[name] = Reader(spec, find_files(spec, label), data.bad_rows, label)
        return readers

    def _make_tokenizer(self) -> Tokenizer:
        """The one tokenizer of the prepared folders, or else one learned for the run."""
        if not self._prepared:
            learn_tokenizer(self._config.data, [*self._raw.values()], self._folder, self._say)
            return tokenizer_of(str(self._folder))
        first, *others = chain.from_iterable(self._prepared.values())
        tokenizer = tokenizer_of(first)
        for other in others:
            if tokenizer_of(other).sha256 != tokenizer.sha256:
                raise DataError(
                    f"{other} has another tokenizer than {first}; rule: one for all; nearest:"
                    f" prepare it with --tokenizer {first}"
                )
        return tokenizer

    def _keep_validation(
        self, name: str, reader: Reader, tokenizer: Tokenizer, whole: bool
    ) -> None:
        keep_validation(
            self._config.data,
            reader,
            tokenizer,
            self._folder / "val" / name,
            self._val_tokens,
            self._say,
            whole=whole,
        )

    def _keep_first_held_out(self, name: str, reader: Reader, tokenizer: Tokenizer) -> None:
        """Keep a stream's first held-out documents, which validate it."""
        try:
            self._keep_validation(name, reader, tokenizer, whole=False)
        except UserError as error:
            if not self._config.data.validation:
                raise
            self._say(f"warning: no validation of its own for {name}: {error}")

    def _describe(self, name: str, reader: Reader, parts: int) -> None:
        """Say what of a stream's files a user may not expect."""
        lanes = self._config.data.lanes
        if parts < lanes:
            self._say(
                f"{reader.spec.title} has {count(parts, 'part')}, so {name} is read in as many"
                f" lanes, not data.lanes={lanes}"
            )
        names = [file.name for file in reader.files]
        read_again = [file for file in names if not file.endswith((".parquet", ".jsonl"))]
        if read_again:
            self._say(
                f"{name}: a resumed run reads {len(read_again)} of its files, such as"
                f" {read_again[0]}, from their beginnings"
            )


def _files_of(streams: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, list[list[Any]]]:
    """The files of each stream, as streams.json has them."""
    return {name: [list(file) for file in stream["files"]] for name, stream in streams.items()}


class _StreamsRecord(RootModel[dict[str, list[tuple[str, str, int, str]]]]):
    """The files of each stream, as `TextFile`s."""


def _read_record(record: Path) -> dict[str, list[list[Any]]]:
    def refuse(why: str) -> UserError:
        return DataError(f"{record}: {why}; nearest: a new run.dir")

    content = read_json(record, refuse)
    check(content, _StreamsRecord, refuse)
    return content


def _refuse_changed(
    now: Mapping[str, list[list[Any]]], before: Mapping[str, list[list[Any]]]
) -> None:
    """Refuse files that are not as they were when the run began: its cursors would not fit them."""
    rule = "rule: a stream's files stay; nearest:"
    for name, files in before.items():
        # Size and mark of each file by its name; the path in between may change.
        found = {file: marks for file, _, *marks in now.get(name, [])}
        for file, path, *marks in files:
            if found.pop(file, None) != marks:
                raise DataError(
                    f"{path or file} of {name} changed or vanished since the run began; {rule}"
                    " restore it, or start a new run.dir"
                )
        for file in found:
            raise DataError(
                f"{file} of {name} was not there when the run began; {rule} move it away, or start"
                " a new run.dir"
            )


def _cores() -> int:
    return len(os.sched_getaffinity(0))
