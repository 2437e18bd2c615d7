"""Start a process as one rank of a run.

start() first checks what one process can check alone. Then it meets the other ranks and compares.
The worst failure is a silent one: one process where eight were asked for, or ranks with different
code or data. So start() proves the world with an exchange, and refuses whatever differs.
"""

import hashlib
import math
import os
import re
import resource
import secrets
import socket
import stat
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LoggerType, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from dist_lm.config import Config, batch_layout
from dist_lm.console import count, warn
from dist_lm.environment import rank_here
from dist_lm.errors import DataError, RetryableError, SecurityError, UserError
from dist_lm.launcher import end_stopped_ranks
from dist_lm.model.init import parameter_shapes
from dist_lm.nearest import did_you_mean
from dist_lm.outcome import Attempt
from dist_lm.revision import version_and_hash
from dist_lm.runtime.device import prepare_device
from dist_lm.runtime.engine import Engine, ReplicatedEngine
from dist_lm.runtime.strategy import Strategy, choose_strategy, refuse_combinations
from dist_lm.runtime.watchdog import Watchdog, dump_stacks
from dist_lm.runtime.world import Runtime
from dist_lm.runtime.zero import ZeroEngine, deepspeed_plugin, zero_settings

_BUCKET_MB_ON_GPU = 25  # torch's own choice
# Of models of 10^9 parameters and more: across machines each sum has a latency, which 25 MB do not
# hide.
_BUCKET_MB_OF_LARGE_MODELS = 100
# One bucket: gloo overlaps nothing, and one large sum beats several small ones.
_BUCKET_MB_ON_CPU = 1024
_LARGEST_MESH = 64  # ranks that gloo connects each with each other
_RECORDED_COLLECTIVES = "2000"  # that NCCL's flight recorder remembers
_LARGEST_KEPT_BLOCK = 2**25 - 2**16  # bytes; just below the 32 MB that glibc learns at most


def start(
    config: Config,
    launch: str | None = None,
    attempt: Attempt | None = None,
    examining: bool = False,
) -> Runtime:
    """Join the other processes, and check that they are as many and see the same. All ranks.

    `launch` names the strategy where accelerate did not start the ranks: a file of launch/. The
    doctor sets `examining`, because it reports itself what differs between ranks and which are
    missing.
    """
    refuse_silent_single()
    _refuse_unsafe_loading()
    _refuse_missing_trackers(config.run.trackers)
    strategy = choose_strategy(launch)
    prepare_device(config)

    settings = None
    if strategy.stage:
        settings = _settings_of_zero(config, strategy, launch)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, len(os.sched_getaffinity(0)) // local_world)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # or Accelerate chooses, with a warning
    accelerator = _meet(config, settings)
    engine: Engine
    if settings:
        engine = ZeroEngine(accelerator, config, strategy, settings)
    else:
        engine = ReplicatedEngine(accelerator, config, strategy)
    runtime = Runtime(accelerator, engine, attempt or Attempt(Path(config.run.dir)))

    _prove_world(runtime)
    if not examining:
        _refuse_different(runtime, config)
    _use_host(runtime, threads, local_world)
    if strategy.nvme_path != "none":
        runtime.say(f"offloading to files in {strategy.nvme_path}")
    if runtime.world_size > 1 and not examining:
        _start_watchdog(runtime, config)
    runtime.attempt.has_met.set()
    return runtime


def hold_folder(runtime: Runtime) -> None:
    """From here until its ending is recorded, the run folder is this run's. All ranks."""
    lock = runtime.attempt.lock
    text = runtime.on_main(lambda: lock.take(runtime.say))
    runtime.together(lambda: lock.see(text))
    if runtime.is_main:
        _warn_of_strangers(lock.path.parent)


