"""A run folder belongs to one run at a time: RUN/run.lock.

The file says on which host and in which process rank 0 runs. Two things tell others whether that
run lives:

- It touches the file every few seconds. If nobody touched it for STALE_SECONDS, by the clock of
  whoever looks, the run is dead. Clocks of other hosts do not matter.
- It keeps an exclusive flock on the file, which the kernel ends with the process and not before. So
  a process that is stopped keeps its folder, although it touches nothing. Some file systems know no
  flock, or grant it to everybody; therefore a flock that is held proves that the run lives, but one
  that is free proves nothing.

If the lock is still taken away or deleted, or the folder replaced, the run sees it at its
next step and before it commits a checkpoint. Then it ends, and writes nothing more. To take a
folder from a run that cannot be reached, delete its run.lock.

Neither torch nor numpy is imported here, because outcome.py must answer at once.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dist_lm.errors import RetryableError, UserError

STALE_SECONDS = 15.0
LEASE_SECONDS = 120.0  # an NFS server may keep the flock of a host that is gone for 90 s
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """This run's hold on its folder.

    Rank 0 takes and releases it; the other ranks only know what is in the file. The thread that
    touches the file refers to this object. Keep the runtime out of it: a thread whose end frees the
    runtime's tensors may abort Python's exit.
    """

    def __init__(self, folder: Path):
        self.path = folder / "run.lock"
        self.text = ""  # what run.lock holds while the folder is ours; empty before that
        self._why_lost = ""
        self._looked_at = 0.0  # by time.monotonic()
        self._descriptor: int | None = None  # of rank 0, with the flock
        self._thread: threading.Thread | None = None
        self._released = threading.Event()

    def take(self, say: Callable[[str], None]) -> str:
        """Wait until the folder is free or its holder is known to be dead, then take it. Rank 0.

        Returns the text of the file. Refuses when the holder lives, after STALE_SECONDS and a few
        more.
        """
        place = {"host": socket.gethostname(), "pid": os.getpid(), "start": secrets.token_hex(4)}
        text = json.dumps(place)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = self._wait_and_create(text, say)
            # Files of a start that was killed in _create().
            for left_over in self.path.parent.glob(".run.lock.*"):
                left_over.unlink(missing_ok=True)
        except OSError as error:
            raise RetryableError(
                f"run.dir={self.path.parent}: {error.filename or self.path}: {error.strerror};"
                " rule: a folder that can be written",
            ) from error
        self.text = text
        self._descriptor = descriptor
        self._looked_at = time.monotonic()
        self._thread = threading.Thread(
            target=self._beat, args=(descriptor,), daemon=True, name="run-lock"
        )
        self._thread.start()
        return text

    def see(self, text: str) -> None:
        """Wait until run.lock is there as rank 0 wrote it. Any rank.

        Another node may have another folder of that name, which would split the run into pieces
        that nobody can resume.
        """
        folder = self.path.parent
        asked = time.monotonic()
        while not self.path.exists() or self.path.read_text(encoding="utf-8") != text:
            if time.monotonic() - asked > STALE_SECONDS:  # network file systems may take a while
                raise UserError(
                    f"run.dir={folder} on {socket.gethostname()} is not the folder that rank 0"
                    " sees; rule: one that all nodes share"
                )
            if folder.exists():
                os.listdir(folder)  # makes an NFS client ask its server again
            time.sleep(0.2)
        self.text = text
        self._looked_at = time.monotonic()

    def look(self) -> str:
        """The reason why the folder is no longer ours, or an empty string. Reads the file."""
        if self.text and not self._why_lost:
            try:
                text = self.path.read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, NotADirectoryError):
                self._why_lost = f"{self.path} was deleted"
            except OSError:
                pass  # an error of a disk or a network does not tell who holds the folder
            else:
                if text != self.text:
                    self._why_lost = f"{self.path} is now held by {text}"
                elif self._is_copy():
                    self._why_lost = f"{self.path.parent} was replaced by a copy"
            self._looked_at = time.monotonic()
        return self._why_lost

    def _is_copy(self) -> bool:
        """Whether the path leads to another file than the one that rank 0 made."""
        if self._descriptor is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except OSError:
            return False

    @property
    def lost(self) -> str:
        """The reason why the folder is no longer ours, or an empty string. Cheap enough for steps.

        Only rank 0 knows. It is what the thread saw. If the thread has not looked for long, this
        process was stopped, and we look here.
        """
        if self._descriptor is None:
            return ""
        if time.monotonic() - self._looked_at > STALE_SECONDS / 2:
            return self.look()
        return self._why_lost

    def is_anothers(self) -> bool:
        """Whether a run other than ours lives in the folder.

        Any process; waits where only a touch can tell.
        """
        if self.text:
            return bool(self.look())
        holder = Holder(self.path)
        try:
            state = holder.look()
            while state == "unknown":
                time.sleep(0.5)
                state = holder.look()
        except OSError:  # then nobody can have it
            return False
        return state in ("alive", "stopped")

    def release(self) -> None:
        """Delete the file if it is still ours.

        Any rank may call this; only the one that took the lock does it.
        """
        if self._descriptor is None:
            return
        self._released.set()
        if self._thread:
            self._thread.join(5)
        if not self.look():
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        self.text = ""

    def _beat(self, descriptor: int) -> None:
        while not self._released.wait(STALE_SECONDS / 5):
            if self.look():
                return
            with contextlib.suppress(OSError):  # a full or slow disk must not end the run
                os.utime(descriptor)

    def _wait_and_create(self, text: str, say: Callable[[str], None]) -> int:
        """Create the file as soon as no living run holds one. Returns its descriptor. Rank 0."""
        holder = Holder(self.path)
        asked = time.monotonic()
        has_said = False
        while True:
            state = holder.look()
            if state == "nobody":
                descriptor = self._create(text)
                if descriptor is not None:
                    return descriptor
            elif state == "dead":
                holder.remove()
            else:
                patience = STALE_SECONDS + 5
                if state == "stopped" and not holder.is_on_this_host:
                    patience = LEASE_SECONDS
                if time.monotonic() - asked > patience:
                    raise UserError(self._refusal(holder, state))
                if not has_said:
                    say(f"waiting for the run that holds {self.path} ({holder.text})")
                    has_said = True
            time.sleep(0.5)

    def _refusal(self, holder: "Holder", state: str) -> str:
        if state == "stopped":
            return (
                f"run.dir={self.path.parent} is in use by another run whose process is stopped or"
                f" unreachable ({holder.text}); rule: one run a folder; end that process, or delete"
                f" {self.path} if it is lost"
            )
        return (
            f"run.dir={self.path.parent} is in use by another run ({holder.text}); rule: one run a"
            " folder; choose another run.dir or end that run"
        )

    def _create(self, text: str) -> int | None:
        """Make the file; None if another start was quicker.

        It appears with its text and its flock at once.
        """
        aside = self.path.with_name(f".run.lock.{secrets.token_hex(4)}")
        try:
            descriptor = _write_new(aside, text)
            try:
                os.link(aside, self.path)  # fails if there is one
            except (FileExistsError, FileNotFoundError):
                # Another start was quicker. It may have taken `aside` for a left-over.
                os.close(descriptor)
                return None
            except OSError as error:
                os.close(descriptor)
                if error.errno not in _NO_HARD_LINKS:
                    raise
                return _write_new(self.path, text)
            return descriptor
        except FileExistsError:
            return None
        finally:
            aside.unlink(missing_ok=True)


class Holder:
    """The holder of a run.lock, judged by looking at the file again and again."""

    def __init__(self, path: Path):
        self.path = path
        self.text = ""  # of the file at the last look
        self._touched: int | None = None  # when, by the file's own clock
        self._since = 0.0  # when we first saw that, by time.monotonic()
        self._is_touched = False  # we saw it being touched

    def look(self) -> str:
        """The holder's state: nobody, dead, alive, stopped or unknown.

        A stopped holder lives but touches nothing. It is unknown as long as we wait for a touch.
        """
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                text = file.read()
                touched = os.fstat(file.fileno()).st_mtime_ns
                has_flock = _is_held(file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            return "nobody"
        if text != self.text or touched != self._touched:
            self._is_touched = text == self.text
            self.text = text
            self._touched = touched
            self._since = time.monotonic()
        is_silent = time.monotonic() - self._since > STALE_SECONDS
        if has_flock:
            return "stopped" if is_silent else "alive"
        # A full disk leaves a file without text.
        if is_silent or not text or self._is_gone():
            return "dead"
        return "alive" if self._is_touched else "unknown"

    def remove(self) -> None:
        """Delete the file of a dead run.

        If another start was quicker, the path leads to another file, which stays.
        """
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(self.path, "r+") as file:
            _flock(file.fileno())
            if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                self.path.unlink()

    @property
    def is_on_this_host(self) -> bool:
        return self._place()[0] == socket.gethostname()

    def _place(self) -> tuple[str, int]:
        """Host and process, as they are in the file."""
        try:
            place = json.loads(self.text)
            return str(place["host"]), int(place["pid"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return "", 0

    def _is_gone(self) -> bool:
        """Whether the process ended on this host. A zombie has ended."""
        host, pid = self._place()
        if host != socket.gethostname() or pid < 1:
            return False
        try:
            os.kill(pid, 0)
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # it is another user's, or there is no /proc
            return False
        return fields[0] in "ZX"


def _write_new(path: Path, text: str) -> int:
    """Create a file with this text and our flock. Returns its descriptor.

    Raises FileExistsError if there is one.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        _flock(descriptor)
        left = text.encode()
        while left:  # one call may write a part
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()  # half a lock holds nobody's name
        raise
    return descriptor


def _flock(descriptor: int) -> None:
    """Hold it exclusively until the descriptor is closed; nothing happens where there is no flock.

    Raises BlockingIOError where another process has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


def _is_held(descriptor: int) -> bool:
    """Whether another process holds the flock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
