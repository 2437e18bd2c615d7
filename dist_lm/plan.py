"""Will it fit, how long, at what cost: `python -m dist_lm.plan --config FILE --launch zero3 --nodes 8 --gpu h100`.

Needs no GPU and never makes the model: shapes give weights, gradients and the optimizer's state, and a forward and
backward on fake tensors gives what activations and loss take at each moment. Checked against real training by
benchmarks/plan.py. `--table` prints the shipped recipes under every strategy, as docs/planning.md has them.
"""

import json
import math
import os
import timeit
import weakref
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lm.cli import load, read_yaml, resolve
from dist_lm.config import Config, ModelConfig, ModelSpec, batch_layout
from dist_lm.console import shorten
from dist_lm.errors import UserError, did_you_mean, run_entry
from dist_lm.metrics import peak_flops
from dist_lm.model.gpt import GPT
from dist_lm.model.init import flops_per_token, parameter_shapes
from dist_lm.optim import moments
from dist_lm.runtime.strategy import (
    BUCKET,
    LAUNCH_FILES,
    Strategy,
    choose_strategy,
    refuse_combinations,
)
from dist_lm.size import checkpoint_bytes, checkpoints_kept, parameters, steps_of, vocabulary

FLAGS = {
    "launch": "The strategy to mark: a file of launch/ (single or ddp).",
    "nodes": "Machines (1).",
    "gpus_per_node": "GPUs, and processes, of each (8).",
    "gpu": "Kind of GPU (h100): a100-40, a100-80, h100, h200, b200, l40s, rtx4090; or cpu: this machine's.",
    "mfu": "Share of the peak that training reaches (0.4).",
    "vocab_size": "Tokens of the vocabulary, where neither data.input nor data.tokenizer says.",
    "json": "Print one JSON object.",
    "table": "Print all recipes of configs/ under every strategy instead.",
}
SHAPES = lru_cache(parameter_shapes)
CONFIGS = Path(__file__).parents[1] / "configs"
# Beside what is derived, for the CUDA context, buffers of NCCL and cuBLAS, fragmentation: assumed, and said so.
OVERHEAD = 2.0e9
GATHERED = 10**9  # elements: DeepSpeed's stage3_max_live_parameters, which launch files leave alone
TEXT_VOCABULARY = 100  # characters of a text, where --table has none to look at


class Gpu(NamedTuple):
    """A kind of device: the name its driver gives (metrics.py knows its peak), memory as torch sees it, full power."""

    device: str
    memory: float  # bytes
    watts: float


GPUS = {
    "a100-40": Gpu("A100", 39.4 * 2**30, 400),
    "a100-80": Gpu("A100", 79.2 * 2**30, 400),
    "h100": Gpu("H100", 79.2 * 2**30, 700),
    "h200": Gpu("H200", 139.8 * 2**30, 700),
    "b200": Gpu("B200", 178.4 * 2**30, 1000),
    "l40s": Gpu("L40S", 44.4 * 2**30, 350),
    "rtx4090": Gpu("RTX 4090", 23.5 * 2**30, 450),
    "cpu": Gpu("cpu", 0, 0),
}


@dataclass(frozen=True)
class Cluster:
    """What to plan for: a process on each GPU, or so many processes that share this machine's processor."""

    kind: str = "h100"
    nodes: int = 1
    per_node: int = 8

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def on_gpu(self) -> bool:
        return self.kind != "cpu"

    @property
    def room(self) -> float:
        """Bytes that training may take of one GPU, or of this machine's memory by one of its processes."""
        if self.on_gpu:
            return GPUS[self.kind].memory - OVERHEAD
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / self.per_node

    def peak(self) -> float:
        """FLOP/s of one process's device: the data sheet's in dense bf16; of a CPU what it reaches."""
        if self.on_gpu:
            return peak_flops(GPUS[self.kind].device)
        a = torch.ones(1024, 1024)
        return 2 * 1024**3 / min(timeit.repeat(lambda: a @ a, number=1)) / self.per_node


