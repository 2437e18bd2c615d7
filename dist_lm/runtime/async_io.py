"""Builds DeepSpeed's reader and writer for NVMe, which is compiled at its first use.

One process of a host builds at a time; the others wait for it and then find the result.
"""

import fcntl
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

import torch

from dist_lm.errors import RetryableError, UserError


def build_async_io() -> None:
    """Compile the extension, or find it made. Refuses where the host cannot compile it."""
    # optional and slow packages
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils import cpp_extension

    builder = AsyncIOBuilder()
    if torch.cuda.is_available() and cpp_extension.CUDA_HOME is None:
        raise UserError(
            "zero3-nvme compiles an extension; rule: the CUDA toolkit is installed; nearest:"
            " zero3-offload"
        )
    if not builder.is_compatible(verbose=False):
        raise UserError(
            "DeepSpeed's async I/O cannot be built here; rule: zero3-nvme needs libaio, e.g. apt"
            " install libaio-dev; nearest: zero3-offload"
        )
    # DeepSpeed builds the second with the first.
    names = (builder.name, "pin_memory")
    folders = [Path(cpp_extension._get_build_directory(name, verbose=False)) for name in names]
    with only_builder(folders):
        if not any(folders[0].glob("*.so")):
            _say("building DeepSpeed's async I/O, once on this host: some minutes")
        # ninja lies beside Python where an environment is used without being activated.
        beside_python = Path(sys.executable).parent
        os.environ["PATH"] = f"{beside_python}{os.pathsep}{os.environ['PATH']}"
        builder.load(verbose=False)


@contextmanager
def only_builder(folders: Sequence[Path], wait_seconds: float = 900.0) -> Iterator[None]:
    """Inside, this process is the only one of the host that builds extensions in `folders`.

    Waits for another builder at most `wait_seconds`.
    """
    with open(folders[0] / "builder", "a+") as file:
        _wait_for_flock(file, folders[0], wait_seconds)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        # torch's own locks outlive a builder that was killed, and every later start would wait for
        # them forever.
        for folder in folders:
            (folder / "lock").unlink(missing_ok=True)
        yield


def _wait_for_flock(file: TextIOWrapper, folder: Path, wait_seconds: float) -> None:
    """Take the flock. The kernel releases it when its process ends, however that ends."""
    began = time.monotonic()
    has_said = os.environ.get("RANK", "0") != "0"
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        file.seek(0)
        who = f"process {file.read()}"
        if time.monotonic() - began > wait_seconds:
            raise RetryableError(
                f"{folder}: {who} builds for {wait_seconds:.0f} s already; rule: end it"
            )
        if not has_said:
            _say(f"waiting until {who} has built in {folder}")
        has_said = True
        time.sleep(0.2)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
