"""Held-out loss, perplexity and bits per byte: sums over all ranks, the same at any world size."""

import math

import torch
from torch import Tensor, nn

from dist_lm.arithmetic import ceil_div
from dist_lm.config import NO_TARGET, BatchLayout, Config
from dist_lm.data.batches import Batches, Micro
from dist_lm.data.mix import PreparedReader
from dist_lm.data.prepared.sequences import TokenSequences
from dist_lm.data.sources import PreparedSource
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import DataError
from dist_lm.runtime.world import Runtime

_ORDER_SEED = 0  # the same validation sequences whatever the run's seed
_LARGEST_EXPONENT = 700.0  # exp() of more overflows


def validate(
    runtime: Runtime,
    model: nn.Module,
    shards: TokenSequences,
    config: Config,
    layout: BatchLayout,
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """Evaluate the first `run.eval_batches` global batches of a fixed order. All ranks."""
    data = config.data
    available = sum(shards.counts(data.seq_len, data.stride))
    sequences = min(available, config.run.eval_batches * data.global_batch)
    source = PreparedSource(
        "val", shards, data.seq_len, data.stride, seed=_ORDER_SEED, end=sequences
    )
    reader = PreparedReader(
        source, data.global_batch, runtime.rank, runtime.world_size, layout.unit
    )
    batches = Batches(reader, data, layout, runtime.device, eot=tokenizer.eot)
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(runtime.device)
    sums = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    with torch.no_grad(), runtime.engine.autocast():
        for _ in range(ceil_div(sequences, data.global_batch)):
            batch = batches.take()
            if batch.failure:
                runtime.refusal = batch.failure
            for micro in batch.micros:
                sums += _sums_of_micro(runtime, model, micro, token_bytes)
    batches.close()
    is_refusing = torch.full_like(sums[:1], runtime.refusal is not None)
    # The one host sync of an evaluation.
    sums_of_all = runtime.sum(torch.cat([sums, is_refusing])).tolist()
    loss_sum, targets_sum, bytes_sum, are_refusing = sums_of_all
    runtime.refuse_together(are_refusing)
    if not bytes_sum:
        raise DataError(
            f"the validation set in {shards.title}: none of the {targets_sum:.0f} tokens of an"
            " evaluation stands for text; rule: text that the tokenizer knows; nearest: another"
            " data.validation"
        )
    mean_loss = loss_sum / targets_sum
    return {
        "val_loss": mean_loss,
        "val_perplexity": math.exp(min(mean_loss, _LARGEST_EXPONENT)),
        "val_bits_per_byte": loss_sum / math.log(2) / bytes_sum,
    }


def _sums_of_micro(runtime: Runtime, model: nn.Module, micro: Micro, token_bytes: Tensor) -> Tensor:
    """The sums of losses, targets and bytes of their text, on the device. All ranks."""
    loss = model(
        micro.tokens_BT,
        micro.targets_BT,
        segments_BT=micro.segments_BT,
        bounds_N=micro.bounds_N,
    )
    # Sums over a mask: choosing the targets would need their number on the host.
    is_target = micro.targets_BT != NO_TARGET
    bytes_BT = token_bytes[micro.targets_BT * is_target]
    loss = runtime.engine.addend(loss)
    return torch.stack([loss.double(), is_target.sum(), (bytes_BT * is_target).sum()])
