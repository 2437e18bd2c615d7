"""The console of a run: a line that says how far it is, and at the end where its time went."""

import math
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

from dist_lm.console import count, duration, say, shorten

PLAIN_SECONDS = 10.0  # between lines of progress
TERMINAL_SECONDS = 0.1  # between changes of a terminal's line
MEAN_STEPS = 20  # steps that the rates are averaged over


class RunClock:
    """Counts where the time of this process goes, and what it has taken and will take."""

    def __init__(self, steps_of_run: int | None, world_size: int) -> None:
        self._steps_of_run = steps_of_run
        self._world_size = world_size
        self.started_at = time.monotonic()
        self.steps = 0  # made in this process
        self.step = 0  # the last one, of the run
        self.tokens = 0  # of the run, after it
        self.first_step_at = 0.0  # when it had been made
        self.paused_seconds = 0.0

    def count_step(self, now: float, step: int, tokens: int) -> None:
        self.step = step
        self.tokens = tokens
        self.steps += 1
        if self.steps == 1:
            self.first_step_at = now

    def seconds_a_step(self, now: float) -> float | None:
        """Evaluations and saves included; the first step's time says little about the others."""
        if self.steps < 2:
            return None
        return (now - self.first_step_at) / (self.steps - 1)

    def taken(self, now: float) -> dict[str, float]:
        """The tokens of the run so far, and the time and device hours of this start.

        "expected" is what they are at the end of the run, if it goes on as it did. It is left out
        where the end is not known, or where no pace is known yet. A process is one device.
        """
        elapsed = now - self.started_at
        hours_a_second = self._world_size / 3600
        taken: dict[str, float] = {
            "tokens": self.tokens,
            "elapsed_seconds": elapsed,
            "device_hours": elapsed * hours_a_second,
        }
        pace = self.seconds_a_step(now)
        if self._steps_of_run and pace is not None:
            whole = elapsed + pace * max(0, self._steps_of_run - self.step)
            taken["tokens_expected"] = round(self.tokens * self._steps_of_run / self.step)
            taken["elapsed_seconds_expected"] = whole
            taken["device_hours_expected"] = whole * hours_a_second
        return taken

    def spell_taken(self, now: float) -> str:
        """What this start has taken, and what is expected where the run is not at its end."""
        taken = self.taken(now)
        text = (
            f"{shorten(taken['tokens'])} tokens so far,"
            f" {taken['device_hours']:,.2f} device hours in this start"
        )
        if self.step == self._steps_of_run or "tokens_expected" not in taken:
            return text
        return (
            f"{text}; by the end {shorten(taken['tokens_expected'])} tokens,"
            f" {taken['device_hours_expected']:,.2f} device hours,"
            f" {_spell_days(taken['elapsed_seconds_expected'])}"
        )

    def summary(self, now: float) -> str:
        """Goodput is the share of the time that went into steps."""
        total = now - self.started_at
        starting = (self.first_step_at - self.started_at) / total
        paused = self.paused_seconds / total
        return (
            f"{count(self.steps, 'step')} in {duration(total)}:"
            f" goodput {1 - (starting + paused):.0%},"
            f" up to the first step {starting:.0%}, evaluating and saving {paused:.0%}"
        )


def _spell_days(seconds: float) -> str:
    if seconds < 86400:
        return duration(seconds)
    return f"{seconds / 86400:,.1f} days"


class ProgressLine:
    """The line of progress. On a terminal it changes; elsewhere a new line comes now and then."""

    def __init__(self, steps: int | None, mfu_per_rate: float):
        self._steps = steps
        self._mfu_per_rate = mfu_per_rate
        self._is_terminal = sys.stdout.isatty()
        # What makes a terminal's line give way to other text.
        self._clear = "\r\x1b[K" if self._is_terminal else ""
        self._seconds_between = TERMINAL_SECONDS if self._is_terminal else PLAIN_SECONDS
        self._shown_at = -math.inf
        self._shown_step = 0
        self._taken = 0  # steps taken in
        self._seconds_per_token = 0.0  # mean over the last steps
        self._data_wait = 0.0  # mean over the last steps
        self._last: Mapping[str, Any] = {}  # figures of the last step

    def take(self, figures: Mapping[str, Any]) -> None:
        """Take in a step's figures, and move on the means."""
        self._last = figures
        self._taken += 1
        weight = 1 / min(self._taken, MEAN_STEPS)
        seconds_per_token = 1 / max(figures["tokens_per_second"], 1e-9)
        self._seconds_per_token += weight * (seconds_per_token - self._seconds_per_token)
        self._data_wait += weight * (figures["data_wait"] - self._data_wait)

    def is_due(self, now: float) -> bool:
        return now - self._shown_at >= self._seconds_between

    def show(self, now: float, clock: RunClock, end: str | None = None) -> None:
        """Print the last step taken in."""
        self._shown_at = now
        self._shown_step = self._last["step"]
        parts = self._parts(clock.seconds_a_step(now))
        text = "  ".join(parts)
        if self._is_terminal:
            columns = shutil.get_terminal_size().columns
            if len(text) >= columns:
                text = " ".join(parts)[: columns - 1]
        if end is None:
            end = "" if self._is_terminal else "\n"
        say(self._clear + text, end)

    def say_between(self, text: str) -> None:
        """Print a line that stays."""
        say(self._clear + text)

    def end(self, now: float, clock: RunClock) -> None:
        """Print the last step so that it stays, unless it stands there already."""
        if self._is_terminal or self._shown_step != self._last["step"]:
            self.show(now, clock, end="\n")

    def _parts(self, seconds_a_step: float | None) -> list[str]:
        last = self._last
        rate = 1 / self._seconds_per_token
        parts = [f"step {last['step']}"]
        if self._steps:
            parts = [f"step {last['step']}/{self._steps}"]
            if seconds_a_step is not None:
                parts.append(f"eta {duration((self._steps - last['step']) * seconds_a_step)}")
        parts.append(f"loss {last['loss']:.4f}")
        parts.append(f"lr {last['lr']:.1e}")
        parts.append(f"norm {last['grad_norm']:.3g}")
        parts.append(f"{shorten(rate)} tok/s")
        if self._mfu_per_rate:
            parts.append(f"mfu {rate * self._mfu_per_rate:.1%}")
        parts.append(f"wait {self._data_wait:.0%}")
        for key in last:
            if key.startswith("share_"):
                parts.append(self._part_of_mixture(key.removeprefix("share_")))
        return parts

    def _part_of_mixture(self, source: str) -> str:
        share = self._last[f"share_{source}"]
        asked = self._last[f"asked_{source}"]
        number_of_pass = int(self._last[f"passes_{source}"]) + 1
        return f"{source} {share:.1%} of {asked:.1%}, pass {number_of_pass}"
