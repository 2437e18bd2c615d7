"""What a section is given: the device, its sizes, a folder, and a place for its figures.

A section is a function of a Context. It calls `check` for what must hold, and `measure` for
figures. Each figure is written to the section's file at once, so that a section that is killed
leaves what it had found.
"""

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.resultfile import append

MEASURED_ROUNDS = 4  # turns of each variant that is timed
DRY_ROUNDS = 2


class Skip(Exception):
    """A section cannot run here, for the reason given."""


class Context:
    """One section's view of the machine and of the run."""

    def __init__(self, folder: Path, file: Path, *, is_dry: bool, is_warming: bool, end: float):
        self.folder = folder  # of this section alone
        self.file = file
        self.is_dry = is_dry
        self.is_warming = is_warming  # only fill the compile cache
        self.end = end  # by time.time(): when the section is killed
        self.device = torch.device("cpu" if is_dry else "cuda")
        self.rounds = DRY_ROUNDS if is_dry else MEASURED_ROUNDS
        self.has_failed = False
        # Autocast and inductor as a run has them. On a CPU only the tracing of compile is tried.
        self.compile_backend = "eager" if is_dry else "inductor"

    # --- the data that was made before the sections

    @property
    def text(self) -> Path:
        """A prepared text, for the checks."""
        return self.folder.parent / "text"

    @property
    def random_tokens(self) -> Path:
        """Prepared random tokens with GPT-2's vocabulary, for the timings."""
        return self.folder.parent / "random"

    # --- the card

    @property
    def card(self) -> str:
        return "cpu" if self.is_dry else torch.cuda.get_device_name()

    @property
    def card_bytes(self) -> int:
        """The memory of the card; of a CPU a small number, which makes sizes small."""
        if self.is_dry:
            return 2**30
        return torch.cuda.get_device_properties(0).total_memory

    @property
    def cards(self) -> int:
        return 0 if self.is_dry else torch.cuda.device_count()

    def sync(self) -> None:
        """Wait until the card has done all its work."""
        if not self.is_dry:
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """Most memory that was allocated since reset_peak()."""
        return 0 if self.is_dry else torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        if not self.is_dry:
            torch.cuda.reset_peak_memory_stats()

    def free(self) -> None:
        """Give cached memory back to the card, for what comes next."""
        if not self.is_dry:
            torch.cuda.empty_cache()

    @property
    def seconds_left(self) -> float:
        return self.end - time.time()

    # --- figures

    def check(self, what: str, value: float, at_most: float, unit: str = "") -> None:
        """What must hold: the value is finite and no larger."""
        is_ok = bool(value <= at_most)  # False for NaN
        self.has_failed |= not is_ok
        self._write({"what": what, "value": value, "unit": unit, "limit": at_most, "ok": is_ok})

    def require(self, what: str, is_ok: bool, details: str = "") -> None:
        """What must hold and has no size."""
        self.has_failed |= not is_ok
        self._write({"what": what, "value": details or is_ok, "ok": bool(is_ok)})

    def measure(
        self,
        what: str,
        value: float | str,
        unit: str = "",
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """A figure, and whether it meets its target. A missed target fails nothing."""
        row: dict[str, Any] = {"what": what, "value": value, "unit": unit}
        if at_least is not None:
            row["target"] = f">= {at_least:g}"
        if at_most is not None:
            row["target"] = f"<= {at_most:g}"
        if "target" in row and not self.is_dry:
            low = float("-inf") if at_least is None else at_least
            high = float("inf") if at_most is None else at_most
            row["met"] = low <= float(value) <= high
        self._write(row)

    def _write(self, row: dict[str, Any]) -> None:
        if isinstance(row["value"], float):
            row["value"] = float(f"{row['value']:.5g}")
        append(self.file, {"row": row})
