"""A rank ends with the launcher that started it, and with the other ranks of its node.

Only the standard library is imported here: train.py calls this before anything else, because the
imports that follow take seconds, and a launcher may be killed during them.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

RETRYABLE = 70  # the exit code of what may be started again
# Variables that only one kind of launcher sets.
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_ACCELERATE = "ACCELERATE_MIXED_PRECISION"
_OUR_SCRIPTS = "DIST_LM_ATTEMPT"  # slurm/train.sh and launch/*.sh


def die_with_launcher() -> None:
    """If a launcher started us and vanishes (SIGKILL), end within seconds.

    Otherwise this process would train on as an orphan.
    """
    if not _is_set(_TORCHRUN, _ACCELERATE, _OUR_SCRIPTS):
        return
    parent = os.getppid()
    if is_orphaned(parent):
        print(
            "error: the launcher of this process ended before the process began",
            file=sys.stderr,
            flush=True,
        )
        os._exit(RETRYABLE)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        end_stopped_ranks()
        os._exit(RETRYABLE)

    threading.Thread(target=watch, daemon=True, name="die-with-launcher").start()


def is_orphaned(parent: int) -> bool:
    """Whether the launcher ended before this process could ask for its parent.

    An orphan's parent is process 1, or a systemd that looks after its user. Process 1 may also be
    the launcher itself, in a container that starts nothing else; but torchrun and accelerate are
    Python programs, and an init is none. What this cannot see is an orphan that another process
    than these two has adopted.
    """
    if not _is_set(_TORCHRUN, _ACCELERATE):
        return False  # Slurm's own process is the parent
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:  # no /proc, or it hides the processes of others
        return False
    program = os.path.basename(command.split(b"\0")[0])
    return program == b"systemd" or (parent == 1 and b"python" not in command)


def ranks_here() -> dict[int, tuple[str, str]]:
    """The processes of this node that belong to this start, by pid: their rank and their state.

    The state is a letter, as /proc has it. A rank that has ended is not among them.
    """
    wanted = set()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        wanted.add(f"{name}={os.environ.get(name)}".encode())
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            status = (folder / "stat").read_text(errors="replace")
        except OSError:  # it has ended, or is another user's
            continue
        rank = [variable for variable in variables if variable.startswith(b"RANK=")]
        if rank and wanted <= set(variables):
            found[int(folder.name)] = (rank[0].decode(), status.rpartition(")")[2].split()[0])
    return found


def has_lost_a_rank() -> bool:
    """Whether a rank of this node has ended; False where that cannot be seen."""
    here = ranks_here()
    ranks = {rank for rank, _ in here.values()}
    return os.getpid() in here and len(ranks) < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def end_stopped_ranks() -> None:
    """Kill the ranks of this node that are stopped (SIGSTOP), now that this start has failed.

    SIGTERM does not reach them, and their launcher would wait for them.
    """
    for pid, (_, state) in ranks_here().items():
        if state == "T" and pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is_set(*names: str) -> bool:
    return any(name in os.environ for name in names)
