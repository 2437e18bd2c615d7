"""data.manifest."""

import json
import re
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)

from dist_lm.data.remote import SMALL_FILE, exists, fetch_small, is_remote
from dist_lm.errors import DataError, UserError

MANIFEST = "dataset.json"


FORMAT = 1


FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


SHA256 = re.compile(r"[0-9a-f]{64}")


_LONGEST_NAME = 200  # characters of a shard's file name; the cache puts some before it, and a file system allows 255


def _check_file_name(name: str) -> str:
    if not FILE_NAME.fullmatch(name):
        raise ValueError(f"must match {FILE_NAME.pattern}")
    return name


def _check_sha256(text: str) -> str:
    if not SHA256.fullmatch(text):
        raise ValueError(f"must match {SHA256.pattern}")
    return text


Count = Annotated[int, Field(ge=0, le=2**48)]


FileName = Annotated[str, Field(max_length=_LONGEST_NAME), AfterValidator(_check_file_name)]


Sha256 = Annotated[str, AfterValidator(_check_sha256)]


Text = Annotated[str, Field(max_length=2**16)]  # what may be repeated in a message


Value = Text | int | float | bool | None


class _Checked(BaseModel):
    """A part of a JSON file from outside; it may hold more than is read."""

    model_config = ConfigDict(frozen=True, strict=True)


class _ShardEntry(_Checked):
    file: FileName
    tokens: Count
    bytes: Count
    sha256: Sha256


class _Split(_Checked):
    documents: Count
    bytes: Count  # of text
    tokens: Count
    unknown: Count
    shards: Annotated[list[_ShardEntry], FailFast()]

    @model_validator(mode="after")
    def _check_sum(self) -> Self:
        total = sum(shard.tokens for shard in self.shards)
        if total != self.tokens:
            raise ValueError(f"tokens={self.tokens} must be the {total} of all its shards")
        return self


class _Splits(_Checked):
    train: _Split
    val: _Split


class _TokenizerFacts(_Checked):
    name: Text
    sha256: Sha256
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    eot: Count
    unk: Count | None
    dtype: Literal["uint16", "uint32"]


class _SourceEntry(_Checked):
    name: str
    bytes: Count


class _Manifest(_Checked):
    """What every reader of a manifest may rely on."""

    tokenizer: _TokenizerFacts
    settings: dict[
        str, Value | dict[str, Value]
    ] = {}  # it was prepared with; a stream's kept validation has none
    splits: _Splits
    sources: Annotated[list[_SourceEntry], FailFast()]


def _first_fault(error: ValidationError) -> str:
    """The first validation error as one short line: field, value, rule."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    rule = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing" or not field:
        return f"{field}: {rule}".removeprefix(": ")
    return f"{field}={reprlib.repr(first['input'])}: {rule}"


def find_prepared(path: str | Path) -> bool:
    """Whether a path or URL is a prepared folder."""
    return exists(f"{path}/{MANIFEST}") if is_remote(str(path)) else Path(path, MANIFEST).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder or URL, checked: see `_Manifest`."""
    file = f"{folder}/{MANIFEST}"
    try:
        content = fetch_small(file) if is_remote(file) else _read_small(Path(file))
        manifest: dict[str, Any] = json.loads(content)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: not a readable manifest ({type(error).__name__}); prepare again"
        ) from error
    if not isinstance(manifest, Mapping):
        raise DataError(f"{file}: not a manifest but a {type(manifest).__name__}; prepare again")
    if manifest.get("format") != FORMAT:
        found = reprlib.repr(manifest.get("format"))
        raise DataError(f"{file}: format {found} is not the format {FORMAT} of this version")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise DataError(
            f"{file}: not a manifest as it was written: {_first_fault(error)}; nearest: prepare again"
        ) from error
    return manifest


def _read_small(file: Path) -> bytes:
    """A whole small file of this machine; a pipe or device, which might never end, is refused."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{file}: not a regular file")
    if found.st_size > SMALL_FILE:
        raise DataError(
            f"{file}: larger than the {SMALL_FILE // 2**20} MB that such a file may have"
        )
    return file.read_bytes()
