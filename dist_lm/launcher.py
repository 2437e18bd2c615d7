"""A rank ends with the launcher that started it.

Only the standard library is imported here: train.py calls this before anything else, because the
imports that follow take seconds, and a launcher may be killed during them.
"""

import os
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


def _is_set(*names: str) -> bool:
    return any(name in os.environ for name in names)
