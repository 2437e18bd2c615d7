"""Checks of the run folder: that all ranks share it, its room, its speed."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from dist_lm.checks.ranks import Found, Ranks
from dist_lm.console import count, gigabytes
from dist_lm.errors import UserError
from dist_lm.size import checkpoint_bytes, checkpoints_kept, steps_of, vocabulary

SAVE_SECONDS = 300.0  # what writing a checkpoint may take
DISK_BYTES = 2**25
PART_BYTES = 2**20


def run_folder(ranks: Ranks) -> Found:
    """Every rank can write into a folder that rank 0 has just made there. All ranks."""

    def make() -> str:
        ways = (ranks.folder, *ranks.folder.parents)
        ranks.made = [path for path in ways if not path.exists()]
        ranks.folder.mkdir(parents=True, exist_ok=True)
        ranks.probe = Path(tempfile.mkdtemp(prefix=".doctor-", dir=ranks.folder))
        return ranks.probe.name

    def write() -> None:
        deadline = time.monotonic() + ranks.seconds / 4
        while not ranks.probe.exists() and time.monotonic() < deadline:
            time.sleep(0.1)  # NFS remembers for a while what was not there
        (ranks.probe / str(ranks.runtime.rank)).touch()

    name = ranks.ask(make, is_asked=ranks.is_main)[0]
    ranks.probe = ranks.folder / name  # as this rank sees it
    ranks.ask(write)
    return f"{ranks.folder}: all ranks see the same", False


def space(ranks: Ranks) -> Found:
    """Room for all checkpoints that lie there at once."""

    def sizes() -> tuple[int, int]:
        config = ranks.config
        number = checkpoints_kept(config, steps_of(config))
        return checkpoint_bytes(config, vocabulary(config)), number

    free = ranks.ask(lambda: shutil.disk_usage(ranks.folder).free, is_asked=ranks.is_main)[0]
    text = f"{gigabytes(free)} GB free"
    try:
        size, number = ranks.ask(sizes, is_asked=ranks.is_main)[0]
    except UserError as unknown:
        return f"{text}; what is needed is not known: {unknown}", True
    ranks.checkpoint_bytes = size
    need = number * size
    text += f", {count(number, 'checkpoint')} of {gigabytes(size)} GB need {gigabytes(need)} GB"
    if need > free:
        raise UserError(text)
    return text, False


def disk(ranks: Ranks) -> Found:
    """The speed of writing, by one rank of each host. All ranks."""
    part = os.urandom(PART_BYTES)

    def write() -> float:
        written = 0
        began = time.monotonic()
        with tempfile.NamedTemporaryFile(dir=ranks.probe) as file:
            while written < DISK_BYTES and time.monotonic() - began < ranks.seconds / 8:
                written += file.write(part)
            file.flush()
            os.fsync(file.fileno())
        return written / (time.monotonic() - began)

    rates = ranks.ask(write, is_asked=os.environ.get("LOCAL_RANK", "0") == "0")
    rate = min(rate for rate in rates if rate)
    seconds = ranks.checkpoint_bytes / rate
    text = f"{gigabytes(rate)} GB/s a host at least"
    if seconds:
        text += f", a checkpoint in about {seconds:.2g} s"
    return text, seconds > SAVE_SECONDS
