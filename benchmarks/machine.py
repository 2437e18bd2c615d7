"""What measured: versions, commit, processor, and what the machine can do just now."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.facts import commit
from dist_lm.revision import version_and_hash

PACKAGES = (
    "accelerate",
    "datasets",
    "deepspeed",
    "numpy",
    "pyarrow",
    "tiktoken",
    "tokenizers",
    "torch",
    "transformers",
)


def facts() -> dict[str, Any]:
    """Versions, commit and machine. Nothing in it names the host, a user or a folder."""
    versions = {"dist_lm": version_and_hash(), "python": platform.python_version()}
    for name in PACKAGES:
        if is_installed(name):
            versions[name] = version(name)
    machine = {"processor": _processor(), "cores": len(os.sched_getaffinity(0))}
    machine["memory_gb"] = round(_memory_bytes() / 1e9)
    return {"commit": commit(), "versions": versions, "machine": machine}


def is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def probe(kind: str, is_quick: bool) -> dict[str, float]:
    """What the machine can do now: GFLOP/s of an fp32 product, or GB/s of reading and copying."""
    seconds = 0.01 if is_quick else 0.3
    if kind == "matrix":
        return {"fp32 GFLOP/s": round(_matrix_rate(seconds, 64 if is_quick else 1024), 1)}
    size = 2**18 if is_quick else 2**26
    return {"copy GB/s": round(_copy_rate(seconds, size), 1)}


def _matrix_rate(seconds: float, size: int) -> float:
    import torch  # slow

    left = torch.ones(size, size)
    out = torch.empty(size, size)
    torch.mm(left, left, out=out)
    return 2 * size**3 / 1e9 * _per_second(lambda: torch.mm(left, left, out=out), seconds)


def _copy_rate(seconds: float, elements: int) -> float:
    """Gigabytes read and written, each byte counted once."""
    import torch  # slow

    source = torch.ones(elements)
    target = torch.ones(elements)
    return 4 * elements / 1e9 * _per_second(lambda: target.copy_(source), seconds)


def _per_second(act: Any, seconds: float) -> float:
    """How often it can be done; the best stretch counts, because others may use the machine."""
    best = 0.0
    end = time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        act()
        now = time.perf_counter()
        best = max(best, 1 / (now - began))
        if now > end:
            return best
