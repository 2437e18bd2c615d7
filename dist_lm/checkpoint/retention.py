"""checkpoint.retention."""

import itertools
import math
from pathlib import Path

from dist_lm.checkpoint.folder import _warn, remove, step_folders, step_of, verify
from dist_lm.checkpoint.state import read_state
from dist_lm.errors import UserError


class Retention:
    """Decides which steps of a run stay, and deletes the others. Rank 0 uses it, in the saver's thread.

    The newest `keep_last` stay, the best by validation loss, every multiple of `keep_every`, and always the step that
    was just saved. Only valid steps count: those that this process saved or verified. A step of an earlier start is
    verified when its turn comes, once. A damaged step may be readable later and a link may lead anywhere, so neither
    counts, is deleted or is renamed.
    """

    def __init__(self, run_dir: Path, keep_last: int, keep_every: int):
        self.run_dir, self.keep_last, self.keep_every = run_dir, keep_last, keep_every
        self._valid: dict[Path, bool] = {}  # what is known of each step folder

    def trust(self, folder: Path) -> None:
        """This process saved or verified the folder."""
        self._valid[folder] = True

    def prune(self, saved: Path) -> None:
        """Delete what need not stay, now that `saved` is written. What cannot be deleted is only worth a warning."""
        self.trust(saved)
        try:
            superseded = self._superseded(saved)
        except OSError as error:
            _warn(f"older checkpoints stay: {error}")
            return
        for folder in superseded:
            try:
                remove(folder)
            except OSError as error:
                _warn(f"{folder.name} stays: {error}")

    def _superseded(self, saved: Path) -> list[Path]:
        """The valid steps that need not stay."""
        losses = self._losses()
        if len(losses) <= self.keep_last:
            return []  # and nothing need be verified
        newest = self._first_valid(sorted(losses, key=step_of, reverse=True), self.keep_last)
        evaluated = [
            folder for folder in losses if losses[folder] < math.inf
        ]  # this leaves out NaN too
        best = self._first_valid(sorted(evaluated, key=losses.__getitem__), 1)
        staying = {saved, *newest, *best}
        if self.keep_every:
            staying.update(folder for folder in losses if step_of(folder) % self.keep_every == 0)
        return [folder for folder in losses if folder not in staying and self._is_valid(folder)]

    def _losses(self) -> dict[Path, float]:
        """The validation loss of each step folder whose state can be read, infinite where there was no evaluation."""
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

    def _first_valid(self, folders: list[Path], count: int) -> list[Path]:
        """The first valid ones. It looks at no more folders than it must, because a look may read all of a folder."""
        return list(itertools.islice(filter(self._is_valid, folders), count))

    def _is_valid(self, folder: Path) -> bool:
        """Whether this process saved or verified the folder. The first look at an older one reads all of it."""
        if folder not in self._valid:
            try:
                verify(folder)
                self._valid[folder] = True
            except UserError as error:
                _warn(f"a damaged checkpoint is left alone: {error}")
                self._valid[folder] = False
        return self._valid[folder]
