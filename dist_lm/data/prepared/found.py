"""Finds the prepared folders that an input means: one, or the parts of a source in order."""

import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dist_lm.config import SourceConfig
from dist_lm.data.prepared.manifest import find_prepared
from dist_lm.data.prepared.writer import PROGRESS
from dist_lm.data.remote import is_remote
from dist_lm.data.text.files import format_of
from dist_lm.errors import DataError

# slurm/prepare.sh makes part-00000, part-00001 ..., and beside each a folder of links to its files.
_PART = re.compile(r"(.*-)([0-9]{5})")
_LINKS = ".files"


def prepared_folders(source: SourceConfig, label: str = "data.input") -> list[str]:
    """The prepared folders or URLs that the inputs of a source are; none if they are text.

    Parts that are missing or not finished are refused, and so are parts beside text.
    """
    folders: list[str] = []
    text: list[str] = []
    for one in source.inputs:
        found = _prepared_at(one, f"{label}={one!r}")
        folders += found
        if not found:
            text.append(one)
    if folders and text:
        raise DataError(
            f"{label}={source.title}: {folders[0]} is a prepared folder and {text[0]} is not;"
            " rule: a source is one or the other; nearest: two of data.sources"
        )
    for folder in folders:
        if folders.count(folder) > 1:
            raise DataError(f"{label}={source.title}: {folder} is given twice; rule: once")
    return folders


def _prepared_at(one: str, setting: str) -> list[str]:
    """The prepared folders that one input means."""
    if find_prepared(one):
        return [one]
    path = Path(one)
    if is_remote(one):
        return []
    if path.is_dir():
        parts = _parts(path.iterdir(), setting)
        return [] if _has_text(path, parts) else parts
    if glob.has_magic(one):
        return _parts(map(Path, glob.glob(one)), setting)
    return []


def _parts(candidates: Iterable[Path], setting: str) -> list[str]:
    """The prepared folders among some, by name; refuses to leave out a part of them."""
    folders = sorted(path for path in candidates if path.is_dir())
    finished = [folder for folder in folders if find_prepared(folder)]
    if not finished:
        return []
    begun = {folder for folder in folders if (folder / PROGRESS).is_file()}
    begun |= {folder.with_suffix("") for folder in folders if folder.suffix == _LINKS}
    begun |= set(_gaps(finished))
    for folder in sorted(begun - set(finished)):
        raise DataError(
            f"{setting}: {folder} is not prepared, but {finished[0]} is; rule: all parts are;"
            " nearest: the command that makes it, which goes on where it stands"
        )
    return [str(folder) for folder in finished]


def _gaps(folders: Iterable[Path]) -> Iterator[Path]:
    """The numbered parts below the highest one of each kind."""
    for folder in folders:
        match = _PART.fullmatch(folder.name)
        if match:
            for number in range(int(match[2])):
                yield folder.with_name(f"{match[1]}{number:05d}")


def _has_text(folder: Path, parts: list[str]) -> bool:
    """Whether a folder has more than prepared folders: then it is a folder of text as before."""
    for path in folder.iterdir():
        is_known = str(path) in parts or path.suffix == _LINKS or path.name.startswith(".")
        if path.is_dir() and not is_known:
            return True
        if path.is_file() and format_of(path.name):
            return True
    return False
