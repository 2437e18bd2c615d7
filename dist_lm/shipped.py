"""The folders that come with the code: recipes, launch files and Slurm scripts.

In a checkout they lie beside `dist_lm/`, where a reader looks for them. A wheel carries them inside
the package, because pip installs nothing beside it; pyproject.toml says where.
"""

from pathlib import Path

_CODE = Path(__file__).parent
_CHECKOUT = _CODE.parent

FOLDERS = ("configs", "launch", "slurm")


def shipped(folder: str) -> Path:
    """The path of one of FOLDERS."""
    assert folder in FOLDERS, folder
    installed = _CODE / "_shipped" / folder
    if installed.is_dir():
        return installed
    return _CHECKOUT / folder


def files_of(folder: str) -> list[Path]:
    """The files in one of FOLDERS and below it, in alphabetical order."""
    return sorted(path for path in shipped(folder).rglob("*") if path.is_file())


def recipes() -> dict[str, Path]:
    """The recipes by name, e.g. gpt2-124m, in alphabetical order."""
    files = sorted(shipped("configs").glob("*.yaml"))
    return {file.stem: file for file in files}
