"""The watchdog names the rank that vanished.

Each rank tells rank 0's store regularly that it lives and how far it is. gloo notices a stopped
process or a cut link only at its timeout, and NCCL aborts without a word about which rank was
missing. Rank 0 listens to all ranks and they listen to it, so a beat costs the store one message a
rank. There are two threads: the one that talks to the store hangs as long as the network does, and
the one that judges must not hang. torch.distributed is used for its TCPStore alone; nothing here is
a collective.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dist_lm.errors import in_a_line

# Words in errors that mean that another rank ended, and this one only noticed it.
_WORDS_OF_PEER_ERRORS = ("gloo", "NCCL", "onnection", "ocket", "imed out", "TCPStore")
_LONGEST_BEAT = 2.0  # seconds
# Of the timeout. The collectives have the same timeout, and NCCL ends the process without a report.
_SILENT_SHARE = 0.8


@dataclass(frozen=True)
class Message:
    """What a rank tells the others with each beat."""

    at: float  # seconds since 1970, so that each message differs from the one before
    host: str
    progress: int  # how many agreements it has entered
    error: str  # in one line; empty while it has none

    @property
    def has_own_error(self) -> bool:
        """Whether the rank ended by an error that is not the echo of another rank's end."""
        return bool(self.error) and not _is_of_peers(self.error)


class Watchdog:
    """Calls `lost(report)` when a rank was not heard of for most of `timeout` seconds.

    The call comes from a thread. `lost` must end the process.
    """

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
        self.rank = rank
        self.world_size = world_size
        self.name = name
        self.timeout = timeout
        self.beat = min(_LONGEST_BEAT, timeout / 10)  # seconds between two messages
        self._progress = progress
        self._lost = lost
        self._store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
        )
        self._own_error = ""
        self._messages: dict[int, Message] = {}  # the newest of each rank
        self._heard_at: dict[int, float] = {}  # when it came, by time.monotonic()
        self._listening_to = range(world_size) if rank == 0 else range(1)
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._talk, daemon=True),
            threading.Thread(target=self._judge, daemon=True),
        ]
        self._tell()

    def start(self) -> None:
        """Begin to watch. Every rank must have been constructed before."""
        # Any rank may have to be named later, with its host.
        self._listen(range(self.world_size))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop watching.

        A thread that is inside the store, or frees tensors, while Python shuts down would abort the
        process.
        """
        self._closed.set()
        for thread in self._threads:
            thread.join(5)

    def explain(self, error: Exception) -> str:
        """Which rank is to blame for an error of this rank."""
        self._own_error = in_a_line(error)
        if not _is_of_peers(str(error)):
            time.sleep(2 * self.beat)  # so that the others hear of it
            return f"rank {self.rank} on {socket.gethostname()}: {self._own_error}"

        self._listening_to = range(self.world_size)
        self._heard_at = dict.fromkeys(self._listening_to, time.monotonic())
        time.sleep(4 * self.beat)
        silent = self._silent(2.5 * self.beat)
        failed = []
        behind = []
        for rank, message in self._messages.items():
            if rank == self.rank:
                continue
            if message.has_own_error:
                failed.append(f"{self._names([rank])} ended: {message.error}")
            if not message.error and message.progress < self._progress():
                behind.append(rank)
        if failed:
            text = ", ".join(failed)
        elif silent:
            text = f"{self._names(silent)} is missing"
        elif behind:
            text = f"{self._names(behind)} lives but hangs where others went on"
        else:
            text = "all ranks were heard of"
        return f"{text}; {self._own_error}"

    # --- the thread that talks to the store

    def _talk(self) -> None:
        while not self._closed.wait(self.beat):
            try:
                self._tell()
                self._listen(self._listening_to)
            except Exception:
                # The store is gone, and with it rank 0's host or process. The other thread will see
                # that.
                continue

    def _tell(self) -> None:
        message = Message(
            at=time.time(),
            host=socket.gethostname(),
            progress=self._progress(),
            error=self._own_error,
        )
        self._store.set(f"{self.name}/{self.rank}", json.dumps(asdict(message)))

    def _listen(self, ranks: Iterable[int]) -> None:
        ranks = list(ranks)
        texts = self._store.multi_get([f"{self.name}/{rank}" for rank in ranks])
        for rank, text in zip(ranks, texts, strict=True):
            message = Message(**json.loads(text))
            if message != self._messages.get(rank):
                self._messages[rank] = message
                self._heard_at[rank] = time.monotonic()

    # --- the thread that judges

    def _judge(self) -> None:
        looked_at = time.monotonic()
        limit = _SILENT_SHARE * self.timeout
        while not self._closed.wait(self.beat):
            now = time.monotonic()
            if now - looked_at > 3 * self.beat:
                # This process itself was stopped: the others get their time again.
                self._heard_at = dict.fromkeys(self._heard_at, now)
            looked_at = now
            silent = self._silent(limit)
            if silent and not self._closed.is_set():
                self._lost(f"nothing heard for {limit:.0f} s of {self._names(silent)}")

    def _silent(self, seconds: float) -> list[int]:
        """The ranks that were not heard of for so long."""
        now = time.monotonic()
        silent = []
        for rank in self._listening_to:
            heard_at = self._heard_at.get(rank, now)
            if rank != self.rank and now - heard_at > seconds:
                silent.append(rank)
        return silent

    def _names(self, ranks: list[int]) -> str:
        names = []
        for rank in ranks:
            message = self._messages.get(rank)
            host = message.host if message else "an unknown host"
            names.append(f"rank {rank} on {host}")
        return ", ".join(names)


def _is_of_peers(error: str) -> bool:
    return any(word in error for word in _WORDS_OF_PEER_ERRORS)
