"""Decides which steps of a run stay on disk."""

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

from dist_lm.checkpoint.folder import remove, step_folders, step_of
from dist_lm.checkpoint.state import read_state, verify_state
from dist_lm.console import gigabytes, warn
from dist_lm.errors import UserError


def _free(folder: Path) -> int:
    """The bytes that we may still write there."""
    return shutil.disk_usage(folder).free


class Retention:
    """Decides which steps of a run stay, and deletes the others.

    Rank 0 uses it, in the saver's thread. The newest `keep_last` stay, the best by validation loss,
    every multiple of `keep_every`, and always the step that was just saved. A run that may have to
    go back `reach` steps keeps all that it could then go back to. Only valid steps count:
    those that this process saved or verified. A step of an earlier start is verified when its turn
    comes, once. A damaged step may be readable later and a link may lead anywhere, so neither
    counts, is deleted or is renamed.
    """

    def __init__(self, run_dir: Path, keep_last: int, keep_every: int, reach: int = 0):
        self.run_dir = run_dir
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.reach = reach
        self._valid: dict[Path, bool] = {}  # step folders that were looked at

    def trust(self, folder: Path) -> None:
        """This process saved or verified the folder."""
        self._valid[folder] = True

    def warn_if_short(self, size: int) -> None:
        """Warn before the first save if fewer checkpoints fit than are to stay.

        The next one is written before an old one is deleted. `size` is that of one, in bytes.
        """
        room = _free(self.run_dir)
        for folder in step_folders(self.run_dir):
            room += sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        fitting = room // size
        if fitting > self.keep_last:
            return
        warn(
            f"run.dir={self.run_dir} has room for {fitting} checkpoints of {gigabytes(size)} GB,"
            f" and run.keep_last={self.keep_last} needs {self.keep_last + 1}, the next one"
            f" included; fewer old ones will stay; nearest: {max(fitting - 1, 1)}"
        )

    def make_room(self, size: int) -> None:
        """Delete old steps before a save, until its bytes fit beside the others.

        The newest valid one always stays. What cannot be deleted is only worth a warning.
        """
        if _free(self.run_dir) >= size:
            return
        for folder in self._given_up():
            warn(f"{folder.name} is deleted: the next checkpoint does not fit beside it")
            try:
                remove(folder)
            except OSError as error:
                warn(f"{folder.name} stays: {error}")
            if _free(self.run_dir) >= size:
                return

    def _given_up(self) -> list[Path]:
        """The valid steps that may go for a newer one: the oldest first, the best last."""
        losses = self._losses()
        newest = self._first_valid(sorted(losses, key=step_of, reverse=True), 1)
        going = []
        for folder in sorted(losses, key=step_of):
            is_kept = bool(self.keep_every) and step_of(folder) % self.keep_every == 0
            if folder not in newest and not is_kept and self._is_valid(folder):
                going.append(folder)
        return sorted(going, key=lambda folder: losses[folder] == min(losses.values()) < math.inf)

    def prune(self, saved: Path) -> None:
        """Delete what need not stay, now that `saved` is written.

        What cannot be deleted is only worth a warning.
        """
        self.trust(saved)
        try:
            superseded = self._superseded(saved)
        except OSError as error:
            warn(f"older checkpoints stay: {error}")
            return
        for folder in superseded:
            try:
                remove(folder)
            except OSError as error:
                warn(f"{folder.name} stays: {error}")

    def _superseded(self, saved: Path) -> list[Path]:
        """The valid steps that need not stay."""
        losses = self._losses()
        if len(losses) <= self.keep_last:
            return []  # and nothing need be verified
        newest_first = sorted(losses, key=step_of, reverse=True)
        # This leaves out infinity and NaN.
        evaluated = [folder for folder in losses if losses[folder] < math.inf]
        best_first = sorted(evaluated, key=losses.__getitem__)

        staying = {saved}
        staying.update(self._first_valid(newest_first, self.keep_last))
        staying.update(self._first_valid(best_first, 1))
        if self.reach:
            latest = step_of(saved) + 1 - self.reach  # where the next step would go back to
            old_enough = [folder for folder in newest_first if step_of(folder) <= latest]
            staying.update(self._first_valid(old_enough, 1))
            staying.update(folder for folder in losses if step_of(folder) > latest)
        if self.keep_every:
            staying.update(folder for folder in losses if step_of(folder) % self.keep_every == 0)
        return [folder for folder in losses if folder not in staying and self._is_valid(folder)]

    def _losses(self) -> dict[Path, float]:
        """The validation loss of each step folder whose state can be read.

        It is infinite where there was no evaluation.
        """
        losses = {}
        for folder in step_folders(self.run_dir):
            if folder.is_symlink():
                continue
            try:
                loss = read_state(folder).get("val_loss")
            except UserError:  # damaged
                continue
            losses[folder] = loss if isinstance(loss, float) else math.inf
        return losses

    def _first_valid(self, folders: Iterable[Path], count: int) -> list[Path]:
        """The first valid ones.

        It looks at no more folders than it must, because a look may read all of a folder.
        """
        found: list[Path] = []
        for folder in folders:
            if len(found) == count:
                break
            if self._is_valid(folder):
                found.append(folder)
        return found

    def _is_valid(self, folder: Path) -> bool:
        """Whether this process saved or verified the folder.

        The first look at an older one reads all of it.
        """
        if folder not in self._valid:
            try:
                verify_state(folder)
                self._valid[folder] = True
            except UserError as error:
                warn(f"a damaged checkpoint is left alone: {error}")
                self._valid[folder] = False
        return self._valid[folder]
