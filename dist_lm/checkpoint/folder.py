"""Step folders: their names, whether one is whole, finding and deleting them.

A folder named step-* is complete, because it is renamed only after its manifest was written. It may
have been damaged or tampered with since, so a checkpoint is verified before it is used, and
whatever lies there instead of what we wrote is refused with a UserError after bounded work.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dist_lm import outside
from dist_lm.arithmetic import share_out
from dist_lm.errors import CheckpointError, UserError
from dist_lm.nearest import nearest
from dist_lm.outside import FILE_NAME, SHA256, open_regular
from dist_lm.pretrained import download

FORMAT = 1  # of the manifest
_STEP_NAME = re.compile(r"step-([0-9]{8,})")
_LARGEST_MANIFEST = 2**20  # bytes; one of 100 files has 15,000
# What a clone or a download of a hub repository has besides; nobody reads it.
_OF_THE_HUB = {".gitattributes", ".cache", ".git"}
_LONGEST_NAME = 255  # characters that a message shows of a file name


# --- finding


def step_name(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    match = _STEP_NAME.fullmatch(folder.name)
    assert match, f"{folder} is no step folder"
    return int(match[1])


def step_folders(run_dir: Path) -> list[Path]:
    """All step folders, oldest first."""
    folders = []
    for path in run_dir.glob("step-*"):
        if path.is_dir() and _STEP_NAME.fullmatch(path.name):
            folders.append(path)
    return sorted(folders, key=step_of)


def newest_valid(
    run_dir: Path,
    check: Callable[[Path], Any] | None = None,
    folders: Sequence[Path] | None = None,
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over.

    `check` refuses what is not fit for the caller's use; without one, files must match their
    hashes. `folders` are those to try, oldest first, or else all steps of the run. Refuses if there
    are only bad ones.
    """
    passed_over: list[str] = []
    for folder in reversed(step_folders(run_dir) if folders is None else folders):
        try:
            (check or verify)(folder)
            return folder, passed_over
        except UserError as error:
            passed_over.append(str(error))
    if passed_over:
        raise CheckpointError(
            f"run.dir={run_dir} holds no valid checkpoint: {passed_over[0]}; rule: never restart"
            " silently at step 0; choose another run.dir, or remove the damaged folders",
        )
    return None, []


