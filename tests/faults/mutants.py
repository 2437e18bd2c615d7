"""Faults of our own code that the harness must catch: each undoes one precaution.

A name here is an argument of the commands of operations.py and fuzz.py. The function changes the
program in that process.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_lm import outcome
from dist_lm.checkpoint import folder, retention, state, writing
from dist_lm.data.prepared import cache, preparing


def delete_in_place() -> None:
    """An old checkpoint is deleted under its name, so a kill leaves half of it there."""
    retention.remove = shutil.rmtree  # type: ignore[assignment]


def renamed_before_its_manifest() -> None:
    """A checkpoint gets its name before its manifest is written."""
    really_write = writing._write
    really_sync = writing.sync_folder
    manifests: list[list[Any]] = []

    def write(path: Path, parts: Any) -> dict[str, Any]:
        if path.name == "manifest.json":
            manifests.append(list(parts))
            return {}
        return really_write(path, parts)

    def sync(path: Path) -> None:
        if not path.name.endswith(".tmp"):
            really_write(folder.step_folders(path)[-1] / "manifest.json", manifests.pop())
        really_sync(path)

    writing._write = write
    writing.sync_folder = sync  # type: ignore[attr-defined]


def no_fsync() -> None:
    """Nothing is synced before a checkpoint gets its name."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]


def left_overs_stay() -> None:
    """What a killed save left is not deleted by the next one."""

    def prepare(writer: writing.CheckpointWriter) -> writing.Written:
        name = writer.aside.name
        if writer.aside.exists():
            writer.aside.rename(writer.aside.with_name(f"{name}.old"))
        writer.aside.mkdir(parents=True)
        return {}

    writing.CheckpointWriter._prepare_folder = prepare  # type: ignore[method-assign]


def outcome_in_place() -> None:
    """outcome.json is written under its name, so a kill leaves half of it."""

    def write(attempt: outcome.Attempt, name: str, text: str) -> None:
        (attempt.folder / name).write_text(text, encoding="utf-8")

    outcome.Attempt._write = write  # type: ignore[method-assign]


def part_of_a_write() -> None:
    """A copy in the cache takes a short write for a whole one."""
    cache._write_at = os.pwrite  # type: ignore[assignment]


def prepare_starts_in_the_middle() -> None:
    """A preparation that goes on forgets where its first split stood."""
    really = preparing.Preparation.read_state

    def read(work: preparing.Preparation) -> Any:
        found: Any = really(work)
        if found:
            for split in found["splits"].values():
                split["skip"] = 0
        return found

    preparing.Preparation.read_state = read  # type: ignore[method-assign]


def a_step_is_left_out() -> None:
    """A resumed run begins one step late."""
    really = state.TrainState.restored.__func__  # type: ignore[attr-defined]

    def restored(cls: Any, facts: Any) -> Any:
        made = really(cls, facts)
        made.step += 1
        return made

    state.TrainState.restored = classmethod(restored)  # type: ignore[assignment, method-assign]


def names_lead_anywhere() -> None:
    """A manifest is believed as it is."""

    def read(step: Path) -> Any:
        return folder.read_json(step / "manifest.json")

    folder._read_manifest = read


MUTANTS: dict[str, Callable[[], None]] = {
    mutant.__name__: mutant
    for mutant in (
        delete_in_place,
        renamed_before_its_manifest,
        no_fsync,
        left_overs_stay,
        outcome_in_place,
        part_of_a_write,
        prepare_starts_in_the_middle,
        a_step_is_left_out,
        names_lead_anywhere,
    )
}
