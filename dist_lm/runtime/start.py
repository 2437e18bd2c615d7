"""runtime.start."""

import hashlib
import os
import re
import secrets
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LoggerType, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from dist_lm import __version__
from dist_lm.config import Config, batch_layout
from dist_lm.errors import DataError, RetryableError, SecurityError, UserError, did_you_mean
from dist_lm.outcome import Attempt
from dist_lm.runtime import zero
from dist_lm.runtime.watchdog import Watchdog
from dist_lm.runtime.world import Runtime


def hold_folder(runtime: Runtime) -> None:
    """From here until its ending is recorded, the run folder is this run's. All ranks."""
    lock = runtime.attempt.lock
    text = runtime.on_main(lambda: lock.take(runtime.say))
    runtime.together(lambda: lock.see(text))


def start(
    config: Config,
    launch: str | None = None,
    attempt: Attempt | None = None,
    examining: bool = False,
) -> Runtime:
    """Join the other processes, check that they are the ones asked for and see the same as we do. All ranks.

    `launch` names the strategy where accelerate did not start the ranks: a file of launch/. The doctor is `examining`:
    what differs between ranks, and who is missing, is for him to say.
    """
    attempt = attempt or Attempt(Path(config.run.dir))
    refuse_silent_single()
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == "1":
        raise SecurityError(
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 lets torch.load run code; rule: unset it"
        )
    _check_trackers(config.run.trackers)
    strategy = zero.choose_strategy(launch)
    no_gpu, local_world = (
        not torch.cuda.is_available(),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    threads = max(1, len(os.sched_getaffinity(0)) // local_world)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # or Accelerate chooses, with a warning
    process_group = InitProcessGroupKwargs(timeout=timedelta(seconds=config.run.timeout_seconds))
    settings, plugin = None, None
    if strategy.stage:
        if "LOCAL_RANK" not in os.environ:
            raise UserError(
                f"--launch {launch} needs ranks that a launcher started; nearest: torchrun --nproc-per-node 1"
                f" dist_lm/train.py --launch {launch} ..."
            )
        zero.refuse_combinations(strategy, config)
        settings = zero.engine_config(
            strategy, config, batch_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
        )
        plugin = zero.plugin(settings)
        process_group.backend = "gloo" if no_gpu else "nccl"
    # One bucket on CPU: gloo overlaps nothing, and one large sum beats several small ones.
    ddp = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True, broadcast_buffers=False, bucket_cap_mb=1024 if no_gpu else 25
    )
    try:
        accelerator = Accelerator(
            cpu=no_gpu and plugin is None,  # cpu=True would silently drop DeepSpeed for DDP
            mixed_precision="no",  # autocast is ours, see autocast(); this also overrides ACCELERATE_MIXED_PRECISION
            gradient_accumulation_steps=settings["gradient_accumulation_steps"] if settings else 1,
            deepspeed_plugin=plugin,
            kwargs_handlers=[ddp, process_group],
            log_with=list(config.run.trackers) or None,
            project_dir=os.path.join(config.run.dir, "tensorboard"),
        )
    except dist.DistError as error:
        raise RetryableError(_why_not_joined(error, config.run.timeout_seconds)) from error
    runtime = Runtime(accelerator, config, strategy, settings, attempt)
    _prove_world(runtime)
    if not examining:
        _refuse_different(runtime, config)
    _use_host(runtime, threads, local_world)
    if strategy.nvme_path != "none":
        runtime.say(f"offloading to files in {strategy.nvme_path}")
    if runtime.world_size > 1 and not examining:
        _watch_over(runtime, config)
    return runtime


def _use_host(runtime: Runtime, threads: int, local_world: int) -> None:
    """Cores and memory on a CPU; on GPUs a word about those that stay idle."""
    if not torch.cuda.is_available():
        torch.set_num_threads(
            threads
        )  # launchers set OMP_NUM_THREADS=1; share the cores out instead
        # glibc learns from what is freed: from here on it keeps blocks of up to 32 MB for the next step, instead of
        # handing their pages back and fetching them anew each time.
        torch.empty(2**25 - 2**16, dtype=torch.uint8)
    elif torch.cuda.device_count() > local_world:
        runtime.say(
            f"warning: {torch.cuda.device_count()} GPUs here and {local_world} process(es): some stay idle; start one"
            " process per GPU, e.g. with torchrun --nproc_per_node"
        )


def _check_trackers(names: tuple[str, ...]) -> None:
    """Accelerate leaves out a tracker that is not installed without a word."""
    known = [str(name) for name in LoggerType.list() if name != "all"]
    for name in names:
        if name not in known:
            raise UserError(
                f"run.trackers={name} must be one of {', '.join(known)}{did_you_mean(name, known)}"
            )
        if name not in [str(tracker) for tracker in get_available_trackers()]:
            raise UserError(
                f"run.trackers={name} is not installed; rule: pip install {name}; nearest: tensorboard"
            )


def refuse_silent_single() -> None:
    """Accelerate without a config file starts ONE process on CPU whatever --num_processes says."""
    if (
        "MASTER_ADDR" in os.environ
        and "WORLD_SIZE" not in os.environ
        and "ACCELERATE_MIXED_PRECISION" in os.environ
    ):
        raise UserError(
            "accelerate started one process although more were asked for (without a GPU it ignores --num_processes);"
            " use: accelerate launch --config_file launch/ddp.yaml --num_processes N dist_lm/train.py"
        )


def _prove_world(runtime: Runtime) -> None:
    """Silent degradation is the worst failure of this stack: count the ranks by an exchange."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if runtime.world_size != asked:
        raise UserError(f"{asked} processes were started but this one sees {runtime.world_size}")
    ranks = runtime.sum(torch.tensor([1.0, runtime.rank], device=runtime.device)).tolist()
    assert ranks == [asked, asked * (asked - 1) / 2], (
        f"the exchange between {asked} ranks is broken: {ranks}"
    )


def _refuse_different(runtime: Runtime, config: Config) -> None:
    """All ranks have the same settings, code and data. All ranks."""
    seen = runtime.channel.gather([socket.gethostname(), _what_must_be_equal(config)])
    first_host, first = seen[0]
    for rank, (host, own) in enumerate(seen):
        for name in first:
            if (
                own[name] != first[name]
            ):  # settings come first: with the same ones, the names are the same too
                kind_of_error = DataError if name.startswith("data.") else UserError
                raise kind_of_error(
                    f"rank {rank} on {host} has {name} {own[name]}, rank 0 on {first_host} has {first[name]};"
                    " rule: the same on every node"
                )


def _what_must_be_equal(config: Config) -> dict[str, str]:
    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parents[1].rglob("*.py")))
    inputs = [
        spec.input for spec in {**config.data.named_sources(), **config.data.validation}.values()
    ]
    return {
        "settings (by hash)": _short_hash(config.to_yaml().encode()),
        "dist_lm": f"{__version__} ({_short_hash(code)})",
        "torch": torch.__version__,
        **{f"data.input={path}": _as_seen_here(Path(path)) for path in inputs},
    }


def _as_seen_here(path: Path) -> str:
    """A hash of names and sizes."""
    if not path.exists():
        return "(absent)"
    listed = (
        sorted((f.name, f.stat().st_size) for f in path.iterdir())
        if path.is_dir()
        else path.stat().st_size
    )
    return _short_hash(str(listed).encode())


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _why_not_joined(error: Exception, seconds: float) -> str:
    """What the store's own message of many lines means."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        return f"port {where} is in use by another process; rule: a free one; leave it out to have one chosen"
    joined = re.search(r"(\d+)/(\d+) clients joined", str(error))
    who = f"only {joined[1]} of {joined[2]} processes" if joined else "not all processes"
    return f"{who} met at {where} within {seconds:g} s; is every node up, and can it reach that host? ({error})"


def _watch_over(runtime: Runtime, config: Config) -> None:
    """From here on a rank that vanishes is named. All ranks."""
    name = runtime.channel.gather(secrets.token_hex(8))[0]
    runtime.watch = Watchdog(
        runtime.rank,
        runtime.world_size,
        name,
        config.run.timeout_seconds,
        lambda: runtime._sums,
        runtime.end_at_once,
    )
    runtime.barrier()
    runtime.watch.start()
