"""Held-out loss, perplexity and bits per byte: sums over all ranks, so the same number at any world size."""

import math

import torch
from torch import nn

from dist_lm.config import NO_TARGET, BatchLayout, Config
from dist_lm.data.batches import Batches
from dist_lm.data.mix import PreparedReader
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.sources import PreparedSource
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.runtime.world import Runtime

_ORDER_SEED = 0  # the same validation sequences whatever the run's seed


def validate(
    runtime: Runtime,
    model: nn.Module,
    shards: TokenShards,
    config: Config,
    layout: BatchLayout,
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """Evaluate the first `run.eval_batches` global batches of a fixed order. All ranks."""
    data = config.data
    end = min(
        sum(shards.counts(data.seq_len, data.stride)), config.run.eval_batches * data.global_batch
    )
    source = PreparedSource("val", shards, data.seq_len, data.stride, seed=_ORDER_SEED, end=end)
    reader = PreparedReader(source, data.global_batch, runtime.rank, runtime.world_size)
    batches = Batches(reader, data, layout, runtime.device, eot=tokenizer.eot)
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(runtime.device)
    loss_targets_bytes = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    with torch.no_grad(), runtime.engine.autocast():
        for _ in range(-(-end // data.global_batch)):
            for micro in batches.take().micros:
                loss = model(micro.tokens_BT, micro.targets_BT, segments_BT=micro.segments_BT)
                targets = micro.targets_BT[micro.targets_BT != NO_TARGET]
                loss_targets_bytes[0] += loss
                loss_targets_bytes[1] += targets.numel()
                loss_targets_bytes[2] += token_bytes[targets].sum()
    batches.close()
    loss_sum, targets_sum, bytes_sum = runtime.sum(loss_targets_bytes).tolist()
    loss = loss_sum / targets_sum
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),
        "val_bits_per_byte": loss_sum / math.log(2) / bytes_sum,
    }
