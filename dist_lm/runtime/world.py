"""The only home of Accelerate, torch.distributed and, with zero.py, DeepSpeed: how a step is spread over processes.

`start()` finds out who we are and proves it with one exchange; `Runtime` wraps the model, makes `backward` and `update`
true under every strategy, and carries what ranks must agree on. Nothing is ever unpickled from a peer: agreements are
tensors, and JSON in byte tensors. Methods marked "all ranks" are collectives.
"""

import contextlib
import gc
import os
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
from torch import Tensor, nn

from dist_lm import console as console
from dist_lm.channel import Channel
from dist_lm.checkpoint.save import OwnedSlice
from dist_lm.config import Config
from dist_lm.errors import CODES, PreemptedError, UserError, error_with_code
from dist_lm.optim import Muon, create_state
from dist_lm.outcome import Attempt
from dist_lm.runtime import zero
from dist_lm.runtime.watchdog import Watchdog
from dist_lm.runtime.zero import Strategy

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Runtime:
    """Who this process is, and the few operations whose meaning depends on how many there are."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        strategy: Strategy,
        settings: dict[str, Any] | None,
        attempt: Attempt,
    ):
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
        self.background, self.reading = (
            Channel(self.rank, self.world_size, torch.device("cpu")) for _ in range(2)
        )
        for channel in (self.background, self.reading) if self.world_size > 1 else ():
            channel.group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        # Accelerate refuses fp16 on CPU; torch's own scaler works on both.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.attempt, self.stop = attempt, attempt.stop
        self.watch: Watchdog | None = None
        self._sums = 0  # agreements entered, by which a rank that hangs is told from the others

    # --- the model and one step

    def construction(self) -> contextlib.AbstractContextManager[Any]:
        """Surrounds the building of the model, so that ZeRO-3 never has a whole one anywhere."""
        return zero.construction(self.settings)

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        shapes: Mapping[str, tuple[int, ...]],
        config: Config,
    ) -> nn.Module:
        """Move, compile and wrap the model; the optimizer keeps working on the same parameters. All ranks.

        The optimizer's state is there afterwards, all zero, and the weights are still those the model was built with.
        """
        self.bare, self.optimizer, self.ema_decay = model, optimizer, config.run.ema
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if self.settings is None:
            model.to(self.device)
        for (
            table
        ) in model.buffers():  # DeepSpeed leaves them where a model built in slices has them
            table.data = table.data.to(self.device)
        if config.run.compile:
            model.compile()  # in place, so that parameter names stay
        with (
            warnings.catch_warnings()
        ):  # torch 2.13 renames broadcast_buffers, older ones know no other name
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
        for rank, owned in enumerate(
            self.channel.gather([[h.name, h.stop - h.start] for h in self.owned()])
        ):
            for name, length in owned:
                lengths[name][rank] = length
        names = {parameter: name for name, parameter in self.bare.named_parameters()}
        optimizer.rank, optimizer.slices = self.rank, self.engine.slices(shapes, names, lengths)
        optimizer.exchange = self.channel.exchange

    def _opened(self) -> Iterable[Any]:
        """Turns in which the optimizer's groups can be worked on: one, or one for each piece of ZeRO-3. All ranks."""
        return self.engine.opened() if self.engine else [None]

    def _tensors(self) -> list[Tensor]:
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"]]

    def owned(self) -> Iterator[OwnedSlice]:
        """What this rank's optimizer works on, to be used one by one: weights and what the optimizer remembers."""
        if self.engine:
            yield from self.engine.owned(self.bare.named_parameters())
            return
        for name, p in self.bare.named_parameters():
            yield OwnedSlice.part(name, 0, p.numel(), p, self.optimizer.state[p])

    def spread(self) -> None:
        """After a change of what is held: the model computes with it on every rank. All ranks."""
        if self.engine:
            self.engine.spread()

    def start_average(self) -> None:
        """The moving average of the weights begins where they are."""
        for h in self.owned() if self.ema_decay else ():
            h.state["ema"].copy_(h.weight)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model computes with the moving average of its weights. All ranks."""
        self._swap_average()
        yield
        self._swap_average()

    @torch.no_grad()
    def _swap_average(self) -> None:
        for h in self.owned():
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
        return torch.autocast(
            self.device.type, dtype=_AUTOCAST[self.precision], cache_enabled=not sliced
        )

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
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters, clip or float("inf"), foreach=self.device.type == "cuda"
        )
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
        return torch.tensor(
            [number, self.stop.requested, is_lost], dtype=torch.float64, device=self.device
        )

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
                outcome["error"], outcome["code"] = (
                    f"{type(error).__name__}: {error}",
                    CODES["retryable"],
                )
                raise

        worker = threading.Thread(target=run, daemon=True) if self.is_main else None
        if worker:
            worker.start()
        while True:
            if worker:
                worker.join(1.0)
            busy, stop, is_lost = self.sum(
                self.with_stop(bool(worker and worker.is_alive()))
            ).tolist()
            self.refuse_lost_folder(is_lost)
            if not busy:
                break
            if stop:
                why = self.stop.reason or "another rank was told to stop"
                raise PreemptedError(f"stopped during start-up: {why}; the same command goes on")
        said = self.channel.gather(outcome)[0]
        if "error" in said:
            raise error_with_code(said["error"], said["code"])
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
                raise error_with_code(said[0] if rank == 0 else f"rank {rank}: {said[0]}", said[1])
        return result

    # --- the world outside

    def say(self, text: str) -> None:
        """One line from rank 0, on stderr: standard output belongs to what an entry prints as its result."""
        if self.is_main:
            console.say(text, channel="stderr")

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
        flat = {
            key: str(value) for key, value in config.flat().items()
        }  # TensorBoard refuses nested values
        try:
            self.accelerator.init_trackers(
                os.path.basename(os.path.normpath(config.run.dir)), config=flat
            )
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

        print(
            f"error: rank {self.rank} on {socket.gethostname()} ends: {reason}",
            file=sys.stderr,
            flush=True,
        )
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
