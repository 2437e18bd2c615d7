"""Runs a command and writes down what it did to the machine.

    python -m tests.faults.audited LOG MODULE WORDS

Python tells an audit hook of each such event, whoever causes it. LOG has a line of JSON for each.
"""

import json
import os
import runpy
import sys
import threading
from typing import Any

# What runs code or starts programs.
RUNS_CODE = (
    "pickle.find_class",
    "marshal.loads",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "code.__new__",
)
CHANGES_FILES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.truncate",
    "os.symlink",
)
NETWORK = ("socket.connect", "socket.getaddrinfo")


def install(log: str) -> None:
    """From here on, events are written to the log."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    busy = threading.local()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if getattr(busy, "on", False):
            return
        busy.on = True
        try:
            noted = note(event, arguments)
            if noted:
                os.write(file, json.dumps([event, noted]).encode() + b"\n")
        finally:
            busy.on = False

    sys.addaudithook(hook)


def note(event: str, arguments: tuple[Any, ...]) -> str:
    """What is written down of an event, or nothing."""
    if event == "open":
        path, mode, flags = arguments
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        is_writing = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & writes
        return str(path) if is_writing and not isinstance(path, int) else ""
    if event == "marshal.loads":
        return "" if _is_importing() else "marshal"
    if event in CHANGES_FILES or event in RUNS_CODE or event in NETWORK:
        return " ".join(str(argument) for argument in arguments[:2])
    return ""


def _is_importing() -> bool:
    """Whether Python's own import system asks, which reads .pyc files."""
    frame = sys._getframe()
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def read(log: str) -> list[tuple[str, str]]:
    with open(log) as file:
        return [tuple(json.loads(line)) for line in file]


if __name__ == "__main__":
    log, module, *words = sys.argv[1:]
    sys.argv = [module, *words]
    install(log)
    runpy.run_module(module, run_name="__main__")
