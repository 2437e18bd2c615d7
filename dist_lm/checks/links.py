"""Checks of the network: where the ranks meet, sums over all of them, and pairs of neighbours."""

import os
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch

from dist_lm.checks.machines import best_of
from dist_lm.checks.ranks import Found, Ranks, few
from dist_lm.console import gigabytes
from dist_lm.runtime.world import Runtime

SLOW_LINK = 0.4  # share of the median rate below which a link is slow
MESSAGE_BYTES = 2**24


class Link(NamedTuple):
    """The figures that were measured between a rank and the next one."""

    rate: float  # bytes a second; first, so that the least link is the slowest
    latency: float  # seconds one way
    low: int  # the lower of both ranks


def rendezvous(ranks: Ranks) -> Found:
    address = os.environ.get("MASTER_ADDR", "none: one process")
    port = os.environ.get("MASTER_PORT", "")
    where = f"{address}:{port}".rstrip(":")
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    hosts = {facts["host"]: facts["address"] for facts in ranks.facts}
    addresses = few([f"{host} {address}" for host, address in hosts.items()], ", ")
    is_loopback = any(address.startswith("127.") for address in hosts.values())
    return f"{where}, {backend}, {addresses}", len(hosts) > 1 and is_loopback


def sums(ranks: Ranks) -> Found:
    """Latency and bandwidth of a sum over all ranks. All ranks."""
    if ranks.world == 1:
        return "one process: none", False
    latency, rate = latency_and_rate(
        ranks.device, lambda tensor: ranks.runtime.sum(tensor)[0].item()
    )
    # A ring passes each byte on 2 (n - 1) / n times; the rate on the bus compares with a link's.
    bus = 2 * (ranks.world - 1) / ranks.world * rate
    return f"{1000 * latency:.3g} ms, {gigabytes(bus)} GB/s on the bus", False


def pairs(ranks: Ranks) -> Found:
    """Neighbouring ranks send to each other; the slowest pair of each class. All ranks.

    Even and odd pairs take turns, so that no rank is in two pairs at once.
    """
    measured_here = []
    for first in (0, 1):
        for low in range(first, ranks.world - 1, 2):
            if ranks.runtime.rank in (low, low + 1):
                measured_here.append(measure_link(ranks.runtime, low))
    classes: defaultdict[str, list[Link]] = defaultdict(list)
    for links in ranks.gather(measured_here):
        for link in (Link(*link) for link in links):
            is_same = ranks.facts[link.low]["host"] == ranks.facts[link.low + 1]["host"]
            classes["same node" if is_same else "between nodes"].append(link)
    texts = []
    is_slow = False
    for name, links in classes.items():
        slowest = min(links)
        usual = statistics.median(link.rate for link in links)
        both = f"{ranks.names[slowest.low]} and {ranks.names[slowest.low + 1]}"
        texts.append(
            f"{name}: {1000 * slowest.latency:.3g} ms, {gigabytes(slowest.rate)} GB/s at least"
            f" ({both}), median {gigabytes(usual)} GB/s"
        )
        is_slow |= slowest.rate < SLOW_LINK * usual
    return "; ".join(texts) or "one process: none", is_slow


def measure_link(runtime: Runtime, low: int) -> Link:
    """Measure the link between rank `low` and the next. Both call this."""
    other = low + 1 if runtime.rank == low else low

    def there_and_back(tensor: torch.Tensor) -> None:
        for sender in (low, low + 1):
            if runtime.rank == sender:
                runtime.channel.send(tensor, other, 0).wait()
            else:
                runtime.channel.receive(tensor, other, 0)
        tensor[0].item()

    latency, rate = latency_and_rate(runtime.device, there_and_back)
    return Link(2 * rate, latency / 2, low)


def latency_and_rate(
    device: torch.device, work: Callable[[torch.Tensor], object]
) -> tuple[float, float]:
    """Seconds for one number, and bytes a second for many."""
    one = torch.zeros(1, device=device)
    many = torch.zeros(MESSAGE_BYTES // 4, device=device)
    latency = best_of(20, lambda: work(one))
    return latency, MESSAGE_BYTES / best_of(3, lambda: work(many))