def locate(name: str, say: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of the model that `name` means.

    It may be a run (then its newest valid step), a step folder, a transformers folder or a hub
    name.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        if os.path.lexists(path / "manifest.json"):
            verify(path)
        return path
    if path.is_dir():
        folder, passed_over = newest_valid(path)
        for why in passed_over:
            say(f"passed over {why}")
        if folder is None:
            raise CheckpointError(f"{name}: holds neither a checkpoint (step-*) nor a config.json")
        return folder
    is_hub_name = not path.is_absolute() and not name.startswith(".") and name.count("/") == 1
    if not is_hub_name or path.parent.is_dir():
        raise CheckpointError(
            f"{name}: no such folder; rule: a run, a step folder, a transformers folder or hub name"
            f"{_neighbours(path)}"
        )
    return download(name, ["*.json", "*.safetensors"])


def _neighbours(path: Path) -> str:
    """Text that names what is there instead: the steps of the run, or the nearest folder."""
    if step_folders(path.parent):
        steps = [folder.name for folder in step_folders(path.parent)]
        return f"; {path.parent} has {', '.join(steps[-8:])}"
    folders: list[Path] = []
    if path.parent.is_dir():
        folders = [folder for folder in path.parent.iterdir() if folder.is_dir()]
    guess = nearest(str(path), folders)
    return f"; did you mean {guess}?" if guess else ""


# --- checking


def verify(folder: Path, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Check every file's size and hash against the manifest, and return the manifest.

    A folder may have been copied or renamed to something that is not step-*: then its step is the
    manifest's. Several ranks divide the files among them; each must call this.
    """
    manifest = _read_manifest(folder)
    files = manifest["files"]
    step = manifest["step"]
    if _STEP_NAME.fullmatch(folder.name) and step != step_of(folder):
        raise damaged(folder / "manifest.json", f"belongs to step {step}")
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{folder.name}: cannot be read ({error.strerror})") from error
    extra = present - set(files) - {"manifest.json"} - _OF_THE_HUB
    if extra:
        raise damaged(folder / min(extra), "is not in the manifest")
    checker = share_out({name: facts["size"] for name, facts in files.items()}, world_size)
    for name, facts in files.items():
        if checker[name] == rank:
            _check_file(folder / name, facts["size"], facts["sha256"])
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Its types, names and hashes have been checked, so it can be used as it is.
    """
    path = folder / "manifest.json"
    manifest = read_json(path, _LARGEST_MANIFEST)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("files"), dict):
        raise damaged(path, f"is not of format {FORMAT}")
    if not _is_count(manifest.get("step")):
        raise damaged(path, "its step is not a number >= 0")
    for name, facts in manifest["files"].items():
        if not FILE_NAME.fullmatch(name):
            raise damaged(path, f"{_printable(name)} is not a file name")
        if not isinstance(facts, dict) or facts.keys() != {"size", "sha256"}:
            raise damaged(path, f"{_printable(name)} must have a size and a sha256, nothing else")
        if not _is_count(facts["size"]):
            raise damaged(path, f"the size of {_printable(name)} is not a number >= 0")
        if not isinstance(facts["sha256"], str) or not SHA256.fullmatch(facts["sha256"]):
            raise damaged(path, f"the sha256 of {_printable(name)} is not 64 hexadecimal digits")
    return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int too


def _check_file(path: Path, size: int, sha256: str) -> None:
    """Refuse a file that is not as the manifest describes it."""
    try:
        with open_regular(path) as file:
            actual_size = os.fstat(file.fileno()).st_size
            if actual_size != size:
                raise damaged(path, f"has {actual_size} bytes, the manifest says {size}")
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise damaged(path, "does not match its hash in the manifest")
    except FileNotFoundError as error:
        raise damaged(path, "is missing") from error
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from error


def read_json(path: Path, largest: int = outside.LARGEST) -> dict[str, Any]:
    """A JSON object of a checkpoint."""
    return outside.read_json(path, partial(damaged, path), largest)


def damaged(path: Path, why: str) -> UserError:
    return CheckpointError(f"{path.parent.name or '.'}/{_printable(path.name)}: {why}")


def _printable(name: str) -> str:
    """A file name for a message. A foreign one may be long or hold control characters."""
    if FILE_NAME.fullmatch(name) and len(name) <= _LONGEST_NAME:
        return name
    return ascii(name[:_LONGEST_NAME])


# --- deleting and moving


def delete(path: Path) -> None:
    """Delete a folder and all that is in it. A link is deleted itself; what it points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill midway leaves no half of it under its name."""
    if os.path.lexists(folder):
        doomed = folder.with_name(f".{folder.name}.old.tmp")
        delete(doomed)
        folder.rename(doomed)
        delete(doomed)


def set_aside_newer(run_dir: Path, step: int, say: Callable[[str], None]) -> None:
    """Rename the steps after `step`.

    Going back to it starts another trajectory, which must not resume the old one.
    """
    for folder in step_folders(run_dir):
        if step_of(folder) > step:
            aside = _free_name(run_dir, folder.name)
            folder.rename(aside)
            say(f"{folder.name} is of another trajectory now and was renamed to {aside.name}")


def _free_name(run_dir: Path, name: str) -> Path:
    """The first of replaced-0-NAME, replaced-1-NAME and so on that does not exist."""
    number = 0
    while os.path.lexists(run_dir / f"replaced-{number}-{name}"):
        number += 1
    return run_dir / f"replaced-{number}-{name}"
