"""Starts child processes that serve one end of a pipe.

They are plain subprocesses. So nothing is pickled, and the caller's main module is not imported
again. A child ends when its pipe closes, however the parent ends, and Ctrl-C reaches only the
parent.
"""

import os
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path


def start_child(
    program: str, *arguments: str, env: dict[str, str], is_quiet: bool = False
) -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start Python code in a process of its own; returns the pipe to it, and the process.

    Its last argument is the descriptor of its end of the pipe. `env` is added to the environment.
    If it `is_quiet`, its last words reach no terminal.
    """
    pipe, far_end = Pipe()
    descriptor = far_end.fileno()
    search_path = [str(Path(__file__).parents[2])]
    if os.environ.get("PYTHONPATH"):
        search_path.append(os.environ["PYTHONPATH"])
    try:
        with far_end:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", program, *arguments, str(descriptor)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if is_quiet else None,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(search_path)} | env,
                pass_fds=[descriptor],
                process_group=0,
            )
    except OSError as error:
        pipe.close()
        raise RuntimeError(f"a process could not be started: {error}") from error
    return pipe, process
