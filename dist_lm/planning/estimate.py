"""Whether a run fits under each strategy, how long it takes, and what it costs."""

import timeit
from bisect import bisect_left
from dataclasses import asdict
from typing import Any

import torch

from dist_lm.config import Config, batch_layout
from dist_lm.console import gigabytes
from dist_lm.errors import UserError
from dist_lm.metrics import peak_flops
from dist_lm.model.init import flops_per_token
from dist_lm.planning.cluster import GPUS, OVERHEAD, Cluster
from dist_lm.planning.memory import Memory, memory
from dist_lm.planning.network import efficiency
from dist_lm.runtime.strategy import LAUNCH_FILES, Strategy, choose_strategy, refuse_combinations
from dist_lm.size import checkpoint_bytes, checkpoints_kept, parameters, steps_of

_DEVICES = ("none", "cpu", "nvme")  # of offloaded parts, from fast to slow


def estimate(
    config: Config, vocab_size: int, launch: str | None, cluster: Cluster, mfu: float
) -> dict[str, Any]:
    """All figures, as --json prints them: bytes, seconds and counts, unrounded."""
    world = cluster.world
    layout = batch_layout(config, world)
    steps = steps_of(config)
    # This refuses an unknown name.
    asked = choose_strategy(launch or next(iter(strategies(world)))).name(world)
    rows = fit(config, vocab_size, cluster)
    flops = flops_per_token(config.model_spec(vocab_size))
    tokens = steps * layout.tokens_per_step
    seconds_of_step = layout.tokens_per_step * flops / (mfu * peak(cluster) * world)
    for name, row in rows.items():
        if "refused" not in row:
            row["efficiency"] = efficiency(
                config,
                choose_strategy(name),
                cluster,
                layout,
                vocab_size=vocab_size,
                seconds=seconds_of_step,
            )
    rate = layout.tokens_per_step / seconds_of_step * rows[asked].get("efficiency", 1.0)
    seconds = tokens / rate
    return {
        "parameters": parameters(config, vocab_size),
        "vocab_size": vocab_size,
        "steps": steps,
        "flops_per_token": flops,
        "tokens": tokens,
        "flops": flops * tokens,
        "gpu": cluster.kind,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.per_node,
        "micro_batch": layout.micro_batch,
        "accumulation": layout.accumulation,
        "room": cluster.room,
        "bandwidth": cluster.bandwidth,
        "overhead": OVERHEAD if cluster.on_gpu else 0.0,
        "strategies": rows,
        "asked": asked,
        "take": recommend(rows, layout.micro_batch, cluster.room),
        "mfu": mfu,
        "tokens_per_second": rate,
        "seconds": seconds,
        "kilowatt_hours": GPUS[cluster.kind].watts * world * seconds / 3.6e6,
        "checkpoint": checkpoint_bytes(config, vocab_size),
        "checkpoints_kept": checkpoints_kept(config, steps),
        "advice": advice(config, vocab_size, cluster, rows, asked),
    }


def strategies(world: int) -> dict[str, Strategy]:
    """The strategies of launch/ that this number of processes can have, cheapest first."""
    by_name = {path.stem: choose_strategy(path.stem) for path in LAUNCH_FILES.glob("*.yaml")}
    del by_name["ddp" if world == 1 else "single"]

    def cost(name: str) -> tuple[int, int]:
        strategy = by_name[name]
        return strategy.stage, _DEVICES.index(strategy.optimizer_device)

    return {name: by_name[name] for name in sorted(by_name, key=cost)}


def peak(cluster: Cluster) -> float:
    """FLOP/s of one process's device: the data sheet's in dense bf16; of a CPU what it reaches."""
    if cluster.on_gpu:
        return peak_flops(GPUS[cluster.kind].device)
    a = torch.ones(1024, 1024)
    return 2 * 1024**3 / min(timeit.repeat(lambda: a @ a, number=1)) / cluster.per_node


# --- whether it fits


def fit(config: Config, vocab_size: int, cluster: Cluster) -> dict[str, dict[str, Any]]:
    """For each strategy what a process holds, whether that fits, and with which micro-batch; or
    why the strategy is refused."""
    rows: dict[str, dict[str, Any]] = {}
    for name, strategy in strategies(cluster.world).items():
        try:
            if strategy.stage:
                refuse_combinations(strategy, config)
        except UserError as error:
            rows[name] = {"refused": str(error)}
            continue
        figures = memory(config, strategy, cluster.world, vocab_size, cluster.on_gpu)
        bytes_needed = needed(figures, cluster)
        rows[name] = {
            **asdict(figures),
            "needed": bytes_needed,
            "fits": bytes_needed <= cluster.room,
            "largest_micro_batch": largest_micro_batch(config, strategy, cluster, vocab_size),
        }
    return rows


