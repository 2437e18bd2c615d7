"""Reading what a device has computed without making it wait.

A GPU works through a queue that the host fills. Reading a result at once makes the host wait until
the queue is empty, and then the GPU waits for the host. So a result is copied to host memory as a
part of the queue, and read a step later, when the GPU has passed that place long ago.
"""

import time
from typing import Any

import torch
from torch import Tensor


class Moment:
    """A place in the queue of a device, and the time at which the device passes it.

    A CPU has no queue, so it is there already.
    """

    def __init__(self, device: torch.device):
        self._event: torch.cuda.Event | None = None
        self._host_seconds = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host_seconds = time.monotonic()

    def wait(self) -> None:
        """Until the device has passed it: a host sync, unless that was long ago."""
        if self._event:
            self._event.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """By the device's own clock. Both moments must have passed."""
        if self._event and earlier._event:
            milliseconds: float = earlier._event.elapsed_time(self._event)
            return milliseconds / 1000
        return self._host_seconds - earlier._host_seconds


class LateFigures:
    """A few numbers on their way from a device to the host."""

    def __init__(self, figures: Tensor):
        self._host = figures
        if figures.device.type == "cuda":
            # Only pinned memory is filled without a host sync. torch keeps it for the next step.
            self._host = torch.empty_like(figures, device="cpu", pin_memory=True)
            self._host.copy_(figures, non_blocking=True)
        self.moment = Moment(figures.device)

    def read(self) -> list[Any]:
        """The numbers, after waiting until they have arrived."""
        self.moment.wait()
        return self._host.tolist()


def late_figures_of(figures: Tensor | None) -> LateFigures | None:
    """The same for figures that there may be none of."""
    return None if figures is None else LateFigures(figures)
