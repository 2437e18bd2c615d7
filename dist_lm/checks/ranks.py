"""All ranks, asked in bounded time: one that fails or hangs is named, and all others know of it.

Each rank finds out its own facts, all get all of them, and each judges them in the same way.
"""

import contextlib
import shutil
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_lm.config import Config
from dist_lm.errors import UserError, in_a_line
from dist_lm.runtime.world import Runtime

# What a check finds: a text, and whether that is a warning. It raises UserError, on all ranks
# alike, if it fails.
Found = tuple[str, bool]


class Ranks:
    """The ranks of a run, and what is known of them so far."""

    def __init__(self, runtime: Runtime, config: Config, seconds: float):
        self.runtime = runtime
        self.config = config
        self.seconds = seconds  # after which a rank counts as silent
        self.world = runtime.world_size
        self.is_main = runtime.is_main
        self.device = runtime.device
        self.gather = runtime.channel.gather
        hosts = self.gather(socket.gethostname())
        self.names = [f"rank {rank} ({host})" for rank, host in enumerate(hosts)]
        self.facts: list[dict[str, Any]] = []  # of each rank's machine, see machines.py
        self.checkpoint_bytes = 0  # not known yet
        self.folder = Path(config.run.dir).absolute()
        self.probe: Path  # a folder in it, for all that is written; see folders.py
        self.made: list[Path] = []  # folders on the way there, which rank 0 takes away again

    def ask(self, work: Callable[[], Any], is_asked: bool = True) -> list[Any]:
        """Returns what `work` finds on each rank that is asked. If it fails on one, all raise."""
        answer: dict[str, Any] = {"found": None}
        if is_asked:
            # Half of the time, so that the others do not give up a slow rank first.
            answer = run_within(self.seconds / 2, work)
        answers = self.gather(answer)
        failed = []
        for name, answer in zip(self.names, answers, strict=True):
            if "error" in answer:
                failed.append(f"{name}: {answer['error']}")
        if failed:
            raise UserError(few(failed, "; "))
        return [answer["found"] for answer in answers]

    def clean(self) -> None:
        """Leave nothing in the run folder, nor what a killed doctor left."""
        for path in self.folder.glob(".doctor-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.made:
            with contextlib.suppress(OSError):
                path.rmdir()


def run_within(seconds: float, work: Callable[[], Any]) -> dict[str, Any]:
    """{"found": what `work` gives}, or {"error": why} if it fails or does not end in time.

    A mount that hangs would hold up a rank forever.
    """
    answers: list[dict[str, Any]] = []

    def run() -> None:
        try:
            answers.append({"found": work()})
        except UserError as error:
            answers.append({"error": str(error)})
        except Exception as error:
            answers.append({"error": in_a_line(error)})

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else {"error": f"no answer within {seconds:g} s"}


def few(texts: Sequence[str], separator: str) -> str:
    """The first four of them: a line of the page must stay a line on 1,000 ranks."""
    return separator.join(texts[:4]) + (" ..." if len(texts) > 4 else "")
