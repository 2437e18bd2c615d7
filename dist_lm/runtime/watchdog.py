"""Who is still there: each rank tells rank 0's store once a beat that it lives and how far it is.

gloo notices a stopped process or a cut link only at its timeout, NCCL aborts without a word of who was missing. Rank 0
listens to all ranks and they to it, so a beat costs the store one message a rank. Two threads, because the one that
talks to the store hangs as long as the network does, and the one that judges must not. torch.distributed is used for
its TCPStore alone; nothing here is a collective.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dist_lm.errors import in_a_line

_OF_PEERS = (
    "gloo",
    "NCCL",
    "onnection",
    "ocket",
    "imed out",
    "TCPStore",
)  # errors that say: somebody else ended


class Watchdog:
    """`lost(report)` is called, from a thread, when a rank was not heard of for `timeout`; it must end the process."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        name: str,
        timeout: float,
        progress: Callable[[], int],
        lost: Callable[[str], None],
    ):
        """`name` is one that no other start on the same store has."""
        self.rank, self.world_size, self.name, self.timeout = rank, world_size, name, timeout
        self.beat = min(2.0, timeout / 10)
        self._progress, self._lost = progress, lost
        self._store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
        )
        self._own_error = ""
        self._heard_at: dict[int, float] = {}
        self._said: dict[int, dict[str, Any]] = {}
        self._listening_to = range(world_size) if rank == 0 else range(1)
        self._closed = threading.Event()
        self._tell()

    def start(self) -> None:
        """After every rank has told something once."""
        self._listen(range(self.world_size))  # whom we may have to name later
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """A thread that is inside the store, or frees tensors, while Python shuts down would abort the process."""
        self._closed.set()
        for thread in self._threads:
            thread.join(5)

    def _tell(self) -> None:
        said = {
            "at": time.time(),
            "host": socket.gethostname(),
            "progress": self._progress(),
            "error": self._own_error,
        }
        self._store.set(f"{self.name}/{self.rank}", json.dumps(said))

    def _listen(self, ranks: range) -> None:
        for rank, message in zip(
            ranks, self._store.multi_get([f"{self.name}/{r}" for r in ranks]), strict=True
        ):
            said = json.loads(message)
            if said != self._said.get(rank):
                self._said[rank], self._heard_at[rank] = said, time.monotonic()

    def _talk(self) -> None:
        while not self._closed.wait(self.beat):
            try:
                self._tell()
                self._listen(self._listening_to)
            except (
                Exception
            ):  # the store is gone, and so is rank 0's host or process: the judge will see it
                continue

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [
            r
            for r in self._listening_to
            if r != self.rank and now - self._heard_at.get(r, now) > seconds
        ]

    def _judge(self) -> None:
        """Before the collectives' own timeout, which under NCCL ends the process without a report."""
        looked_at = time.monotonic()
        while not self._closed.wait(self.beat):
            now = time.monotonic()
            if now - looked_at > 3 * self.beat:  # it was we who were stopped
                self._heard_at = dict.fromkeys(self._heard_at, now)
            looked_at = now
            silent = self._silent(0.8 * self.timeout)
            if silent and not self._closed.is_set():
                self._lost(f"nothing heard for {0.8 * self.timeout:.0f} s of {self._names(silent)}")

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(
            f"rank {rank} on {self._said.get(rank, {}).get('host', 'an unknown host')}"
            for rank in ranks
        )

    def explain(self, error: Exception) -> str:
        """Who is to blame for an error of this rank."""
        self._own_error = in_a_line(error)
        if not _is_of_peers(str(error)):
            time.sleep(2 * self.beat)  # the others shall hear of it
            return f"rank {self.rank} on {socket.gethostname()}: {self._own_error}"
        self._listening_to = range(self.world_size)
        self._heard_at = dict.fromkeys(self._listening_to, time.monotonic())
        time.sleep(4 * self.beat)
        silent = self._silent(2.5 * self.beat)
        others = {r: said for r, said in self._said.items() if r != self.rank}
        ours = [
            r for r, said in others.items() if said["error"] and not _is_of_peers(said["error"])
        ]
        behind = [
            r
            for r, said in others.items()
            if said["progress"] < self._progress() and not said["error"]
        ]
        if ours:
            text = ", ".join(f"{self._names([r])} ended: {others[r]['error']}" for r in ours)
        elif silent:
            text = f"{self._names(silent)} is missing"
        elif behind:
            text = f"{self._names(behind)} lives but hangs where others went on"
        else:
            text = "all ranks were heard of"
        return f"{text}; {self._own_error}"


def _is_of_peers(error: str) -> bool:
    return any(word in error for word in _OF_PEERS)
