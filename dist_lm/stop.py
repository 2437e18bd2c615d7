"""Whether this process was told to stop."""

import contextlib
import os
import signal
import time

from dist_lm.environment import end_of_job, own_rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """Whether this process was told to stop: by a signal, or by the clock (DIST_LM_STOP_AT).

    SIGTERM, SIGUSR1 and the first Ctrl-C ask for a stop at the next agreed step; a second Ctrl-C
    stops at once.
    """

    def __init__(self) -> None:
        self.reason = ""
        # The variable has seconds since 1970, by the scheduler's clock. Later changes of our clock
        # do not matter.
        stop_at = end_of_job()
        self._deadline = time.monotonic() + stop_at - time.time()

    def listen(self) -> None:
        self._arrived, writing = os.pipe()
        os.set_blocking(writing, False)
        # The number of a signal is written there at once. self._ask() has to wait until the main
        # thread returns from C code, which it may not do as long as a rank is missing.
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    def wait_for_signal(self) -> str:
        """Wait until a signal asks for a stop, and return its name. For a thread of its own."""
        while True:
            for number in os.read(self._arrived, 64):
                if number in STOP_SIGNALS:
                    return signal.Signals(number).name

    @staticmethod
    def ignore() -> None:
        """From here on signals change nothing. Python would reset them to deadly at its exit."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _ask(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        if own_rank() == 0:  # not print(): a handler may interrupt a print
            text = f"{self.reason}: stopping at the next step, with a checkpoint\n"
            with contextlib.suppress(OSError):  # standard error may be gone
                os.write(2, text.encode())

    @property
    def requested(self) -> bool:
        if not self.reason and time.monotonic() > self._deadline:
            self.reason = "the time of the job ends"
        return bool(self.reason)
