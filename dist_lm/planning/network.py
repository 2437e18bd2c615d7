"""How long a step waits for the network, by counting the bytes that each process sends.

The model of a ring: to gather or to scatter W bytes among N processes, each sends W (N - 1) / N; a
sum does both. A ring that crosses nodes has one link per GPU at each crossing. What is sent while
the device computes costs nothing, except for the first or the last bucket, which has nothing to
hide behind. Latency and other traffic are not in it, so the figures are what a good network allows.
"""

from dist_lm.config import BatchLayout, Config
from dist_lm.planning.cluster import Cluster
from dist_lm.planning.memory import weight_bytes
from dist_lm.runtime.strategy import BUCKET, Strategy

# A forward takes a third of the operations of a step, and a recomputed one comes on top of the
# backward.
_FORWARD = 1 / 3


def efficiency(
    config: Config,
    strategy: Strategy,
    cluster: Cluster,
    layout: BatchLayout,
    *,
    vocab_size: int,
    seconds: float,
) -> float:
    """The share of a step that its computing takes, which lasts `seconds` on its own."""
    if cluster.world == 1 or not cluster.on_gpu:
        return 1.0
    weights = weight_bytes(config, vocab_size)  # of gradients there are as many bytes
    sent = weights * (cluster.world - 1) / cluster.world
    one_way = sent / cluster.bandwidth
    bucket = min(1.0, 4 * BUCKET / weights) * one_way
    waiting = seconds_waiting(strategy.stage, layout, one_way, bucket, seconds)
    return seconds / (seconds + waiting)


def seconds_waiting(
    stage: int, layout: BatchLayout, one_way: float, bucket: float, seconds: float
) -> float:
    """What a step waits for.

    `one_way` is the time in which all weights, or all gradients, are gathered or scattered, and
    `bucket` that of one bucket of them.
    """
    passes = layout.accumulation
    forward = _FORWARD * seconds / passes  # of a micro-batch
    backward = seconds / passes - forward
    if stage == 0:  # gradients are summed in the last backward of a step
        return max(2 * bucket, 2 * one_way - backward)
    if stage == 1:  # gradients are scattered in the last backward, weights gathered after the step
        return max(bucket, one_way - backward) + one_way
    if stage == 2:  # gradients are scattered in each backward
        return passes * max(bucket, one_way - backward) + one_way
    # Weights are gathered in each forward and again in each backward, which scatters gradients too.
    in_forward = max(bucket, one_way - forward)
    in_backward = max(bucket, 2 * one_way - backward)
    return passes * (in_forward + in_backward)