def _warn_of_strangers(folder: Path) -> None:
    """A folder that a group shares is normal, one that anybody may write into is not."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & stat.S_IWOTH:
        warn(
            f"run.dir={folder} may be written by anybody (mode {mode:o}), who can put another"
            f" checkpoint there; nearest: chmod o-w {folder}"
        )


# --- what one process can check alone


def refuse_silent_single() -> None:
    """Accelerate without a config file starts ONE process on CPU whatever --num_processes says."""
    if (
        "MASTER_ADDR" in os.environ
        and "WORLD_SIZE" not in os.environ
        and "ACCELERATE_MIXED_PRECISION" in os.environ
    ):
        raise UserError(
            "accelerate started one process although more were asked for (without a GPU it ignores"
            " --num_processes); use: accelerate launch --config_file launch/ddp.yaml"
            " --num_processes N dist_lm/train.py"
        )


def _refuse_unsafe_loading() -> None:
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    value = os.environ.get(name, "")
    if value.lower() not in ("", "0", "n", "no", "false"):
        raise SecurityError(f"{name}={value} lets torch.load run code; rule: unset it")


def _refuse_missing_trackers(names: tuple[str, ...]) -> None:
    """Accelerate leaves out a tracker that is not installed without a word."""
    known = [str(name) for name in LoggerType.list() if name != "all"]
    for name in names:
        if name not in known:
            raise UserError(
                f"run.trackers={name} must be one of {', '.join(known)}{did_you_mean(name, known)}"
            )
        if name not in [str(tracker) for tracker in get_available_trackers()]:
            raise UserError(
                f"run.trackers={name} is not installed; rule: pip install {name}; nearest:"
                " tensorboard"
            )


def _settings_of_zero(config: Config, strategy: Strategy, launch: str | None) -> dict[str, Any]:
    """DeepSpeed's settings. Refuses what ZeRO cannot do."""
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"--launch {launch} needs ranks that a launcher started; nearest: torchrun"
            f" --nproc-per-node 1 dist_lm/train.py --launch {launch} ..."
        )
    refuse_combinations(strategy, config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layout = batch_layout(config, world_size)
    return zero_settings(strategy, config, layout, on_gpu=torch.cuda.is_available())


# --- meeting the others


def _meet(config: Config, settings: dict[str, Any] | None) -> Accelerator:
    """Accelerate's object, which opens the process group. `settings` are DeepSpeed's. All ranks."""
    has_gpu = torch.cuda.is_available()
    _make_room_for_sockets()
    if has_gpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # NCCL's flight recorder, which dump_stacks() reads. Newer versions of torch have the second
        # name. It was not tested on several GPUs.
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", _RECORDED_COLLECTIVES)
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _RECORDED_COLLECTIVES)
    plugin = None
    accumulation = 1
    process_group = InitProcessGroupKwargs(timeout=timedelta(seconds=config.run.timeout_seconds))
    if settings:
        plugin = deepspeed_plugin(settings)
        accumulation = settings["gradient_accumulation_steps"]
        process_group.backend = "nccl" if has_gpu else "gloo"
    # gloo lets two ranks share a GPU, which NCCL refuses: benchmarks/gpu has them compared so.
    process_group.backend = os.environ.get("DIST_LM_BACKEND", process_group.backend)
    ddp = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        bucket_cap_mb=_bucket_mb(config, has_gpu),
    )
    try:
        return Accelerator(
            cpu=not has_gpu and plugin is None,  # cpu=True would silently drop DeepSpeed for DDP
            # Autocast is ours, see Engine.autocast(). This also overrides
            # ACCELERATE_MIXED_PRECISION.
            mixed_precision="no",
            gradient_accumulation_steps=accumulation,
            deepspeed_plugin=plugin,
            kwargs_handlers=[ddp, process_group],
            log_with=list(config.run.trackers) or None,
            project_dir=os.path.join(config.run.dir, "tensorboard"),
        )
    except dist.DistError as error:
        end_stopped_ranks()
        raise RetryableError(_why_not_met(error, config.run.timeout_seconds)) from error


def _make_room_for_sockets() -> None:
    """Allow as many open files as there may be, and let gloo connect only ranks that exchange.

    gloo connects every rank with every other in each of its groups, which is more sockets than most
    systems allow a process from some hundred ranks on. Few ranks stay connected: then each sees at
    once that another is gone.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if int(os.environ.get("WORLD_SIZE", "1")) > _LARGEST_MESH:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def _bucket_mb(config: Config, has_gpu: bool) -> int:
    """The size of DDP's buckets: the megabytes of gradients that it sums at once."""
    if not has_gpu:
        return _BUCKET_MB_ON_CPU
    # Without the embedding: the tokenizer, which decides its size, is not loaded yet.
    shapes = parameter_shapes(config.model_spec(vocab_size=1))
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return _BUCKET_MB_OF_LARGE_MODELS if parameters >= 10**9 else _BUCKET_MB_ON_GPU


