"""The manifest of a prepared folder: which shards it has, and what they were made of.

A prepared folder may come from a stranger. Its manifest is therefore checked where it is read, so
that a name in it never leads out of the folder, and its numbers and hashes have the right form.
"""

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
# Characters of a shard's file name. The cache puts some before it; a file system allows 255.
_LONGEST_NAME = 200
SHA256 = re.compile(r"[0-9a-f]{64}")


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
Text = Annotated[str, Field(max_length=2**16)]  # short enough to be repeated in a message
Setting = Text | int | float | bool | None


class CheckedModel(BaseModel):
    """A part of a JSON file from outside. It may hold more fields than these, which are read."""

    model_config = ConfigDict(frozen=True, strict=True)


class ShardEntry(CheckedModel):
    """One shard of a split."""

    file: FileName
    tokens: Count
    bytes: Count
    sha256: Sha256


class SplitEntry(CheckedModel):
    """One split, and its shards in order."""

    documents: Count
    bytes: Count  # of text
    tokens: Count
    unknown: Count  # tokens that stand for unknown text
    shards: Annotated[list[ShardEntry], FailFast()]

    @model_validator(mode="after")
    def _check_sum(self) -> Self:
        total = sum(shard.tokens for shard in self.shards)
        if total != self.tokens:
            raise ValueError(f"tokens={self.tokens} must be the {total} of all its shards")
        return self


class SplitEntries(CheckedModel):
    """Both splits; one of them may have no shards."""

    train: SplitEntry
    val: SplitEntry


class TokenizerEntry(CheckedModel):
    """The tokenizer whose ids the shards hold."""

    name: Text
    sha256: Sha256
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    eot: Count
    unk: Count | None
    dtype: Literal["uint16", "uint32"]


class SourceEntry(CheckedModel):
    """One file of the text."""

    name: str
    bytes: Count


class Manifest(CheckedModel):
    """What every reader of a manifest may rely on.

    `settings` are those that it was prepared with; a stream's kept validation has none.
    """

    tokenizer: TokenizerEntry
    settings: dict[str, Setting | list[Setting] | dict[str, Setting]] = {}
    splits: SplitEntries
    sources: Annotated[list[SourceEntry], FailFast()]


def first_fault(error: ValidationError) -> str:
    """The first validation error as one short line: field, value, rule."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    rule = first["msg"].removeprefix("Value error, ")
    if not field:
        return rule
    if first["type"] == "missing":
        return f"{field}: {rule}"
    return f"{field}={reprlib.repr(first['input'])}: {rule}"


def find_prepared(path: str | Path) -> bool:
    """Whether a path or URL is a prepared folder."""
    if is_remote(str(path)):
        return exists(f"{path}/{MANIFEST}")
    return Path(path, MANIFEST).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder or URL, checked: see `Manifest`."""
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
        actual = reprlib.repr(manifest.get("format"))
        raise DataError(f"{file}: format {actual} is not the format {FORMAT} of this version")
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        fault = first_fault(error)
        raise DataError(
            f"{file}: not a manifest as it was written: {fault}; nearest: prepare again"
        ) from error
    return manifest


def _read_small(file: Path) -> bytes:
    """A whole small file of this machine; refuses a pipe or device, which might never end."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{file}: not a regular file")
    if status.st_size > SMALL_FILE:
        limit = SMALL_FILE // 2**20
        raise DataError(f"{file}: larger than the {limit} MB that such a file may have")
    return file.read_bytes()
