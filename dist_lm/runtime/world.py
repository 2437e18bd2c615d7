"""The only home of Accelerate, torch.distributed and, with zero.py, DeepSpeed: how a step is spread over processes.

`start()` finds out who we are and proves it with one exchange; `Runtime` wraps the model, makes `backward` and `update`
true under every strategy, and carries what ranks must agree on. Nothing is ever unpickled from a peer: agreements are
tensors, and JSON in byte tensors. Methods marked "all ranks" are collectives.
"""

import contextlib
import gc
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LoggerType, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from dist_lm import __version__, metrics
from dist_lm.checkpoint.save import Held
from dist_lm.config import Config, UserError, did_you_mean, plan
from dist_lm.optim import Muon, create_state
from dist_lm.outcome import CODES, Attempt
from dist_lm.runtime import zero
from dist_lm.runtime.watchdog import Watch
from dist_lm.runtime.zero import Strategy

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST_MESSAGE = 64 * 2**20  # bytes of JSON a peer may send


class Channel:
    """Messages between ranks over one process group: JSON and tensors, never anything that is unpickled."""

    def __init__(self, rank: int, world_size: int, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.group: Any = None  # None: the group of training

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. All ranks."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(message)], device=self.device), group=self.group)
        largest = int(max(int(size) for size in sizes))
        assert largest <= _LARGEST_MESSAGE, f"a rank sends {largest} bytes of JSON"
        padded = torch.zeros(largest, dtype=torch.uint8, device=self.device)
        padded[: len(message)] = message
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=self.group)
        return [json.loads(bytes(g[: int(n)].cpu().numpy())) for g, n in zip(gathered, sizes, strict=True)]

    def send(self, tensor: Tensor, to: int, tag: int) -> Any:
        """Start sending; the tensor must stay as it is until wait() on what this returns."""
        return dist.isend(tensor, to, group=self.group, tag=tag)

    def receive(self, tensor: Tensor, sender: int, tag: int) -> None:
        dist.recv(tensor, sender, group=self.group, tag=tag)

    def exchange(self, parts: list[Tensor], lengths: list[int]) -> list[Tensor]:
        """Give parts[r] to rank r; what came from each rank, lengths[r] elements from rank r. All ranks."""
        received = parts[0].new_empty(sum(lengths))
        lengths_sent = [len(part) for part in parts]
        dist.all_to_all_single(received, torch.cat(parts), lengths, lengths_sent, group=self.group)
        return list(torch.split(received, lengths))


