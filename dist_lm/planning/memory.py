"""The bytes that a process holds under each strategy: on its device, in host memory, on disk.

Shapes give weights, gradients and the optimizer's state; activations.py gives the rest. The parts
of DeepSpeed are those of 0.19 as they were measured. The claims memory-plan-* of
`python -m benchmarks` compare with real training.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from dist_lm.config import Config, batch_layout
from dist_lm.model.init import parameter_shapes
from dist_lm.optim import moments
from dist_lm.planning.activations import LiveBytes, live_bytes
from dist_lm.runtime.strategy import BUCKET, Strategy, gathered_elements
from dist_lm.size import checkpoint_bytes

# Elements: DeepSpeed's stage3_max_live_parameters, which the runtime leaves alone on CPUs.
GATHERED_ON_CPU = 10**9
SHAPES = lru_cache(parameter_shapes)  # asked for again with every micro-batch of a plan


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float  # with the loss's gradients
    peak: float  # most at one time: less than the sum, where one goes before another comes
    host: float  # offloaded parts
    disk: float  # NVMe
    saving: float  # host memory of a checkpoint on its way to disk


def memory(config: Config, strategy: Strategy, world: int, vocab_size: int, on_gpu: bool) -> Memory:
    """Memory of one process of `world`."""
    layout = batch_layout(config, world)
    gathered = GATHERED_ON_CPU
    if on_gpu:
        gathered = gathered_elements(SHAPES(config.model_spec(vocab_size)))
    step = Step(
        live=live_bytes(config, vocab_size, layout.micro_batch, strategy.stage == 3, on_gpu),
        weights=weight_bytes(config, vocab_size),
        state=state_bytes(config, vocab_size),
        saving=checkpoint_bytes(config, vocab_size) / world,
        world=world,
        accumulates=layout.accumulation > 1,
        on_gpu=on_gpu,
        gathered=4.0 * gathered,
    )
    if strategy.stage:
        return memory_of_zero(step, strategy)
    return memory_of_ddp(step)


def weight_bytes(config: Config, vocab_size: int) -> float:
    """Weights are fp32 in every precision; gradients and moments are as well."""
    shapes = SHAPES(config.model_spec(vocab_size))
    return sum(4.0 * math.prod(shape) for shape in shapes.values())


def state_bytes(config: Config, vocab_size: int) -> float:
    """The moments of the optimizer, and the moving average."""
    average = config.run.ema > 0
    total = 0.0
    for name, shape in SHAPES(config.model_spec(vocab_size)).items():
        total += 4.0 * math.prod(shape) * (moments(config.optim.name, name) + average)
    return total


@dataclass(frozen=True)
class Step:
    """The figures from which the memory of a process follows: bytes of the whole model."""

    live: LiveBytes
    weights: float  # as many as gradients
    state: float  # of the optimizer, with the moving average
    saving: float  # of a checkpoint, this process's part
    world: int
    accumulates: bool  # gradients are there before the last backward of a step begins
    on_gpu: bool
    gathered: float  # most of the weights that ZeRO-3 has whole at one time

    @property
    def forward(self) -> float:
        """Most until the backward has gone through the blocks."""
        return max(self.live.activations + self.live.loss, self.live.blocks)

    @property
    def activations(self) -> float:
        return max(self.live.activations, self.live.blocks)

    @property
    def logits(self) -> float:
        return self.forward - self.activations


def memory_of_ddp(step: Step) -> Memory:
    """Each process has everything. DDP's buckets always exist; gradients are views of them."""
    early = step.weights if step.world > 1 or step.accumulates else 0.0
    moving = max(early + step.forward, step.weights + step.live.end)
    return Memory(
        weights=step.weights,
        gradients=step.weights,
        optimizer=step.state,
        activations=step.activations,
        logits=step.logits,
        peak=step.weights + step.state + moving,
        host=0.0,
        disk=0.0,
        saving=step.saving,
    )


def memory_of_zero(step: Step, strategy: Strategy) -> Memory:
    """The optimizer works on fp32 copies of its share of the weights."""
    backward = ZeroBackward(step, strategy)
    share = step.weights / step.world
    optimizer = (step.weights + step.state) / step.world
    gradients = max(backward.before, backward.own) + 2 * backward.bucket
    if strategy.stage == 3:
        # Slices, and what is gathered of them: up to a limit all of it stays together.
        weights = share + min(step.weights, step.gathered)
        moving = backward.most_with_slices()
    else:
        weights = step.weights
        moving = backward.most_with_whole_weights()
    host = 0.0
    disk = 0.0
    if strategy.optimizer_device != "none":
        # Under ZeRO-2 also a buffer through which new weights come back.
        host = optimizer + share * (1 if strategy.stage == 3 else 2)
        optimizer = 0.0
    if strategy.param_device != "none":
        host += share
        weights -= share
    if "nvme" in (strategy.optimizer_device, strategy.param_device):
        disk = host - share
        host = share
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=step.activations,
        logits=step.logits,
        peak=weights + optimizer + moving,
        host=host,
        disk=disk,
        saving=step.saving,
    )


class ZeroBackward:
    """A backward under ZeRO, in which gradients fill a bucket, whose copy is summed."""

    def __init__(self, step: Step, strategy: Strategy):
        self.step = step
        share = step.weights / step.world
        self.bucket = min(4.0 * BUCKET, step.weights)
        # On a GPU all of the bucket is there as the backward begins, on a CPU as its pages fill.
        # Under ZeRO-1 and 2 a second one fills while the first is summed.
        buckets_at_once = 1 if strategy.stage == 3 else 2
        self.fixed = 4.0 * BUCKET * buckets_at_once if step.on_gpu else 0.0
        # How much of the backward is done each time the bucket is full.
        buckets = int(step.weights // self.bucket)
        self.done = [n * self.bucket / step.weights for n in range(1, buckets + 1)]
        # Gradients go where the optimizer is: this process's share of them, unless it is offloaded.
        self.own = share if strategy.optimizer_device == "none" else 0.0
        self.before = 0.0  # gradients of the backward passes before
        if step.accumulates:
            self.before = step.weights if strategy.stage == 1 else self.own

    def most_with_whole_weights(self) -> float:
        """Under ZeRO-1 and ZeRO-2."""
        step = self.step
        most = max(
            self.before + step.forward + self.fixed,
            self.bucket + self.own + step.live.end,
            2 * self.own,
        )
        earlier = 0.0  # how much was done when the bucket was full the time before
        for done in self.done:
            kept = self.before + (1 - done) * step.activations
            copied = self.own if step.on_gpu else self.own * earlier
            most = max(most, kept + max(self.fixed, self.bucket) + self.bucket + copied)
            earlier = done
        return most

    def most_with_slices(self) -> float:
        """Under ZeRO-3, where gradients and the bucket stay for good."""
        most = self.step.forward
        for done in self.done:
            most = max(most, (1 - done) * self.step.activations + self.bucket)
        return self.own + max(self.fixed, self.bucket) + most
