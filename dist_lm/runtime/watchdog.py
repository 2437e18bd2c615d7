"""The watchdog names the rank that vanished, that hangs, or that is slow.

Each rank tells rank 0's store regularly that it lives and how far it is. gloo notices a stopped
process or a cut link only at its timeout, and NCCL aborts without a word about which rank was
missing. Rank 0 listens to all ranks and they listen to it, so a beat costs the store one message a
rank. There are two threads: the one that talks to the store hangs as long as the network does, and
the one that judges must not hang. torch.distributed is used for its TCPStore alone; nothing here is
a collective.

A rank hangs if it has done nothing for most of the timeout while another one is further. The
timeout would end the run a little later, without a word about who it was. Before it ends, all ranks
print where their threads are. A rank may take its time where that is usual: see UNHURRIED.
"""

import contextlib
import faulthandler
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dist_lm.environment import rank_here
from dist_lm.errors import RetryableError, UserError, in_a_line, one_line

# Words in errors that mean that another rank ended, and this one only noticed it.
_WORDS_OF_PEER_ERRORS = ("gloo", "NCCL", "onnection", "ocket", "imed out", "TCPStore")
_LONGEST_BEAT = 1.0  # seconds
# Of the timeout. The collectives have the same timeout, and NCCL ends the process without a report.
_SILENT_SHARE = 0.8
# Phases in which one rank may be far behind the others. The first step compiles.
UNHURRIED = ("start-up", "evaluation", "save")
_TIMES_SLOWER = 10.0  # than the median of the others: such a rank is warned about
_SHORTEST_SLOWNESS = 1.0  # seconds a step; shorter ones are the noise of a small model


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank is in the run."""

    progress: int = 0  # how many agreements and phases it has entered
    step: int = 0  # updates made
    phase: str = ""
    seconds: float = 0.0  # a step, without what it waited for others


@dataclass(frozen=True)
class Message:
    """The message that a rank sends to the others with each beat."""

    at: float  # seconds since 1970, so that each message differs from the one before
    host: str
    progress: int
    step: int
    phase: str
    seconds: float
    error: str  # in one line; empty while it has none
    kind: str  # of the error, as outcome.json names it
    wants_stacks: bool  # of all ranks, on their standard error

    @property
    def has_own_error(self) -> bool:
        """Whether the rank ended by an error that is not the echo of another rank's end."""
        is_of_user = self.kind != RetryableError.kind
        return bool(self.error) and (is_of_user or not _is_of_peers(self.error))


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
        whereabouts: Callable[[], Whereabouts],
        lost: Callable[[str], None],
        dump: Callable[[], None],
        say: Callable[[str], None],
    ):
        """`name` is one that no other start on the same store has.

        `dump` prints where the threads of this process are, and `say` prints a warning.
        """
        self.rank = rank
        self.world_size = world_size
        self.name = name
        self.timeout = timeout
        self.beat = min(_LONGEST_BEAT, timeout / 10)  # seconds between two messages
        self._whereabouts = whereabouts
        self._lost = lost
        self._dump = dump
        self._say = say
        self._store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
        )
        self._own_error = ""
        self._kind_of_error = RetryableError.kind
        self._messages: dict[int, Message] = {}  # the newest of each rank
        self._heard_at: dict[int, float] = {}  # when it came, by time.monotonic()
        self._moved_at: dict[int, float] = {}  # when the rank was seen to be further
        self._wants_stacks = False
        self._has_dumped = False
        self._called_slow: set[int] = set()
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

    def explain(self, error: Exception) -> tuple[str, str]:
        """Name the rank that is to blame for an error of this rank, and the kind of its error."""
        self._own_error = in_a_line(error)
        if isinstance(error, UserError):
            self._own_error = one_line(error)
            self._kind_of_error = error.kind
        if isinstance(error, UserError) or not _is_of_peers(str(error)):
            time.sleep(2 * self.beat)  # so that the others hear of it
            return f"{rank_here(self.rank)}: {self._own_error}", self._kind_of_error

        self._listening_to = range(self.world_size)
        self._heard_at = dict.fromkeys(self._listening_to, time.monotonic())
        time.sleep(4 * self.beat)
        silent = self._silent(2.5 * self.beat)
        kind = RetryableError.kind
        failed = []
        behind = []
        for rank, message in self._messages.items():
            if rank == self.rank:
                continue
            if message.has_own_error:
                failed.append(f"{self._names([rank])} ended: {message.error}")
                kind = message.kind
            if not message.error and message.progress < self._whereabouts().progress:
                behind.append(rank)
        if failed:
            text = ", ".join(failed)
        elif silent:
            text = f"{self._names(silent)} is missing"
        elif behind:
            text = f"{self._names(behind)} lives but hangs where others went on"
            text += f" ({self._where(behind[0])})"
        else:
            text = "all ranks were heard of"
        return f"{text}; {self._own_error}", kind

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
            error=self._own_error,
            kind=self._kind_of_error,
            wants_stacks=self._wants_stacks,
            **asdict(self._whereabouts()),
        )
        self._store.set(f"{self.name}/{self.rank}", json.dumps(asdict(message)))

    def _listen(self, ranks: Iterable[int]) -> None:
        ranks = list(ranks)
        texts = self._store.multi_get([f"{self.name}/{rank}" for rank in ranks])
        for rank, text in zip(ranks, texts, strict=True):
            message = Message(**json.loads(text))
            before = self._messages.get(rank)
            if message == before:
                continue
            self._messages[rank] = message
            self._heard_at[rank] = time.monotonic()
            if before is None or before.progress != message.progress:
                self._moved_at[rank] = time.monotonic()
            if message.wants_stacks:
                self._dump_once()

    # --- the thread that judges

    def _judge(self) -> None:
        looked_at = time.monotonic()
        limit = _SILENT_SHARE * self.timeout
        while not self._closed.wait(self.beat):
            now = time.monotonic()
            if now - looked_at > 3 * self.beat:
                # This process itself was stopped: the others get their time again.
                self._heard_at = dict.fromkeys(self._heard_at, now)
                self._moved_at = dict.fromkeys(self._moved_at, now)
            looked_at = now
            silent = self._silent(limit)
            if silent and not self._closed.is_set():
                self._lost(f"nothing heard for {limit:.0f} s of {self._names(silent)}")
            if self.rank == 0:
                self._judge_progress(limit)

    def _judge_progress(self, limit: float) -> None:
        """End a run in which a rank hangs, and warn of a slow one. Rank 0, which hears all."""
        hanging = self._hanging(limit)
        if hanging and not self._closed.is_set():
            self._wants_stacks = True  # the other thread tells the others
            self._dump_once()
            time.sleep(3 * self.beat)
            self._wants_stacks = False
            if set(hanging) & set(self._hanging(limit)):
                where = self._where(hanging[0])
                names = self._names(hanging)
                self._lost(f"{names} lives but has not moved for {limit:.0f} s ({where})")
        for rank in self._slow():
            self._called_slow.add(rank)
            seconds = self._messages[rank].seconds
            self._say(
                f"warning: {self._names([rank])} is slow: {seconds:.1f} s a step for data and"
                f" forward, more than {_TIMES_SLOWER:.0f} times the median of the others"
            )

    def _hanging(self, seconds: float) -> list[int]:
        """The ranks that did nothing for so long, while another one is further."""
        now = time.monotonic()
        furthest = max((message.progress for message in self._messages.values()), default=0)
        hanging = []
        for rank, message in self._messages.items():
            is_behind = message.progress < furthest and message.phase not in UNHURRIED
            if is_behind and now - self._moved_at[rank] > seconds:
                hanging.append(rank)
        return hanging

    def _slow(self) -> list[int]:
        """The ranks that take far longer for a step than the others, and were not named yet."""
        slow = []
        for rank, message in self._messages.items():
            others = [m.seconds for other, m in self._messages.items() if other != rank]
            if rank in self._called_slow or message.seconds < _SHORTEST_SLOWNESS or not all(others):
                continue
            if message.seconds > _TIMES_SLOWER * statistics.median(others):
                slow.append(rank)
        return slow

    def _dump_once(self) -> None:
        if not self._has_dumped:
            self._has_dumped = True
            self._dump()

    def _where(self, rank: int) -> str:
        message = self._messages[rank]
        return f"step {message.step + 1}, {message.phase}"

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


def dump_stacks(name: str, nccl_file: str) -> None:
    """Print where all threads of this process are, and write what NCCL was about to do.

    Standard error is written to by its number: it may be closed, or replaced.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"stacks of {name}:\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
    # Only torch with NCCL has the flight recorder. It was not tested on several GPUs.
    flight_recorder = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    if flight_recorder and dist.is_initialized() and dist.get_backend() == "nccl":
        with contextlib.suppress(Exception):  # a diagnosis must not get in the way of the end
            Path(nccl_file).write_bytes(flight_recorder())


def _is_of_peers(error: str) -> bool:
    return any(word in error for word in _WORDS_OF_PEER_ERRORS)