@dataclass(frozen=True)
class Live:
    """Bytes beside weights, gradients and optimizer at the moments of one forward and backward."""

    activations: float  # when the blocks have been run forward
    loss: float  # most while the loss is made, above them
    blocks: float  # most in the blocks' backward
    end: float  # most in the embedding's backward, when all else has gone


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: on its device, in its host's memory, on its disk."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float  # with the loss's gradients
    peak: float  # most at one time: less than the sum, where one goes before another comes
    host: float  # offloaded parts
    disk: float  # NVMe
    saving: float  # host memory of a checkpoint on its way to disk


def main(argv: list[str]) -> None:
    config, given = load(argv, FLAGS, "python -m dist_lm.plan")
    words = {name: values[-1] for name, values in given.items()}
    kind = words.get("gpu", "h100")
    if kind not in GPUS:
        raise UserError(f"--gpu={kind} must be one of {', '.join(GPUS)}{did_you_mean(kind, GPUS)}")
    cluster = Cluster(
        kind, int(_number(words, "nodes", 1)), int(_number(words, "gpus_per_node", 8))
    )
    mfu = _number(words, "mfu", 0.4, "a number above 0 and at most 1")
    if "table" in words:
        print(table(cluster), end="")
        return
    vocab_size = (
        int(_number(words, "vocab_size", 1)) if "vocab_size" in words else vocabulary(config)
    )
    figures = estimate(config, vocab_size, words.get("launch"), cluster, mfu)
    print(
        json.dumps(figures, indent=1)
        if "json" in words
        else describe(figures, words.get("config", "defaults"))
    )


def _number(
    words: Mapping[str, str], name: str, default: float, rule: str = "a whole number of 1 or more"
) -> float:
    text = words.get(name, str(default))
    try:
        number = float(text) if name == "mfu" else int(text)
    except ValueError:
        number = 0
    if number <= 0 or (name == "mfu" and not number <= 1):
        raise UserError(f"--{name}={text} must be {rule}; nearest: {default}")
    return number


# --- what a process holds


