"""A plan as text: the page of one run, and the table of all shipped recipes. GB are 10^9 bytes."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from dist_lm.cli import read_yaml, resolve
from dist_lm.config import batch_layout
from dist_lm.console import count, gigabytes, shorten
from dist_lm.errors import UserError
from dist_lm.planning.cluster import REACHED, Cluster
from dist_lm.planning.estimate import fit, strategies
from dist_lm.planning.memory import Memory
from dist_lm.shipped import recipes
from dist_lm.size import parameters, vocabulary

TEXT_VOCABULARY = 100  # characters of a text, where --table has none to look at
COLUMNS = [field.name for field in fields(Memory)]


def describe(figures: dict[str, Any], source: str) -> str:
    """One page: the run, what each strategy takes, advice, and what it costs."""
    lines = [
        describe_run(figures, source),
        describe_machines(figures),
        "",
        *describe_strategies(figures),
        "",
        *describe_network(figures),
        describe_choice(figures["take"]),
        *figures["advice"],
        describe_cost(figures),
    ]
    if figures["gpu"] == "cpu":
        lines.append(
            "glibc may keep much freed memory on top;"
            " MALLOC_MMAP_THRESHOLD_=1048576 makes it give that back"
        )
    return "\n".join(lines)


def describe_run(figures: dict[str, Any], source: str) -> str:
    return (
        f"{source}: {figures['parameters']:,} parameters,"
        f" {shorten(figures['flops_per_token'])} FLOP a token; {figures['steps']:,} steps,"
        f" {shorten(figures['tokens'])} tokens, {figures['flops']:.3g} FLOP"
    )


def describe_machines(figures: dict[str, Any]) -> str:
    overhead = ""
    if figures["overhead"]:
        assumed = gigabytes(figures["overhead"])
        overhead = f" beside {assumed} GB assumed for CUDA, NCCL and fragmentation"
    passes = count(figures["accumulation"], "backward pass", "backward passes")
    return (
        f"{figures['nodes'] * figures['gpus_per_node']} x {figures['gpu']},"
        f" {count(figures['nodes'], 'node')} of {figures['gpus_per_node']};"
        f" {gigabytes(figures['room'])} GB for each process{overhead};"
        f" micro-batch {figures['micro_batch']}, {passes} a step"
    )


def describe_strategies(figures: dict[str, Any]) -> Iterator[str]:
    """A table; the strategy that was asked for is marked with a star."""
    yield f"{'GB a process':15}" + "".join(f"{name:>12}" for name in (*COLUMNS, "micro-batch"))
    for name, row in figures["strategies"].items():
        mark = "*" if name == figures["asked"] else " "
        if "refused" in row:
            cells = f"{'refused for this optimizer or precision':>40}"
        else:
            largest = row["largest_micro_batch"]
            most = f"<= {largest}" if largest else "none fits"
            cells = "".join(f"{gigabytes(row[column]):>12}" for column in COLUMNS) + f"{most:>12}"
        yield f"{mark} {name:13}{cells}"


def describe_network(figures: dict[str, Any]) -> Iterator[str]:
    """How much of a step each strategy waits for the network, if there is one."""
    if figures["gpu"] == "cpu" or figures["nodes"] * figures["gpus_per_node"] == 1:
        return
    waiting = []
    for name, row in figures["strategies"].items():
        if "refused" not in row:
            waiting.append(f"{name} {1 - row['efficiency']:.1%}")
    yield (
        f"a step waits for exchanges at {gigabytes(figures['bandwidth'])} GB/s (--network, and"
        f" {REACHED:.0%} of the links' speed assumed): {', '.join(waiting)}"
    )


def describe_choice(take: dict[str, Any]) -> str:
    """Which strategy to take, and why."""
    if take["launch"] is None:
        return f"take none of them: {take['why']}"
    return f"take {take['launch']} at micro-batch {take['micro_batch']}: {take['why']}"


def describe_time(seconds: float) -> str:
    """In the unit that people would use: 12 minutes, 5.3 hours, 12 days."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}s"
    return f"{seconds:.0f} seconds"


def describe_cost(figures: dict[str, Any]) -> str:
    """Time, energy and disk."""
    energy = ""
    if figures["kilowatt_hours"]:
        energy = f"{figures['kilowatt_hours']:,.0f} kWh at the GPUs' full power, "
    kept = figures["checkpoints_kept"]
    return (
        f"at an MFU of {figures['mfu']:g} (--mfu; a guess until measured):"
        f" {shorten(figures['tokens_per_second'])} tokens/s,"
        f" {describe_time(figures['seconds'])}, {energy}"
        f"a checkpoint {gigabytes(figures['checkpoint'])} GB, at most"
        f" {kept} on disk: {gigabytes(figures['checkpoint'] * kept)} GB"
    )


def table(cluster: Cluster) -> str:
    """Markdown: peak GB of a process and the largest micro-batch, of each recipe and strategy."""
    names = list(strategies(cluster.world))
    lines = [
        "| recipe | parameters | micro-batch | " + " | ".join(names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for path in recipes().values():
        has_model = any(name.startswith("model.") for name in read_yaml(path))
        if has_model:  # a recipe for fine-tuning takes any model
            lines.append(f"| {' | '.join(row_of_recipe(path, cluster))} |")
    return "\n".join(lines) + "\n"


def row_of_recipe(path: Path, cluster: Cluster) -> list[str]:
    config = resolve((str(path), read_yaml(path)))
    try:
        vocab_size = vocabulary(config)
    except UserError:
        vocab_size = TEXT_VOCABULARY
    cells = [
        path.stem,
        shorten(parameters(config, vocab_size)),
        str(batch_layout(config, cluster.world).micro_batch),
    ]
    for row in fit(config, vocab_size, cluster).values():
        if "refused" in row:
            cells.append("refused")
            continue
        largest = row["largest_micro_batch"]
        most = f"<= {largest}" if largest else "none"
        cells.append(f"{gigabytes(row['needed'])}, {most}")
    return cells
