"""The engine: how one training step is spread over the ranks.

`Engine` has the methods that the loop calls. `ReplicatedEngine` is for one process alone and for
DDP, where every rank holds all weights; `zero.ZeroEngine` is for DeepSpeed's ZeRO, where each rank
holds a slice. The loss curve is the same under both. Methods marked "all ranks" are collectives.
"""

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from dist_lm.arithmetic import share_out
from dist_lm.channel import Channel
from dist_lm.checkpoint.layout import OwnedSlice
from dist_lm.config import Config, batch_layout
from dist_lm.model.gpt import GPT
from dist_lm.optim import create_state
from dist_lm.own_optimizers import Muon
from dist_lm.runtime.replicas import hash_of_bits
from dist_lm.runtime.strategy import Strategy

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_BACKWARDS = 2  # after as many, DDP keeps the order of its gradient buckets

Shapes = Mapping[str, tuple[int, ...]]  # of whole parameters, by name


class Engine(ABC):
    """A model and its optimizer, and the operations whose meaning depends on the strategy.

    They come with prepare(); before it an engine only has its settings.
    """

    def __init__(self, accelerator: Accelerator, config: Config, strategy: Strategy):
        self.accelerator = accelerator
        self.config = config
        self.strategy = strategy
        self.world_size: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.device: torch.device = accelerator.device
        self.on_gpu = self.device.type == "cuda"
        self.ema_decay = config.run.ema
        self.bare: Any = None  # the model without a wrapper, with our own parameter names
        self.model: Any = None  # the wrapped model, which the loop calls
        self.optimizer: Any = None
        self.scaler = self.new_scaler()

    def new_scaler(self) -> torch.amp.GradScaler:
        """The loss scale of fp16 as a run begins.

        Accelerate refuses fp16 on CPU; torch's own scaler works on both.
        """
        is_fp16 = self.config.run.precision == "fp16"
        return torch.amp.GradScaler(self.device.type, enabled=is_fp16)

    # --- building

    @abstractmethod
    def construction(self) -> contextlib.AbstractContextManager[Any]:
        """Surrounds the building of the model.

        It is built on the device at once, not in host memory on each rank; under ZeRO-3 there is
        never a whole one anywhere.
        """

    def prepare(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        shapes: Shapes,
        channel: Channel,
    ) -> None:
        """Move, compile and wrap the model; the optimizer keeps working on the same parameters.

        All ranks. Afterwards the optimizer's state exists and is all zero. The weights are still
        those the model was built with.
        """
        self.bare = model
        self.optimizer = optimizer
        self._move(model)
        if self.config.run.compile:
            _compile(model, loss=self.on_gpu)
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; older versions know no other name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._wrap(shapes, channel)
        for _ in self.opened():
            create_state(optimizer)
            if self.ema_decay:
                for tensor in self._optimized():
                    optimizer.state[tensor]["ema"] = torch.zeros_like(tensor)

    @abstractmethod
    def _move(self, model: nn.Module) -> None:
        """Bring the model to this rank's device."""

    @abstractmethod
    def _wrap(self, shapes: Shapes, channel: Channel) -> None:
        """Make `self.model` of `self.bare`. All ranks."""

    def release(self) -> None:
        """Drop the model, so that its process group can end. The engine is of no use afterwards."""
        self.bare = None
        self.model = None

    # --- one step

    @abstractmethod
    def warm_up(self, loss_of_nothing: Callable[[], Tensor]) -> None:
        """Do before step 1 what would change the order of sums after it. All ranks."""

    @abstractmethod
    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Surrounds forward and backward of a micro-batch, with autocast.

        Gradients are exchanged only in the last one.
        """

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Arithmetic in the run's precision.

        bf16 and fp16 mean the same under every strategy: fp32 weights and gradients, autocast
        arithmetic.
        """
        precision = self.config.run.precision
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(
            self.device.type,
            dtype=_AUTOCAST[precision],
            # Under ZeRO-3 the cache would keep a whole bf16 copy of weights that are held in
            # slices.
            cache_enabled=self.strategy.stage < 3,
        )

    def addend(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch as it is added up over micro-batches and ranks."""
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradient.

        Ranks are averaged later, so the loss is multiplied by their number first.
        """
        with torch.autocast(self.device.type, enabled=False):
            self._backward(loss * self.world_size)

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    def update(self) -> Tensor:
        """Clip by the global gradient norm, move the weights, forget the gradients. All ranks.

        Returns the norm before clipping. It is infinite or NaN if the update was left out.
        """
        norm = self._step()
        if self.ema_decay:
            for _ in self.opened():
                tensors = self._optimized()
                averages = [self.optimizer.state[tensor]["ema"] for tensor in tensors]
                weights = [tensor.data for tensor in tensors]
                torch._foreach_lerp_(averages, weights, 1 - self.ema_decay)
        return norm

    @abstractmethod
    def _step(self) -> Tensor:
        """One update of the weights; the gradient norm before clipping."""

    # --- which bits it has computed

    def gradient_hashes(self) -> Tensor | None:
        """Hashes of the step's gradient, equal on all ranks; None where they would mean nothing."""
        return None

    def facts_of_bits(self, shapes: Shapes) -> dict[str, str]:
        """What a checkpoint says about its bits; nothing where they depend on the world.

        `shapes` are of the parameters as they are saved.
        """
        return {}

    # --- what this rank holds

    @abstractmethod
    def opened(self) -> Iterator[Sequence[int]]:
        """Turns in which the optimizer's tensors can be worked on. All ranks.

        A turn has the numbers of its tensors; each tensor has one turn.
        """

    @abstractmethod
    def owned(self) -> Iterator[OwnedSlice]:
        """The parts of parameters that this rank's optimizer works on, with its state. All ranks.

        A part can be used until the next one is asked for.
        """

    @abstractmethod
    def spread(self) -> None:
        """Make the model compute with the owned parts after they were changed. All ranks."""

    def to_fill(self) -> Iterator[OwnedSlice]:
        """The owned parts that this rank fills at a start. fill_others() is to follow. All ranks.

        No element is filled by two ranks, so that each reads or computes only its share.
        """
        return self.owned()

    def fill_others(self) -> None:
        """Bring what each rank has filled to where it is owned or computed with. All ranks."""
        self.spread()

    @torch.no_grad()
    def clear(self) -> None:
        """Weights and state become zero, with what no checkpoint fills. All ranks.

        Rows that pad the vocabulary, and what pads DeepSpeed's flat pieces, may be NaN by now.
        """
        for _ in self.opened():
            for tensor in self._optimized():
                tensor.zero_()
                for values in self.optimizer.state[tensor].values():
                    values.zero_()

    def _optimized(self) -> list[Tensor]:
        """The tensors of the optimizer's groups, as far as they are open."""
        tensors: list[Tensor] = []
        for group in self.optimizer.param_groups:
            tensors += group["params"]
        return tensors

    @property
    def has_replicas(self) -> bool:
        """Whether every rank holds the same weights."""
        return False

    # --- the moving average of the weights

    def start_average(self) -> None:
        """The average begins where the weights are. All ranks."""
        if self.ema_decay:
            for part in self.owned():
                part.state["ema"].copy_(part.weight)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model computes with the average of its weights. All ranks."""
        self._swap_average()
        yield
        self._swap_average()

    @torch.no_grad()
    def _swap_average(self) -> None:
        for part in self.owned():
            weight = part.weight.clone()
            part.weight.copy_(part.state["ema"])
            part.state["ema"].copy_(weight)
        self.spread()


class ReplicatedEngine(Engine):
    """One process alone, or DDP.

    Every rank holds all weights, all gradients and all of the optimizer's state.
    """

    def __init__(self, accelerator: Accelerator, config: Config, strategy: Strategy):
        super().__init__(accelerator, config, strategy)
        self._trainable: list[nn.Parameter] = []
        self._accumulates = False  # whether a step has several backward passes

    @property
    def has_replicas(self) -> bool:
        return self.world_size > 1

    def construction(self) -> contextlib.AbstractContextManager[Any]:
        return built_on(self.device)

    def _move(self, model: nn.Module) -> None:
        model.to(self.device)

    def _wrap(self, shapes: Shapes, channel: Channel) -> None:
        self.model = self.accelerator.prepare_model(self.bare)
        for parameter in self.bare.parameters():
            if parameter.requires_grad:
                self._trainable.append(parameter)
        self._accumulates = batch_layout(self.config, self.world_size).accumulation > 1
        if isinstance(self.optimizer, Muon) and self.on_gpu and self.world_size > 1:
            self.optimizer.divide_matrices(self.rank, self.world_size, channel.collect)

    def warm_up(self, loss_of_nothing: Callable[[], Tensor]) -> None:
        """Two backward passes of a zero loss. All ranks.

        DDP reorders its gradient buckets after the first backward, which changes the order of sums
        in a ring of more than two ranks. It happens before step 1, so that a resumed run is
        bit-identical to an undisturbed one. It also makes the gradients views of the final buckets.
        """
        if self.world_size == 1:
            return
        for _ in range(_FIRST_BACKWARDS):
            with self.micro_step(last=True):
                self.backward(loss_of_nothing())
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        """Set the gradients to zero, or give their memory back.

        Under DDP they are views of its buckets, which stay. A step of several backward passes must
        keep those views: a gradient that begins as nothing gets memory of its own until the last
        pass, so all gradients would exist twice.
        """
        keeps_views = self.world_size > 1 and self._accumulates
        self.optimizer.zero_grad(set_to_none=not keeps_views)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        exchange = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
        with exchange, self.autocast():
            yield

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(self.scaler.scale(loss))

    def _step(self) -> Tensor:
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._forget_gradients()
        return norm.detach()

    def hash_of_gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        """The hash of the bits of a loss's gradient, of which nothing remains."""
        with self.micro_step(last=False):
            self._backward(loss())
        gradients = [p.grad for p in self._trainable if p.grad is not None]
        value = hash_of_bits(gradients)
        self._forget_gradients()
        return value

    def _clip(self) -> Tensor:
        """Scale the gradients down to optim.clip; their norm before that."""
        foreach = self.on_gpu
        gradients = [p.grad for p in self._trainable if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=foreach)
        clip = self.config.optim.clip
        if clip:
            torch.nn.utils.clip_grads_with_norm_(self._trainable, clip, norm, foreach=foreach)
        return norm

    def opened(self) -> Iterator[Sequence[int]]:
        yield range(len(self._optimized()))

    def owned(self) -> Iterator[OwnedSlice]:
        for name, parameter in self.bare.named_parameters():
            state = self.optimizer.state[parameter]
            yield OwnedSlice.part(name, 0, parameter.numel(), parameter, state)

    def spread(self) -> None:
        """Nothing to do: the owned parts are the model's own weights."""

    def to_fill(self) -> Iterator[OwnedSlice]:
        filler = self._fillers()
        for part in self.owned():
            if filler[part.name] == self.rank:
                yield part

    @torch.no_grad()
    def fill_others(self) -> None:
        """Each rank sends its share to all others."""
        if self.world_size == 1:
            return
        filler = self._fillers()
        for part in self.owned():
            for tensor in (part.weight, *part.state.values(), *part.extra.values()):
                # NCCL sends nothing from a CPU, where torch keeps the count of steps.
                sent = tensor.to(self.device)
                dist.broadcast(sent, filler[part.name])
                if sent is not tensor:
                    tensor.copy_(sent)

    def _fillers(self) -> dict[str, int]:
        """Which rank fills each parameter."""
        sizes = {name: parameter.numel() for name, parameter in self.bare.named_parameters()}
        return share_out(sizes, self.world_size)


def _compile(model: GPT, loss: bool) -> None:
    """Compile the model block by block.

    All layers share what is compiled, so the start takes seconds; and the backward hands out each
    block's gradients when it is through with it, so that DDP can exchange them meanwhile. The loss
    is compiled where its logits are slower to move than to compute.
    """
    import torch._dynamo  # slow

    # It would cut each block's graph where DDP's buckets end.
    torch._dynamo.config.optimize_ddp = False
    # A graph for training and one for evaluation, for each of the few lengths that the bounds of
    # documents have.
    torch._dynamo.config.recompile_limit = 16
    model.compile_for_training(loss)


def built_on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Parameters made inside lie on the device. On a CPU they do so anyway."""
    return contextlib.nullcontext() if device.type == "cpu" else device
