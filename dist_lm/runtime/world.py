"""The runtime: who this process is among the ranks, and what the ranks must agree on.

Nothing is ever unpickled from a peer: agreements are tensors, and JSON in byte tensors. How a step
is spread over the ranks is the engine's matter. Methods marked "all ranks" are collectives.
"""

import contextlib
import gc
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from dist_lm import console
from dist_lm.channel import Channel
from dist_lm.config import Config
from dist_lm.environment import rank_here
from dist_lm.errors import CODES, PreemptedError, UserError, error_with_code
from dist_lm.launcher import end_stopped_ranks
from dist_lm.outcome import Attempt
from dist_lm.runtime.engine import Engine
from dist_lm.runtime.watchdog import Watchdog, Whereabouts

_BACKGROUND_TIMEOUT = timedelta(hours=2)  # of checkpoints and data, which may wait for a slow disk
_OWN_STEPS = 9  # whose median says how fast this rank is
_LOOK_SECONDS = 1.0  # how often all ranks ask whether work in threads has ended
_RECORD_SECONDS = 10.0  # for recording how the run ended; the run folder's host may be what is gone


class Runtime:
    """This process as one of the ranks of a run.

    `start.start()` makes it. The engine and the channels belong to it; close() ends them all.
    """

    def __init__(self, accelerator: Accelerator, engine: Engine, attempt: Attempt):
        self.accelerator = accelerator
        self.engine = engine
        self.attempt = attempt
        self.stop = attempt.stop
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.is_main = self.rank == 0
        self.device: torch.device = accelerator.device
        self.strategy = engine.strategy.name(self.world_size)  # by name, as in state.json
        self.channel = Channel(self.rank, self.world_size, self.device)
        # Messages of checkpoints and of data never mix with training's.
        self.background = self._channel_of_its_own()
        self._reading: Channel | None = None
        self.watch: Watchdog | None = None
        # Why this rank cannot go on. A thread may set it; the ranks agree on it with the next sum.
        self.refusal: UserError | None = None
        # Where this rank is; the watchdog tells a rank that hangs or is slow from the others by it.
        self.whereabouts = Whereabouts(phase="start-up")
        self.has_made_a_step = False
        self._own_seconds: deque[float] = deque(maxlen=_OWN_STEPS)
        # Does nothing until start_profiler().
        self.profiler: Any = SimpleNamespace(step=lambda: None, stop=lambda: None)

    def _channel_of_its_own(self) -> Channel:
        channel = Channel(self.rank, self.world_size, torch.device("cpu"))
        if self.world_size > 1:
            channel.group = dist.new_group(backend="gloo", timeout=_BACKGROUND_TIMEOUT)
        return channel

    def reading(self) -> Channel:
        """The channel of those who read ahead, which is opened for the first of them. All ranks."""
        if self._reading is None:
            self._reading = self._channel_of_its_own()
        return self._reading

    # --- where this rank is

    def enter(self, step: int, phase: str) -> None:
        """Note what this rank begins to do, after `step` updates."""
        if not self.has_made_a_step:
            phase = "start-up"  # the first step compiles
        progress = self.whereabouts.progress + 1
        self.whereabouts = Whereabouts(
            progress, step=step, phase=phase, seconds=self.whereabouts.seconds
        )

    def note_own_seconds(self, seconds: float) -> None:
        """Note what a step took this rank until it exchanged anything with the others."""
        if self.has_made_a_step:
            self._own_seconds.append(seconds)
            median = statistics.median(self._own_seconds)
            self.whereabouts = replace(self.whereabouts, seconds=median)

    # --- agreements

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up over ranks, in place. All ranks."""
        self.whereabouts = replace(self.whereabouts, progress=self.whereabouts.progress + 1)
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def with_flags(self, number: int) -> Tensor:
        """This rank's part of a sum: a number, whether it was told to stop, whether it refuses."""
        is_refusing = bool(self.attempt.lock.lost or self.refusal)
        return self.on_device([number, self.stop.requested, is_refusing], torch.float64)

    def of_main(self, number: Tensor) -> Tensor:
        """This rank's part of a sum that gives rank 0's number, or infinity or NaN of any rank.

        A gradient norm may differ between ranks in its last bits, but all must decide alike by it.
        """
        number = number.double()
        if self.is_main:
            return number
        return torch.where(number.isfinite(), torch.zeros_like(number), number)

    def of_rank_before(self, tensor: Tensor) -> Tensor:
        """The tensor of the rank before this one, of equal shape. All ranks."""
        everyones = self.channel.collect(tensor.contiguous())
        return everyones.chunk(self.world_size)[(self.rank - 1) % self.world_size]

    def on_device(self, numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Numbers of the host as a tensor on this rank's device, without a host sync.

        torch.tensor(..., device="cuda") copies from memory that is not pinned, and waits for it.
        """
        is_gpu = self.device.type == "cuda"
        numbers_on_host = torch.tensor(numbers, dtype=dtype, pin_memory=is_gpu)
        return numbers_on_host.to(self.device, non_blocking=True)

    @property
    def why_stopped(self) -> str:
        """The reason why this run stops before its end, once a rank was told to."""
        return self.stop.reason or "another rank was told to stop"

    def refuse_together(self, are_refusing: float) -> None:
        """Raise if a rank refuses to go on, or if rank 0 no longer holds the run folder.

        All ranks, with the sum that they agreed on.
        """
        if not are_refusing:
            return
        self.together(self._refuse)

    def _refuse(self) -> None:
        if self.refusal:
            raise self.refusal
        if self.attempt.lock.lost:
            raise UserError(
                f"run.dir={self.attempt.folder} is no longer this run's"
                f" ({self.attempt.lock.look()}); rule: one run a folder; this run ends and writes"
                " nothing more there"
            )

    def barrier(self) -> None:
        """Wait until every rank is here. All ranks."""
        self.sum(torch.zeros(1, device=self.device))

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Rank 0 does the work; every rank gets its JSON result or its UserError. All ranks.

        The work may take long, as on_all() says.
        """
        return _result_of(self._work_aside(work if self.is_main else None)[0])

    def on_all(self, work: Callable[[], Any]) -> list[Any]:
        """Every rank does the work; every rank gets all JSON results, or one UserError. All ranks.

        The work may take long: it is done in a thread while all ranks keep reducing a flag, so that
        no collective waits past the timeout.
        """
        return [_result_of(outcome) for outcome in self._work_aside(work)]

    def _work_aside(self, work: Callable[[], Any] | None) -> list[dict[str, Any]]:
        """How the work of each rank ended, by rank; without work there is nothing. All ranks."""
        outcome: dict[str, Any] = {}
        worker: threading.Thread | None = None
        if work:
            worker = threading.Thread(target=_note_outcome, args=(work, outcome), daemon=True)
            worker.start()
        while True:
            is_busy = False
            if worker:
                worker.join(_LOOK_SECONDS)
                is_busy = worker.is_alive()
            busy, stop, are_refusing = self.sum(self.with_flags(is_busy)).tolist()
            self.refuse_together(are_refusing)
            if not busy:
                return self.channel.gather(outcome)
            if stop:
                raise PreemptedError(
                    f"stopped during start-up: {self.why_stopped}; the same command goes on"
                )

    def together(self, work: Callable[[], Any]) -> Any:
        """Every rank does the work; if any refuses, all raise that rank's UserError. All ranks."""
        result = None
        refusal = None
        try:
            result = work()
        except UserError as error:
            refusal = (str(error), error.code)
        for rank, refusal_of_rank in enumerate(self.channel.gather(refusal)):
            if refusal_of_rank:
                message, code = refusal_of_rank
                if rank > 0:
                    message = f"rank {rank}: {message}"
                raise error_with_code(message, code)
        return result

    # --- the world outside

    def say(self, text: str) -> None:
        """Print one line on stderr. Rank 0.

        Standard output is for what a command prints as its result.
        """
        if self.is_main:
            console.notice(console.printable(text))

    def start_profiler(self, steps: int, trace: Path) -> None:
        """Trace `steps` steps after two of warm-up; for 0 steps nothing. Rank 0 writes the file."""
        if not steps:
            return

        def write(profile: Any) -> None:
            if self.is_main:
                with console.dispensable(trace):
                    profile.export_chrome_trace(str(trace))

        schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
        self.profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=write)
        self.profiler.start()

    def start_trackers(self, config: Config, first_step: int) -> None:
        """TensorBoard and others through Accelerate, which works on rank 0 alone.

        `first_step`: where this start goes on. A failing tracker never stops a run.
        """
        name = os.path.basename(os.path.normpath(config.run.dir))
        # TensorBoard shows one run over all starts: it hides what an earlier start did after the
        # checkpoint that this one goes on from.
        of_tensorboard = {"purge_step": first_step + 1} if first_step else {}
        settings = {key: str(value) for key, value in config.flat().items()}
        try:
            self.accelerator.init_trackers(name, init_kwargs={"tensorboard": of_tensorboard})
            for tracker in self.accelerator.trackers:
                # TensorBoard would show the settings of each start as a run of their own.
                if tracker.name != "tensorboard":
                    tracker.store_init_configuration(settings)
        except Exception as error:
            self.say(f"warning: tracking is off, the run goes on: {type(error).__name__}: {error}")

    def track(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)

    # --- the end

    def give_up(self, error: Exception) -> None:
        """Report an error of this rank alone and which rank is to blame, and end the process.

        Returns where there is one process only, which can raise the error instead.
        """
        if self.watch:
            if not isinstance(error, UserError):
                traceback.print_exc()
            reason, kind = self.watch.explain(error)
            self.end_at_once(reason, kind)

    def end_at_once(self, reason: str, kind: str = "retryable") -> None:
        """End the process; `kind` is the class of the ending.

        Others may be gone, so neither collectives nor destructors wait for them.
        """

        def record() -> None:
            if not self.is_main:
                time.sleep(2)  # rank 0 records it if it can
            if self.is_main or not self.attempt.is_recorded:
                self.attempt.record(kind, reason)
            self.attempt.lock.release()

        print(
            f"error: {rank_here(self.rank)} ends: {console.printable(reason)}",
            file=sys.stderr,
            flush=True,
        )
        recorder = threading.Thread(target=record, daemon=True)
        recorder.start()
        recorder.join(_RECORD_SECONDS)
        end_stopped_ranks()
        os._exit(CODES[kind])

    def close(self) -> None:
        """Leave together: a rank that exits early aborts peers that still work. All ranks."""
        if self.watch:
            self.watch.close()
        last_sum = self.sum(torch.zeros(1, device=self.device))
        # gloo's threads end only with the last reference to the group, which DDP's wrapper holds. A
        # thread that frees a tensor while Python shuts down aborts the process ("terminate called
        # without an active exception").
        self.engine.release()
        self.background.group = None
        if self._reading:
            self._reading.group = None
        self.accelerator.free_memory()
        gc.collect()
        with contextlib.suppress(Exception):  # whatever a tracker does must never stop a run
            self.accelerator.end_training()  # also destroys the process group
        if dist.is_initialized():
            dist.destroy_process_group()
        del last_sum  # kept until no thread can hold it


def _result_of(outcome: dict[str, Any]) -> Any:
    """What the work of a rank gave; raises what it raised."""
    if "error" in outcome:
        raise error_with_code(outcome["error"], outcome["code"])
    return outcome["result"]


def _note_outcome(work: Callable[[], Any], outcome: dict[str, Any]) -> None:
    """Do the work and put its result, or its error's text and code, into `outcome`."""
    try:
        outcome["result"] = work()
    except UserError as error:
        outcome["error"] = str(error)
        outcome["code"] = error.code
    except BaseException as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
        outcome["code"] = CODES["retryable"]
        raise
