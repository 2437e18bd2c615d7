"""Checks of devices, software, threads, memory, clocks and speed."""

import contextlib
import os
import platform
import socket
import statistics
import time
import timeit
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dist_lm.checks.ranks import Found, Ranks, few
from dist_lm.console import count, gigabytes
from dist_lm.errors import UserError
from dist_lm.revision import version_and_hash
from dist_lm.size import checkpoint_bytes, parameters, vocabulary

PACKAGES = ("torch", "accelerate", "deepspeed", "datasets")
SLOW = 0.8  # share of the median speed below which a rank is slow
SKEW_SECONDS = 1.0  # what clocks may differ by
LOOKS = 5  # at the clocks


def devices(ranks: Ranks) -> Found:
    """Every rank's facts, which the checks after this one judge."""
    ranks.facts = ranks.ask(lambda: facts_of_machine(ranks.device))
    kinds = {facts["device"] for facts in ranks.facts}
    hosts = {facts["host"] for facts in ranks.facts}
    text = (
        f"{count(ranks.world, 'rank')} on {count(len(hosts), 'host')}: {', '.join(sorted(kinds))};"
        f" {ranks.runtime.strategy}"
    )
    return text, len(kinds) > 1


def facts_of_machine(device: torch.device) -> dict[str, Any]:
    """The facts of this rank's machine and software."""
    facts = {
        "versions": versions_here(),
        "host": socket.gethostname(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)),
        "memory": free_memory(),
        "device_memory": 0,
        "address": address_here(),
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["device_memory"], _ = torch.cuda.mem_get_info(device)
        with contextlib.suppress(OSError, IndexError):
            driver = Path("/proc/driver/nvidia/version").read_text().split("  ")[1]
            facts["device"] = f"{facts['device']} {driver.strip()}"
    return facts


def versions_here() -> dict[str, str]:
    """The versions of Python and packages; of dist_lm with a hash of its code."""
    found = {"python": platform.python_version(), "dist_lm": version_and_hash()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def free_memory() -> int:
    """Bytes that Linux could give to new processes."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    raise UserError("/proc/meminfo has no MemAvailable")


def address_here() -> str:
    """This host's address on the way to rank 0's, and the interface that a variable names."""
    interface = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
        address = str(probe.getsockname()[0])
        return f"{address} by {interface}" if interface else address
    return "no route to MASTER_ADDR"


def versions(ranks: Ranks) -> Found:
    first = ranks.facts[0]["versions"]
    different = []
    for name, facts in zip(ranks.names, ranks.facts, strict=True):
        here = facts["versions"]
        for package in {**first, **here}:
            if here.get(package) != first.get(package):
                version = here.get(package, "missing")
                expected = first.get(package, "missing")
                different.append(f"{name}: {package} {version}, not {expected}")
    if different:
        raise UserError(few(different, "; "))
    return ", ".join(f"{package} {version}" for package, version in first.items()), False


def threads(ranks: Ranks) -> Found:
    for host in dict.fromkeys(facts["host"] for facts in ranks.facts):
        here = [facts for facts in ranks.facts if facts["host"] == host]
        cores = len(set().union(*(facts["cores"] for facts in here)))
        wanted = sum(facts["threads"] for facts in here)
        if wanted > cores:
            threads_of_ranks = f"{count(wanted, 'thread')} of {count(len(here), 'rank')}"
            text = f"{host}: {threads_of_ranks} on {count(cores, 'core')}"
            return text, True
    first = ranks.facts[0]
    return f"{first['threads']} a rank on {count(len(first['cores']), 'core')}", False


def memory(ranks: Ranks) -> Found:
    """Compare the free memory with the least that the strategy needs before any activation."""
    smallest = min(ranks.facts, key=lambda facts: int(facts["device_memory"] or facts["memory"]))
    on_gpu = bool(smallest["device_memory"])
    host = smallest["host"]
    free = smallest["device_memory"] or smallest["memory"]
    text = f"{gigabytes(free)} GB free on {host}"
    strategy = ranks.runtime.engine.strategy
    try:
        vocab_size = vocabulary(ranks.config)
    except UserError:
        return text, False
    if on_gpu and strategy.optimizer_device != "none":
        return text, False
    processes = 1 if on_gpu else sum(facts["host"] == host for facts in ranks.facts)
    least = processes * least_bytes(ranks, strategy.stage, vocab_size)
    text += f", weights, gradients and moments take {gigabytes(least)} GB"
    if least > free:
        raise UserError(text)
    return text, False


def least_bytes(ranks: Ranks, stage: int, vocab_size: int) -> float:
    """Weights, gradients and moments of one process under a stage of ZeRO; 0 is DDP."""
    weights = 4.0 * parameters(ranks.config, vocab_size)
    gradients = weights
    divided = gradients + checkpoint_bytes(ranks.config, vocab_size)  # of weights and moments
    if not stage:
        return divided
    # Under ZeRO-1 and 2 the optimizer has copies of its share beside the whole weights.
    whole = weights if stage in (1, 2) else 0.0
    each: float = whole + divided / ranks.world
    return each


def clocks(ranks: Ranks) -> Found:
    """Each rank's time less rank 0's. All ranks.

    Of several looks the smallest difference has least of the look's own delay.
    """
    looks = []
    for _ in range(LOOKS):
        ranks.runtime.barrier()
        times = ranks.gather(time.time())
        looks.append([abs(seconds - times[0]) for seconds in times])
    smallest = [min(of_rank) for of_rank in zip(*looks, strict=True)]
    apart, name = max(zip(smallest, ranks.names, strict=True))
    return f"at most {apart:.3g} s apart ({name} from rank 0)", apart > SKEW_SECONDS


def speed(ranks: Ranks) -> Found:
    """The same product of matrices on every device at the same time. All ranks."""
    size = 1024
    dtype = torch.float32
    if ranks.device.type == "cuda":
        size = 8192
        dtype = torch.bfloat16
    a = torch.randn(size, size, device=ranks.device).to(dtype)
    ranks.runtime.barrier()
    seconds = best_of(8, lambda: (a @ a)[0, 0].item())
    rates = [2 * size**3 / seconds for seconds in ranks.gather(seconds)]
    usual = max(rates)
    if len(rates) > 2:
        usual = statistics.median(rates)
    slow = []
    for name, rate in zip(ranks.names, rates, strict=True):
        if rate < SLOW * usual:
            slow.append(f"{name} {rate / 1e12:.3g}")
    arithmetic = str(dtype).removeprefix("torch.")
    text = f"{min(rates) / 1e12:.3g} to {max(rates) / 1e12:.3g} TFLOP/s in {arithmetic}"
    if slow:
        text += f"; slow: {few(slow, ', ')}"
    return text, bool(slow)


def best_of(turns: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest turn, after one to warm up."""
    return min(timeit.repeat(work, number=1, repeat=turns + 1)[1:])