def _why_not_met(error: Exception, seconds: float) -> str:
    """The meaning of the store's own message, which has many lines."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        return (
            f"port {where} is in use by another process; rule: a free one; leave it out to have one"
            " chosen"
        )
    joined = re.search(r"(\d+)/(\d+) clients joined", str(error))
    who = "not all processes"
    if joined:
        who = f"only {joined[1]} of {joined[2]} processes"
    return (
        f"{who} met at {where} within {seconds:g} s; is every node up, and can it reach that host?"
        f" ({error})"
    )


# --- what the ranks compare


def _prove_world(runtime: Runtime) -> None:
    """Count the ranks by an exchange. All ranks."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if runtime.world_size != asked:
        raise UserError(f"{asked} processes were started but this one sees {runtime.world_size}")
    ranks = runtime.sum(torch.tensor([1.0, runtime.rank], device=runtime.device)).tolist()
    assert ranks == [asked, asked * (asked - 1) / 2], (
        f"the exchange between {asked} ranks is broken: {ranks}"
    )


def _refuse_different(runtime: Runtime, config: Config) -> None:
    """All ranks must have the same settings, code and data. All ranks."""
    by_rank = runtime.channel.gather([socket.gethostname(), _what_must_be_equal(config)])
    first_host, first_facts = by_rank[0]
    for rank, (host, facts) in enumerate(by_rank):
        # Settings come first: where they are equal, the other names are equal too.
        for name in facts:
            if facts[name] != first_facts[name]:
                kind_of_error = DataError if name.startswith("data.") else UserError
                raise kind_of_error(
                    f"rank {rank} on {host} has {name} {facts[name]}, rank 0 on {first_host} has"
                    f" {first_facts[name]}; rule: the same on every node"
                )


def _what_must_be_equal(config: Config) -> dict[str, str]:
    """What is compared, by name. One rank of a node looks at the data for all of them."""
    facts = {
        "settings (by hash)": _short_hash(config.to_yaml()),
        "dist_lm": version_and_hash(),
        "torch": torch.__version__,
    }
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return facts
    sources = {**config.data.named_sources(), **config.data.validation}
    for source in sources.values():
        for one in source.inputs:
            facts[f"data.input={one}"] = _as_seen_here(Path(one))
    return facts


def _as_seen_here(path: Path) -> str:
    """A hash of the size of a file, or of names and sizes in a folder."""
    if not path.exists():
        return "(absent)"
    if path.is_dir():
        return _short_hash(str(sorted((file.name, file.stat().st_size) for file in path.iterdir())))
    return _short_hash(str(path.stat().st_size))


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# --- this host, and the watch over the others


def _use_host(runtime: Runtime, threads: int, local_world: int) -> None:
    """Set cores, and memory on a CPU. On GPUs, warn about those that stay idle."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu or runtime.engine.strategy.optimizer_device != "none":
        # Launchers set OMP_NUM_THREADS=1; the ranks share the cores instead. With offload the
        # optimizer works on them.
        torch.set_num_threads(threads)
    if not has_gpu:
        # glibc learns from what is freed: from here on it keeps blocks of up to 32 MB for the next
        # step, instead of giving their pages back and fetching them again each time.
        torch.empty(_LARGEST_KEPT_BLOCK, dtype=torch.uint8)
    elif torch.cuda.device_count() > local_world:
        processes = count(local_world, "process", "processes")
        runtime.say(
            f"warning: {torch.cuda.device_count()} GPUs here and {processes}: some"
            " stay idle; start one process per GPU, e.g. with torchrun --nproc_per_node"
        )


def _start_watchdog(runtime: Runtime, config: Config) -> None:
    """From here on a rank that vanishes is named. All ranks."""
    name = runtime.channel.gather(secrets.token_hex(8))[0]
    nccl_file = os.path.join(config.run.dir, f"nccl-rank-{runtime.rank}.json")
    runtime.watch = Watchdog(
        rank=runtime.rank,
        world_size=runtime.world_size,
        name=name,
        timeout=config.run.timeout_seconds,
        whereabouts=lambda: runtime.whereabouts,
        lost=runtime.end_at_once,
        dump=partial(dump_stacks, rank_here(runtime.rank), nccl_file),
        say=runtime.say,
    )
    runtime.barrier()
    runtime.watch.start()
