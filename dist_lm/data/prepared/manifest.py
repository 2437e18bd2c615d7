"""The manifest of a prepared folder: which shards it has, and what they were made of.

A prepared folder may come from a stranger. Its manifest is therefore checked where it is read, so
that a name in it never leads out of the folder, and its numbers and hashes have the right form.
"""

import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import FailFast, Field, model_validator

from dist_lm.data.remote import SMALL_FILE, exists, fetch_small, is_remote
from dist_lm.errors import DataError, UserError
from dist_lm.outside import (
    CheckedModel,
    Count,
    FileName,
    Sha256,
    Text,
    check,
    parse_json,
    read_bytes,
)

MANIFEST = "dataset.json"
FORMAT = 1

Setting = Text | int | float | bool | None


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
    """The fields on which every reader of a manifest may rely.

    `settings` are those that it was prepared with; a stream's kept validation has none.
    """

    tokenizer: TokenizerEntry
    settings: dict[str, Setting | list[Setting] | dict[str, Setting]] = Field(default={})
    splits: SplitEntries
    sources: Annotated[list[SourceEntry], FailFast()]


def find_prepared(path: str | Path) -> bool:
    """Whether a path or URL is a prepared folder."""
    if is_remote(str(path)):
        return exists(f"{path}/{MANIFEST}")
    return Path(path, MANIFEST).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder or URL, checked: see `Manifest`."""
    file = f"{folder}/{MANIFEST}"

    def refuse(why: str) -> UserError:
        return DataError(f"{file}: {why}; nearest: prepare again")

    if is_remote(file):
        content = _fetch(file)
    else:
        content = read_bytes(Path(file), refuse, SMALL_FILE)
    manifest: dict[str, Any] = parse_json(content, refuse)
    if not isinstance(manifest, dict):
        raise refuse(f"not a manifest but a {type(manifest).__name__}")
    if manifest.get("format") != FORMAT:
        actual = reprlib.repr(manifest.get("format"))
        raise DataError(f"{file}: format {actual} is not the format {FORMAT} of this version")
    check(manifest, Manifest, lambda why: refuse(f"not a manifest as it was written: {why}"))
    return manifest


def _fetch(url: str) -> bytes:
    try:
        return fetch_small(url)
    except OSError as error:
        raise DataError(
            f"{url}: not a readable manifest ({type(error).__name__}); nearest: prepare again"
        ) from error
