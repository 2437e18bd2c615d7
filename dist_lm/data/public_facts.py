"""What a run's data is, for a reader of its model card: nothing in it is private.

Of a URL the credentials and the query are left out, which may be a signature. Of a local file or
folder nothing is told but that it is one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dist_lm.config import SourceConfig
from dist_lm.data.prepared.parts import parts_of
from dist_lm.data.prepared.sequences import TokenSequences
from dist_lm.data.remote import is_remote
from dist_lm.data.text.files import TextFile

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LOCAL_SCHEMES = ("file", "memory", "local")
LOCAL = "local files"


@dataclass(frozen=True)
class PublicFacts:
    """A source of a run."""

    name: str
    places: tuple[str, ...]  # hub datasets, URLs, or that it is local
    hub: tuple[str, ...] = ()  # the hub datasets among them
    documents: int | None = None  # to train on; None: not counted
    text_bytes: int | None = None  # of these documents
    tokens: int | None = None  # of these documents
    held_out_tokens: int | None = None
    files: int | None = None  # of a stream
    file_bytes: int | None = None  # as stored


def facts_of_shards(name: str, spec: SourceConfig, shards: TokenSequences) -> PublicFacts:
    """Of prepared shards: what their manifests say of the text that they were made of."""
    places: dict[str, None] = {}
    hub: dict[str, None] = {}
    sums = dict.fromkeys(("documents", "bytes", "tokens"), 0)
    held_out = 0
    for part in parts_of(shards):
        inputs = _as_list(part.manifest.get("settings", {}).get("input") or spec.inputs)
        datasets = _hub_datasets(inputs, [entry["name"] for entry in part.manifest["sources"]])
        hub |= dict.fromkeys(datasets)
        places |= dict.fromkeys(_place(one, datasets) for one in inputs)
        split = part.manifest["splits"]["train"]
        for key in sums:
            sums[key] += split[key]
        held_out += part.manifest["splits"]["val"]["tokens"]
    return PublicFacts(
        name,
        places=tuple(places),
        hub=tuple(hub),
        documents=sums["documents"],
        text_bytes=sums["bytes"],
        tokens=sums["tokens"],
        held_out_tokens=held_out,
    )


def facts_of_files(name: str, spec: SourceConfig, files: Sequence[TextFile]) -> PublicFacts:
    """Of a stream: its files, whose documents nobody has counted."""
    datasets = [file.name for file in files if not file.path]
    stored = [file for file in files if file.path]
    places = dict.fromkeys(_place(one, datasets) for one in spec.inputs)
    sizes: Mapping[str, Any] = {}
    if stored:
        sizes = {"files": len(stored), "file_bytes": sum(file.size for file in stored)}
    return PublicFacts(name, places=tuple(places), hub=tuple(datasets), **sizes)


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(one) for one in value]


def _hub_datasets(inputs: Sequence[str], files: Sequence[str]) -> list[str]:
    """The inputs that are datasets of the hub: these are listed as files under their own name."""
    return [one for one in inputs if one in files and _HUB_NAME.fullmatch(one)]


def _place(one: str, hub: Sequence[str]) -> str:
    """An input without what is nobody's business."""
    if one in hub:
        return one
    if one == "stdlib":
        return "the standard library of Python"
    return public_url(one) or LOCAL


def public_url(text: str) -> str:
    """A URL without user, password, query and fragment; nothing if it is not a public place."""
    if not is_remote(text):
        return ""
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return ""
    if parts.scheme.lower() in _LOCAL_SCHEMES or not host:
        return ""
    return f"{parts.scheme}://{host}{port}{parts.path}"
