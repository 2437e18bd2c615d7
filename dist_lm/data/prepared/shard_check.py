"""Hashes the token shards of a run in the background, each once, so that damage does not train on.

Rank 0 does it alone, for the shards on disk; the cache of remote shards checks its own copies. A
record in the run folder says which files were checked, with their sizes and times of change. So a
resumed run does not read the corpus again.
"""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dist_lm.data.prepared.sequences import TokenSequences
from dist_lm.data.prepared.shard_file import bad_shard
from dist_lm.disk import write_json
from dist_lm.errors import CheckpointError, UserError
from dist_lm.outside import open_regular, read_json

RECORD = "checked.json"
# Small corpora are checked before the first step. Larger ones are checked while the run trains.
HEAD_START = 5.0  # seconds
_CHUNK = 2**20  # bytes hashed at once
_LOWEST_PRIORITY = 19
_RECORD_SECONDS = 30.0  # between two writes of the record

# What a file was when it was checked: size, time of change in nanoseconds, sha256.
Facts = list[Any]


class ShardCheck:
    """The check of some shards. `refuse` is called from its thread, once, if one is damaged."""

    def __init__(
        self, run_dir: Path, sets: Iterable[TokenSequences], refuse: Callable[[UserError], None]
    ):
        self._record = run_dir / RECORD
        self._refuse = refuse
        self._hashes: dict[str, str] = {}  # of the files to check, by path
        for shards in sets:
            self._hashes |= shards.local_hashes()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="check of shards", daemon=True)

    def __enter__(self) -> "ShardCheck":
        if self._hashes:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give up what is not checked yet."""
        self._is_stopping.set()
        if self._hashes:
            self._thread.join()

    def wait(self) -> None:
        """Wait for a while, in which a small corpus is checked."""
        if self._hashes:
            self._thread.join(HEAD_START)

    def _work(self) -> None:
        # A thread of Linux has a priority of its own. Training comes first.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        before = self._read_record()
        checked: dict[str, Facts] = {}
        written = time.monotonic()
        try:
            for path, sha256 in self._hashes.items():
                facts = self._check(path, sha256, before.get(path))
                if facts is None:
                    break
                checked[path] = facts
                if time.monotonic() - written > _RECORD_SECONDS:
                    self._write_record(before | checked)
                    written = time.monotonic()
        except UserError as error:
            self._refuse(error)
        if checked != before:
            self._write_record(before | checked)

    def _check(self, path: str, sha256: str, before: Facts | None) -> Facts | None:
        """The facts of a shard whose hash is right; None if there is no time to find out.

        A damaged one is refused. One that is as it was when it was checked is not read again.
        """
        try:
            with open_regular(Path(path)) as file:
                status = os.fstat(file.fileno())
                facts = [status.st_size, status.st_mtime_ns, sha256]
                if facts == before:
                    return facts
                digest = hashlib.sha256()
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    if self._is_stopping.is_set():
                        return None
        except OSError as error:
            raise bad_shard(path, f"it cannot be read ({error.strerror or error})") from error
        if digest.hexdigest() != sha256:
            raise bad_shard(path, "it does not match its hash in the manifest")
        return facts

    def _read_record(self) -> dict[str, Facts]:
        """The facts of earlier starts. A record that cannot be read is made again."""
        try:
            return read_json(self._record, CheckpointError)
        except UserError:
            return {}

    def _write_record(self, checked: dict[str, Facts]) -> None:
        # Without it a resumed run only checks again, so a full disk does no harm.
        with contextlib.suppress(OSError):
            write_json(self._record, checked)