def recommend(rows: dict[str, Any], micro_batch: int, room: float) -> dict[str, Any]:
    """Choose a strategy and a micro-batch, and say why. The launch is None if none fits.

    It is the first that fits in the order of what a step costs: everything on each process, then
    parts of it divided, then parts of it offloaded. The asked micro-batch comes before a smaller
    one, which uses a device less well.
    """
    usable = {name: row for name, row in rows.items() if "refused" not in row}
    order = sorted(usable, key=lambda name: "-" in name)  # stable: zero2-offload after zero3
    passed_over: list[str] = []
    for name in order:
        row = usable[name]
        figures = f"{gigabytes(row['needed'])} GB of {gigabytes(room)} GB"
        if row["fits"]:
            why = f"the first that fits: {figures}"
            if passed_over:
                why += f"; {', '.join(passed_over)} would not"
            return {"launch": name, "micro_batch": micro_batch, "why": why}
        passed_over.append(name)
    for name in order:
        largest = usable[name]["largest_micro_batch"]
        if largest:
            why = f"none fits at micro-batch {micro_batch}, this is the first at a smaller one"
            return {"launch": name, "micro_batch": largest, "why": why}
    return {"launch": None, "micro_batch": micro_batch, "why": "none fits at any micro-batch"}


def needed(figures: Memory, cluster: Cluster) -> float:
    """The bytes that must fit into a device.

    A CPU's memory also holds what is offloaded, and what is on its way to disk.
    """
    if cluster.on_gpu:
        return figures.peak
    return figures.peak + (figures.host + figures.saving)


def largest_micro_batch(
    config: Config, strategy: Strategy, cluster: Cluster, vocab_size: int
) -> int:
    """The largest micro-batch that fits, 0 if none does.

    At most a process's whole share of the global batch.
    """

    def is_too_large(micro_batch: int) -> bool:
        changed = with_changes(config, "data", micro_batch=micro_batch)
        figures = memory(changed, strategy, cluster.world, vocab_size, cluster.on_gpu)
        return needed(figures, cluster) > cluster.room

    sizes = range(1, batch_layout(config, cluster.world).share + 1)
    return bisect_left(sizes, True, key=is_too_large)


def with_changes(config: Config, section: str, **fields: Any) -> Config:
    changed = getattr(config, section).model_copy(update=fields)
    return config.model_copy(update={section: changed})


def advice(
    config: Config, vocab_size: int, cluster: Cluster, rows: dict[str, Any], asked: str
) -> list[str]:
    """Whether what was asked for fits; if not, what would."""
    row = rows[asked]
    if "refused" in row:
        return [row["refused"]]
    if row["fits"]:
        return [f"{asked} fits"]
    room = f"{gigabytes(row['needed'])} GB of {gigabytes(cluster.room)} GB"
    problem = f"{asked} does not fit: {room};"
    remedies = what_would_fit(config, vocab_size, cluster, rows, asked)
    if remedies:
        return [f"{problem} what would:", *remedies]
    return [f"{problem} nothing here would; more GPUs might"]


def what_would_fit(
    config: Config, vocab_size: int, cluster: Cluster, rows: dict[str, Any], asked: str
) -> list[str]:
    """Flags that make it fit: a smaller micro-batch, checkpointing, another strategy or GPU."""
    remedies = []
    row = rows[asked]
    if row["largest_micro_batch"]:
        remedies.append(f"--data.micro_batch {row['largest_micro_batch']}")
    if not config.run.activation_checkpointing:
        strategy = strategies(cluster.world)[asked]
        spared = with_changes(config, "run", activation_checkpointing=True)
        most = largest_micro_batch(spared, strategy, cluster, vocab_size)
        if most:
            remedies.append(f"--run.activation_checkpointing true, micro-batches up to {most}")
    for name, other in rows.items():
        if name != asked and other.get("largest_micro_batch"):
            most = other["largest_micro_batch"]
            remedies.append(f"--launch {name}, micro-batches up to {most}")
    bigger = []
    for kind in GPUS:
        if "cpu" not in (kind, cluster.kind) and row["needed"] <= Cluster(kind).room:
            bigger.append(kind)
    if bigger:
        remedies.append(f"--gpu {' or '.join(bigger)}")
    return remedies