class Runtime:
    """Who this process is, and the few operations whose meaning depends on how many there are."""

    def __init__(
        self, accelerator: Accelerator, config: Config, strategy: Strategy, settings: dict[str, Any] | None,
        attempt: Attempt,
    ):  # fmt: skip
        self.accelerator = accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.is_main = self.rank == 0
        self.strategy = strategy.name(self.world_size)
        self.precision = precision = config.run.precision
        self.settings = settings  # DeepSpeed's, or None
        self.engine: zero.Engine | None = None
        self.channel = Channel(self.rank, self.world_size, self.device)
        # Groups of their own: messages of checkpoints and of data never mix with training's.
        self.background, self.reading = (Channel(self.rank, self.world_size, torch.device("cpu")) for _ in range(2))
        for channel in (self.background, self.reading) if self.world_size > 1 else ():
            channel.group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        # Accelerate refuses fp16 on CPU; torch's own scaler works on both.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.attempt, self.stop = attempt, attempt.stop
        self.watch: Watch | None = None
        self._sums = 0  # agreements entered, by which a rank that hangs is told from the others

    # --- the model and one step

    def construction(self) -> contextlib.AbstractContextManager[Any]:
        """Surrounds the building of the model, so that ZeRO-3 never has a whole one anywhere."""
        return zero.construction(self.settings)

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, shapes: Mapping[str, tuple[int, ...]], config: Config
    ) -> nn.Module:
        """Move, compile and wrap the model; the optimizer keeps working on the same parameters. All ranks.

        The optimizer's state is there afterwards, all zero, and the weights are still those the model was built with.
        """
        self.bare, self.optimizer, self.ema_decay = model, optimizer, config.run.ema
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if self.settings is None:
            model.to(self.device)
        for table in model.buffers():  # DeepSpeed leaves them where a model built in slices has them
            table.data = table.data.to(self.device)
        if config.run.compile:
            model.compile()  # in place, so that parameter names stay
        with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, older ones know no other name
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            if self.settings is None:
                self.model: Any = self.accelerator.prepare_model(model)
            else:
                self.model, _ = self.accelerator.prepare(model, optimizer)
                self.engine = zero.Engine(self.model, self.settings)
        if self.engine and isinstance(optimizer, Muon):
            self._slice(optimizer, shapes)
        for _ in self._opened():
            create_state(optimizer)
            for tensor in self._tensors() if self.ema_decay else ():
                optimizer.state[tensor]["ema"] = torch.zeros_like(tensor)
        return self.model  # type: ignore[no-any-return]

    def _slice(self, optimizer: Muon, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Tell Muon which rank holds what of its matrices, and how to pass them around. All ranks."""
        assert self.engine
        lengths = {name: [0] * self.world_size for name in shapes}
        for rank, held in enumerate(self.channel.gather([[h.name, h.stop - h.start] for h in self.held()])):
            for name, length in held:
                lengths[name][rank] = length
        names = {parameter: name for name, parameter in self.bare.named_parameters()}
        optimizer.rank, optimizer.slices = self.rank, self.engine.slices(shapes, names, lengths)
        optimizer.exchange = self.channel.exchange

    def _opened(self) -> Iterable[Any]:
        """Turns in which the optimizer's groups can be worked on: one, or one for each piece of ZeRO-3. All ranks."""
        return self.engine.opened() if self.engine else [None]

    def _tensors(self) -> list[Tensor]:
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"]]

    def held(self) -> Iterator[Held]:
        """What this rank's optimizer works on, to be used one by one: weights and what the optimizer remembers."""
        if self.engine:
            yield from self.engine.held(self.bare.named_parameters())
            return
        for name, p in self.bare.named_parameters():
            yield Held.part(name, 0, p.numel(), p, self.optimizer.state[p])

    def spread(self) -> None:
        """After a change of what is held: the model computes with it on every rank. All ranks."""
        if self.engine:
            self.engine.spread()

    def start_average(self) -> None:
        """The moving average of the weights begins where they are."""
        for h in self.held() if self.ema_decay else ():
            h.state["ema"].copy_(h.weight)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model computes with the moving average of its weights. All ranks."""
        self._swap_average()
        yield
        self._swap_average()

    @torch.no_grad()
    def _swap_average(self) -> None:
        for h in self.held():
            weight = h.weight.clone()
            h.weight.copy_(h.state["ema"])
            h.state["ema"].copy_(weight)
        self.spread()

    def warm_up(self, loss_of_nothing: Callable[[], Tensor]) -> None:
        """Two backward passes of a zero loss. All ranks.

        DDP reorders its gradient buckets after the first backward, which changes the order of sums in a ring of more
        than two ranks; having that behind us before step 1 makes a resumed run bit-identical to an undisturbed one.
        """
        if self.world_size > 1 and not self.engine:
            for _ in range(2):
                with self.micro_step(last=True):
                    self.backward(loss_of_nothing())
            self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Surrounds forward and backward of one micro-batch: autocast, and gradient exchange only in the last one."""
        self._last = last
        exchange = last or self.engine is not None  # ZeRO is told in backward()
        quiet = contextlib.nullcontext() if exchange else self.accelerator.no_sync(self.model)
        with quiet, self.autocast():
            yield

    def autocast(self) -> Any:
        """bf16 and fp16 mean the same under every strategy: fp32 weights and gradients, autocast arithmetic."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        # Under ZeRO-3 the cache would keep a whole bf16 copy of weights that are held in slices.
        sliced = self.engine is not None and self.engine.stage == 3
        return torch.autocast(self.device.type, dtype=_AUTOCAST[self.precision], cache_enabled=not sliced)

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradient. Averaged over ranks later, so the loss is multiplied by their number first."""
        with torch.autocast(self.device.type, enabled=False):
            if self.engine:
                self.engine.backward(loss * self.world_size, self._last)
            else:
                self.accelerator.backward(self.scaler.scale(loss * self.world_size))

    def update(self, clip: float) -> Tensor:
        """Clip by the global gradient norm, move the weights, forget the gradients; the norm before clipping."""
        norm = self.engine.step() if self.engine else self._step(clip)
        for _ in self._opened() if self.ema_decay else ():
            tensors = self._tensors()
            averages = [self.optimizer.state[tensor]["ema"] for tensor in tensors]
            torch._foreach_lerp_(averages, [tensor.data for tensor in tensors], 1 - self.ema_decay)
        return norm

    def _step(self, clip: float) -> Tensor:
        self.scaler.unscale_(self.optimizer) if self.scaler.is_enabled() else None
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip or float("inf"), foreach=self.device.type == "cuda")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    # --- agreements

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up over ranks, in place. All ranks."""
        self._sums += 1
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def with_stop(self, number: int) -> Tensor:
        """A number of this rank, whether it was told to stop, whether it lost the folder: for the ranks to add up."""
        is_lost = bool(self.attempt.lock.lost)
        return torch.tensor([number, self.stop.requested, is_lost], dtype=torch.float64, device=self.device)

    def refuse_lost_folder(self, is_lost: float) -> None:
        """Raise if rank 0 is no longer the one that holds the run folder. All ranks, with what they agreed on."""
        if is_lost:
            raise UserError(
                f"run.dir={self.attempt.folder} is no longer this run's ({self.attempt.lock.look()}); rule: one run a"
                " folder; this run ends and writes nothing more there"
            )

    def barrier(self) -> None:
        self.sum(torch.zeros(1, device=self.device))

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Rank 0 does the work, however long it takes; every rank gets its JSON result or its UserError. All ranks.

        Rank 0 works in a thread while all ranks keep reducing a flag, so that no collective waits past the timeout.
        """
        outcome: dict[str, Any] = {}

        def run() -> None:
            try:
                outcome["result"] = work()
            except UserError as error:
                outcome["error"], outcome["code"] = str(error), error.code
            except BaseException as error:
                outcome["error"], outcome["code"] = f"{type(error).__name__}: {error}", CODES["retryable"]
                raise

        worker = threading.Thread(target=run, daemon=True) if self.is_main else None
        if worker:
            worker.start()
        while True:
            if worker:
                worker.join(1.0)
            busy, stop, is_lost = self.sum(self.with_stop(bool(worker and worker.is_alive()))).tolist()
            self.refuse_lost_folder(is_lost)
            if not busy:
                break
            if stop:
                why = self.stop.reason or "another rank was told to stop"
                raise UserError(f"stopped during start-up: {why}; the same command goes on", CODES["preempted"])
        said = self.channel.gather(outcome)[0]
        if "error" in said:
            raise UserError(said["error"], said["code"])
        return said["result"]

    def together(self, work: Callable[[], Any]) -> Any:
        """Every rank does the work; if any refuses, all raise that rank's UserError. All ranks."""
        result, refusal = None, None
        try:
            result = work()
        except UserError as error:
            refusal = (str(error), error.code)
        for rank, said in enumerate(self.channel.gather(refusal)):
            if said:
                raise UserError(said[0] if rank == 0 else f"rank {rank}: {said[0]}", said[1])
        return result

    # --- the world outside

    def say(self, text: str) -> None:
        """One line from rank 0, on stderr: standard output belongs to what an entry prints as its result."""
        if self.is_main:
            metrics.say(text, channel="stderr")

    def profiler(self, steps: int, trace: Path) -> Any:
        """A torch profiler that writes a trace of `steps` steps, after two of warm-up; inert for 0. Rank 0 writes."""

        def write(profile: Any) -> None:
            if self.is_main:
                profile.export_chrome_trace(str(trace))

        if not steps:
            return SimpleNamespace(step=lambda: None, stop=lambda: None)
        schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
        profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=write)
        profiler.start()
        return profiler

    def start_trackers(self, config: Config) -> None:
        """TensorBoard and others through Accelerate, which works on rank 0 alone. A failing one never stops a run."""
        flat = {key: str(value) for key, value in config.flat().items()}  # TensorBoard refuses nested values
        try:
            self.accelerator.init_trackers(os.path.basename(os.path.normpath(config.run.dir)), config=flat)
        except Exception as error:
            self.say(f"warning: tracking is off, the run goes on: {type(error).__name__}: {error}")

    def track(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)

    def give_up(self, error: Exception) -> None:
        """An error of this rank alone: say who is to blame, and end. One process raises it instead."""
        if self.watch:
            traceback.print_exc()
            self.end_at_once(self.watch.explain(error))

    def end_at_once(self, reason: str) -> None:
        """Others may be gone, so nothing waits for them: neither collectives nor destructors."""

        def record() -> None:
            if not self.is_main:
                time.sleep(2)  # rank 0 says it if it can
            if self.is_main or not self.attempt.is_recorded:
                self.attempt.record("retryable", reason)
            self.attempt.lock.release()

        print(f"error: rank {self.rank} on {socket.gethostname()} ends: {reason}", file=sys.stderr, flush=True)
        recorder = threading.Thread(target=record, daemon=True)
        recorder.start()
        recorder.join(10)  # the run folder's host may be what is gone
        os._exit(CODES["retryable"])

    def close(self) -> None:
        """Leave together: a rank that exits early aborts peers that still work. All ranks."""
        if self.watch:
            self.watch.close()
        last_sum = self.sum(torch.zeros(1, device=self.device))
        # gloo's threads end only with the last reference to the group, which DDP's wrapper holds. One that frees a
        # tensor while Python shuts down aborts the process ("terminate called without an active exception").
        for name in ("model", "engine", "bare"):
            self.__dict__.pop(name, None)
        self.background.group = self.reading.group = None
        self.accelerator.free_memory()
        gc.collect()
        with contextlib.suppress(Exception):  # whatever a tracker does must never stop a run
            self.accelerator.end_training()  # also destroys the process group
        if dist.is_initialized():
            dist.destroy_process_group()
        del last_sum  # kept until no thread can hold it