def memory(config: Config, strategy: Strategy, world: int, vocab_size: int, on_gpu: bool) -> Memory:
    """Memory of one process of `world`; DeepSpeed's parts as those of 0.19 were measured (benchmarks/plan.py)."""
    layout = batch_layout(config, world)
    shapes = SHAPES(config.model_spec(vocab_size))
    sizes = {name: 4.0 * math.prod(shape) for name, shape in shapes.items()}
    weights = sum(sizes.values())  # fp32 in every precision; gradients and moments are as well
    kept = sum(
        size * (moments(config.optim.name, name) + (config.run.ema > 0))
        for name, size in sizes.items()
    )
    live = live_bytes(config, vocab_size, layout.micro_batch, strategy.stage == 3, on_gpu)
    first, activations = (
        max(live.activations + live.loss, live.blocks),
        max(live.activations, live.blocks),
    )
    logits, saving = first - activations, checkpoint_bytes(config, vocab_size) / world
    added_up = layout.accumulation > 1  # then gradients are there before the last backward begins
    if not strategy.stage:
        early = (
            weights if world > 1 or added_up else 0.0
        )  # DDP's buckets, which gradients are views of, always exist
        peak = weights + kept + max(early + first, weights + live.end)
        return Memory(weights, weights, kept, activations, logits, peak, 0.0, 0.0, saving)

    # ZeRO: the optimizer works on fp32 copies of its share, gradients travel in a bucket that is copied to be summed.
    share, state, bucket = weights / world, (weights + kept) / world, min(4.0 * BUCKET, weights)
    fixed = (
        4.0 * BUCKET if on_gpu else 0.0
    )  # on a GPU all there as the backward begins, on a CPU as its pages fill
    filled = [
        n * bucket / weights for n in range(1, int(weights // bucket) + 1)
    ]  # how much is done as it is full
    mine = (
        share if strategy.optimizer_device == "none" else 0.0
    )  # gradients go where the optimizer is
    before = (weights if strategy.stage == 1 else mine) if added_up else 0.0
    copied = [mine if on_gpu else mine * done for done in [0.0, *filled]]
    during = [
        before + (1 - done) * activations + max(fixed, bucket) + bucket + own
        for done, own in zip(filled, copied, strict=False)
    ]
    moving = max(before + first + fixed, *during, bucket + mine + live.end, 2 * mine)
    gradients = max(before, mine) + 2 * bucket
    held, host, disk = weights, 0.0, 0.0
    if (
        strategy.stage == 3
    ):  # slices, and what is gathered of them: up to DeepSpeed's limit all of it stays together
        held = share + min(weights, 4.0 * GATHERED)
        always = mine + max(fixed, bucket)  # here gradients and bucket stay for good
        moving = always + max(first, *((1 - done) * activations + bucket for done in filled))
    if not mine:  # and under ZeRO-2 a buffer through which new weights come back
        host, state = state + share * (1 if strategy.stage == 3 else 2), 0.0
    if strategy.param_device != "none":
        host, held = host + share, held - share
    if "nvme" in (strategy.optimizer_device, strategy.param_device):
        host, disk = share, host - share
    return Memory(
        held, gradients, state, activations, logits, held + state + moving, host, disk, saving
    )


def live_bytes(config: Config, vocab_size: int, micro: int, slices: bool, on_gpu: bool) -> Live:
    """What a forward and backward takes: blocks by runs of 1 and 2 of them on 1 and 2 rows, the loss as it is."""
    model, data, run = config.model, config.data, config.run
    alike = (
        data.seq_len,
        data.document_mask,
        run.precision,
        run.activation_checkpointing,
        slices,
        on_gpu,
    )
    (a, b), (c, d) = (
        [_run_fake(model, layers, vocab_size, rows, *alike) for rows in (1, 2)] for layers in (1, 2)
    )
    x, y = (
        model.layers - 1,
        micro - 1,
    )  # further layers and rows: each costs the same, whatever the others do
    activations, blocks = (
        a[n] + x * (c[n] - a[n]) + y * (b[n] - a[n]) + x * y * (d[n] - c[n] - b[n] + a[n])
        for n in (0, 2)
    )
    bare = _run_fake(model, 0, vocab_size, micro, *alike)
    return Live(activations, max(bare[1] - bare[0], 0.0), blocks, bare[3])


@lru_cache(maxsize=4096)
def _run_fake(
    config: ModelConfig,
    layers: int,
    vocab_size: int,
    rows: int,
    length: int,
    document_mask: bool,
    precision: str,
    activation_checkpointing: bool,
    slices: bool,
    on_gpu: bool,
) -> tuple[float, float, float, float]:
    """Bytes as the blocks have been run forward, and the most of the loss, the blocks' backward and the embedding's."""
    with FakeTensorMode():
        small = config.model_copy(update={"layers": layers})
        model = GPT(ModelSpec(small, vocab_size, length), activation_checkpointing)
        model.device_type = "cuda" if on_gpu else "cpu"
        for p in model.parameters():  # where a gradient goes is the strategy's, see memory()
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # type: ignore[no-untyped-call]
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        watch = MemoryCounter([*model.parameters(), *model.buffers()])

        def first_begins(block: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            inputs[0].register_hook(watch.next)  # type: ignore[no-untyped-call]  # the blocks' backward is over

        def last_ends(block: torch.nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            watch.next()
            out.register_hook(watch.next)  # type: ignore[no-untyped-call]  # and here the loss's is

        hooks = [model.blocks[0].register_forward_pre_hook(first_begins)] if layers else []
        hooks.append((model.blocks[-1] if layers else model.embed).register_forward_hook(last_ends))
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        # Under ZeRO-3 the runtime keeps no cast weights beside those that the backward needs.
        cast = torch.autocast("cpu", kind, enabled=kind != torch.float32, cache_enabled=not slices)
        with watch, cast:
            loss = model(
                tokens,
                tokens,
                dropout_keys_B=tokens[:, 0] if config.dropout else None,
                segments_BT=tokens if document_mask else None,
            )
            for hook in hooks:  # recomputing a block would call them again
                hook.remove()
            with torch.autocast("cpu", enabled=False):
                loss.backward()
    return watch.left[0], watch.seen[1], watch.seen[2] if layers else 0.0, watch.most


class MemoryCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that come to be inside, until they go."""

    def __init__(self, known: list[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.seen: list[int] = []  # the most between calls of next(), and what was there at each
        self.left: list[int] = []
        storages = [tensor.untyped_storage() for tensor in known]
        self.known: dict[int, Any] = {id(storage): storage for storage in storages}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, Tensor)
                and id(storage := tensor.untyped_storage()) not in self.known
            ):
                self.known[id(storage)] = None
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.pop(key, None)
        self.now -= size

    def next(self, *_: Any) -> None:
        """A new stretch begins."""
        self.seen.append(self.most)
        self.left.append(self.now)
        self.most = self.now


# --- what a run takes


def strategies(world: int) -> dict[str, Strategy]:
    """Those of launch/ that so many processes can have, cheapest first."""
    found = {path.stem: choose_strategy(path.stem) for path in LAUNCH_FILES.glob("*.yaml")}
    del found["ddp" if world == 1 else "single"]
    devices = ("none", "cpu", "nvme")
    return dict(
        sorted(
            found.items(), key=lambda item: (item[1].stage, devices.index(item[1].optimizer_device))
        )
    )


def needed(figures: Memory, cluster: Cluster) -> float:
    """What must fit into a device; a CPU's memory also holds what is offloaded or on its way to disk."""
    return figures.peak + (0.0 if cluster.on_gpu else figures.host + figures.saving)


def largest_micro_batch(
    config: Config, strategy: Strategy, cluster: Cluster, vocab_size: int
) -> int:
    """The largest micro-batch that fits, 0 if none does; at most a process's whole share of the global batch."""

    def is_too_large(micro: int) -> bool:
        tried = changed(config, "data", micro_batch=micro)
        figures = memory(tried, strategy, cluster.world, vocab_size, cluster.on_gpu)
        return needed(figures, cluster) > cluster.room

    return bisect_left(
        range(1, batch_layout(config, cluster.world).share + 1), True, key=is_too_large
    )


def changed(config: Config, section: str, **fields: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})


def fit(config: Config, vocab_size: int, cluster: Cluster) -> dict[str, dict[str, Any]]:
    """For each strategy what a process holds, whether that fits and with which micro-batch; or why it is refused."""
    rows: dict[str, dict[str, Any]] = {}
    for name, strategy in strategies(cluster.world).items():
        try:
            if strategy.stage:
                refuse_combinations(strategy, config)
        except UserError as error:
            rows[name] = {"refused": str(error)}
            continue
        figures = memory(config, strategy, cluster.world, vocab_size, cluster.on_gpu)
        takes, most = (
            needed(figures, cluster),
            largest_micro_batch(config, strategy, cluster, vocab_size),
        )
        rows[name] = {
            **asdict(figures),
            "needed": takes,
            "fits": takes <= cluster.room,
            "largest_micro_batch": most,
        }
    return rows


def estimate(
    config: Config, vocab_size: int, launch: str | None, cluster: Cluster, mfu: float
) -> dict[str, Any]:
    """All figures, as --json prints them: bytes, seconds and counts, unrounded."""
    layout, steps, world = batch_layout(config, cluster.world), steps_of(config), cluster.world
    asked = choose_strategy(launch or next(iter(strategies(world)))).name(
        world
    )  # refuses an unknown name
    rows = fit(config, vocab_size, cluster)
    flops, tokens = (
        flops_per_token(config.model_spec(vocab_size)),
        steps * layout.tokens_per_step,
    )
    rate = mfu * cluster.peak() * world / flops
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
        "overhead": OVERHEAD if cluster.on_gpu else 0.0,
        "strategies": rows,
        "asked": asked,
        "mfu": mfu,
        "tokens_per_second": rate,
        "seconds": seconds,
        "kilowatt_hours": GPUS[cluster.kind].watts * world * seconds / 3.6e6,
        "checkpoint": checkpoint_bytes(config, vocab_size),
        "checkpoints_kept": checkpoints_kept(config, steps),
        "advice": advice(config, vocab_size, cluster, rows, asked),
    }


def advice(
    config: Config, vocab_size: int, cluster: Cluster, rows: dict[str, Any], asked: str
) -> list[str]:
    """Whether what was asked for fits; if not, what would."""
    own = rows[asked]
    if "refused" in own:
        return [own["refused"]]
    if own["fits"]:
        return [f"{asked} fits"]
    would = []
    if own["largest_micro_batch"]:
        would.append(f"--data.micro_batch {own['largest_micro_batch']}")
    spared = changed(config, "run", activation_checkpointing=True)
    if spared != config and (
        most := largest_micro_batch(spared, strategies(cluster.world)[asked], cluster, vocab_size)
    ):
        would.append(f"--run.activation_checkpointing true, micro-batches up to {most}")
    would += [
        f"--launch {name}, micro-batches up to {row['largest_micro_batch']}"
        for name, row in rows.items()
        if name != asked and row.get("largest_micro_batch")
    ]
    bigger = [
        kind
        for kind in GPUS
        if "cpu" not in (kind, cluster.kind) and own["needed"] <= Cluster(kind).room
    ]
    would += [f"--gpu {' or '.join(bigger)}"] if bigger else []
    said = f"{asked} does not fit: {_gb(own['needed'])} GB of {_gb(cluster.room)} GB;"
    return (
        [f"{said} what would:", *would]
        if would
        else [f"{said} nothing here would; more GPUs might"]
    )


def describe(figures: dict[str, Any], source: str) -> str:
    """One page. GB are 10^9 bytes."""
    f, columns = figures, [field.name for field in fields(Memory)]
    overhead = (
        f" beside {_gb(f['overhead'])} GB assumed for CUDA, NCCL and fragmentation"
        if f["overhead"]
        else ""
    )
    energy = (
        f"{f['kilowatt_hours']:,.0f} kWh at the GPUs' full power, " if f["kilowatt_hours"] else ""
    )
    lines = [
        f"{source}: {f['parameters']:,} parameters, {shorten(f['flops_per_token'])} FLOP a token; {f['steps']:,} steps,"
        f" {shorten(f['tokens'])} tokens, {f['flops']:.3g} FLOP",
        f"{f['nodes'] * f['gpus_per_node']} x {f['gpu']}, {f['nodes']} node(s) of {f['gpus_per_node']};"
        f" {_gb(f['room'])} GB for each process{overhead}; micro-batch {f['micro_batch']}, {f['accumulation']} backward"
        " passes a step",
        "",
        f"{'GB a process':15}" + "".join(f"{name:>12}" for name in (*columns, "micro-batch")),
    ]
    for name, row in f["strategies"].items():
        lines.append(f"{'*' if name == f['asked'] else ' '} {name:13}")
        if "refused" in row:
            lines[-1] += f"{'refused for this optimizer or precision':>40}"
            continue
        most = f"<= {row['largest_micro_batch']}" if row["largest_micro_batch"] else "none fits"
        lines[-1] += "".join(f"{_gb(row[column]):>12}" for column in columns) + f"{most:>12}"
    lines += [
        "",
        *f["advice"],
        f"at an MFU of {f['mfu']:g} (--mfu; a guess until measured): {shorten(f['tokens_per_second'])} tokens/s,"
        f" {f['seconds'] / 86400:,.2f} days, {energy}a checkpoint {_gb(f['checkpoint'])} GB, at most"
        f" {f['checkpoints_kept']} on disk: {_gb(f['checkpoint'] * f['checkpoints_kept'])} GB",
    ]
    if f["gpu"] == "cpu":
        lines.append(
            "glibc may keep much freed memory on top; MALLOC_MMAP_THRESHOLD_=1048576 makes it give that back"
        )
    return "\n".join(lines)


def table(cluster: Cluster) -> str:
    """Markdown: peak GB of a process and the largest micro-batch, of each shipped recipe under each strategy."""
    names = list(strategies(cluster.world))
    lines = [
        "| recipe | parameters | micro-batch | " + " | ".join(names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for path in sorted(CONFIGS.glob("*.yaml")):
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
            most = row.get("largest_micro_batch")
            cells.append(
                "refused"
                if "refused" in row
                else f"{_gb(row['needed'])}, {f'<= {most}' if most else 'none'}"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gb(number: float) -> str:
    return f"{number / 1e9:.3g}" if number < 1e11 else f"{number / 1e9:,.0f}"


if __name__ == "__main__":
    run_entry(main)
