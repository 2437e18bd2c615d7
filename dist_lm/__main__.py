"""The command `dist-lm`: one name for all commands, e.g. `dist-lm train --config gpt2-124m`.

`dist-lm NAME ...` does the same as `python -m dist_lm.NAME ...`. The few commands that have no
module of their own stand here.
"""

import importlib.metadata
import os
import platform
import runpy
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from dist_lm import __version__
from dist_lm.console import count
from dist_lm.errors import UserError, run_entry
from dist_lm.nearest import did_you_mean
from dist_lm.shipped import FOLDERS, files_of, recipes, shipped

COMMANDS = {
    "train": "train a model in one process, or as torchrun and accelerate launch start it",
    "prepare": "turn text into token shards",
    "generate": "generate text from a checkpoint",
    "score": "measure a checkpoint on any text",
    "show": "show what a step trained on, and whether a run has seen a text",
    "verify": "replay steps of a run with run.exact and compare their bits",
    "report": "draw the curves of runs, or make a page of all that they tell",
    "harness": "measure checkpoints with lm-eval, also beside the training that goes on",
    "publish": "upload a run's checkpoints to the hub",
    "plan": "say whether a run fits, how long it takes and what it costs",
    "doctor": "check that these machines are fit for a run",
}
OWN_COMMANDS = {
    "launch": "train on several processes of this machine, or of several: launch/torchrun.sh",
    "recipes": "list the recipes that --config takes by name",
    "init": "copy recipes, launch files and Slurm scripts to a folder, to edit them",
    "--version": "print the versions of what matters for a run",
}
# Which version of these runs decides how a run behaves.
PACKAGES = ("torch", "accelerate", "deepspeed", "datasets", "tokenizers", "safetensors", "numpy")


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(help_page(), end="")
        return
    name, *rest = argv
    if name in COMMANDS:
        run_command(name, rest)
    elif name == "launch":
        launch(rest)
    elif name in ("--version", "-V"):
        print_versions()
    elif name == "recipes":
        print_recipes()
    elif name == "init":
        copy_files(rest)
    else:
        names = [*COMMANDS, *OWN_COMMANDS]
        hint = did_you_mean(name, names) or f"; rule: one of {', '.join(names)}"
        raise UserError(f"dist-lm {name}: no such command{hint}")


def help_page() -> str:
    lines = ["usage: dist-lm COMMAND [--help] ...", ""]
    for name, purpose in (COMMANDS | OWN_COMMANDS).items():
        lines.append(f"  {name:<10} {purpose}")
    lines += ["", "dist-lm COMMAND --help lists the flags and settings of a command."]
    return "\n".join(lines) + "\n"


def run_command(name: str, argv: list[str]) -> None:
    """Do what `python -m dist_lm.NAME` does."""
    sys.argv = [f"dist-lm {name}", *argv]
    runpy.run_module(f"dist_lm.{name}", run_name="__main__", alter_sys=True)


def launch(argv: list[str]) -> NoReturn:
    """Become launch/torchrun.sh, with this interpreter."""
    script = str(shipped("launch") / "torchrun.sh")
    os.environ.setdefault("PYTHON", sys.executable)
    sys.stdout.flush()
    os.execvp("bash", ["bash", script, *argv])


def print_versions() -> None:
    print(f"dist_lm {__version__}")
    print(f"python {platform.python_version()}")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"{package} {version}")


def print_recipes() -> None:
    for name, file in recipes().items():
        print(f"{name:<12} {description(file)}")


def description(recipe: Path) -> str:
    """The sentences at the head of a recipe, up to its first command."""
    head = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        is_command = line.startswith("#   ")
        if is_command or not line.startswith("# "):
            break
        head.append(line.removeprefix("# ").strip())
    sentences, _, _ = " ".join(head).rpartition(". ")
    return sentences + "."


def copy_files(argv: list[str]) -> None:
    """`dist-lm init DIR`: copy the shipped folders; files that exist already stay as they are."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("dist-lm init takes one value: rule: dist-lm init DIR")
    target = Path(argv[0])
    copied = 0
    kept = 0
    try:
        for folder in FOLDERS:
            for source in files_of(folder):
                copy = target / folder / source.relative_to(shipped(folder))
                if os.path.lexists(copy):
                    kept += 1
                    continue
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, copy)
                copied += 1
    except OSError as error:
        raise UserError(
            f"dist-lm init {target}: {error.strerror}; rule: a folder that can be written"
        ) from error
    print(f"{target}: {count(copied, 'file')} copied; there already, and left as they are: {kept}")


def start() -> None:
    """The console script."""
    run_entry(main)


if __name__ == "__main__":
    start()