def hold_folder(runtime: Runtime) -> None:
    """From here until its ending is recorded, the run folder is this run's. All ranks."""
    lock = runtime.attempt.lock
    text = runtime.on_main(lambda: lock.take(runtime.say))
    runtime.together(lambda: lock.see(text))


def start(
    config: Config, launch: str | None = None, attempt: Attempt | None = None, examining: bool = False
) -> Runtime:
    """Join the other processes, check that they are the ones asked for and see the same as we do. All ranks.

    `launch` names the strategy where accelerate did not start the ranks: a file of launch/. The doctor is `examining`:
    what differs between ranks, and who is missing, is for him to say.
    """
    attempt = attempt or Attempt(Path(config.run.dir))
    refuse_silent_single()
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == "1":
        raise UserError("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 lets torch.load run code; rule: unset it", 77)
    _check_trackers(config.run.trackers)
    strategy = zero.choose_strategy(launch)
    no_gpu, local_world = not torch.cuda.is_available(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
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
        settings = zero.engine_config(strategy, config, plan(config, int(os.environ.get("WORLD_SIZE", "1"))))
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
        raise UserError(_why_not_joined(error, config.run.timeout_seconds), CODES["retryable"]) from error
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
        torch.set_num_threads(threads)  # launchers set OMP_NUM_THREADS=1; share the cores out instead
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
            raise UserError(f"run.trackers={name} must be one of {', '.join(known)}{did_you_mean(name, known)}")
        if name not in [str(tracker) for tracker in get_available_trackers()]:
            raise UserError(f"run.trackers={name} is not installed; rule: pip install {name}; nearest: tensorboard")


def refuse_silent_single() -> None:
    """Accelerate without a config file starts ONE process on CPU whatever --num_processes says."""
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
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
    assert ranks == [asked, asked * (asked - 1) / 2], f"the exchange between {asked} ranks is broken: {ranks}"


def _refuse_different(runtime: Runtime, config: Config) -> None:
    """All ranks have the same settings, code and data. All ranks."""
    seen = runtime.channel.gather([socket.gethostname(), _what_must_be_equal(config)])
    first_host, first = seen[0]
    for rank, (host, own) in enumerate(seen):
        for name in first:
            if own[name] != first[name]:  # settings come first: with the same ones, the names are the same too
                raise UserError(
                    f"rank {rank} on {host} has {name} {own[name]}, rank 0 on {first_host} has {first[name]};"
                    " rule: the same on every node", 65 if name.startswith("data.") else 2
                )  # fmt: skip


def _what_must_be_equal(config: Config) -> dict[str, str]:
    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parents[1].rglob("*.py")))
    inputs = [spec.input for spec in {**config.data.named_sources(), **config.data.validation}.values()]
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
    listed = sorted((f.name, f.stat().st_size) for f in path.iterdir()) if path.is_dir() else path.stat().st_size
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
    runtime.watch = Watch(
        runtime.rank, runtime.world_size, name, config.run.timeout_seconds, lambda: runtime._sums, runtime.end_at_once
    )
    runtime.barrier()
    runtime.watch.start()
