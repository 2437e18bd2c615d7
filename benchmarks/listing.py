"""All claims, in the order of the table."""

from benchmarks.claim import Claim
from benchmarks.claims import (
    checkpoints,
    decoding,
    loader,
    loops,
    matrix_share,
    prepare,
    resuming,
    safety,
    starting,
    streaming,
    tokenizers_alone,
    training_step,
)

_FILES = (
    training_step,
    matrix_share,
    decoding,
    prepare,
    streaming,
    loader,
    loops,
    checkpoints,
    resuming,
    tokenizers_alone,
    safety,
    starting,
)

CLAIMS: tuple[Claim, ...] = sum((file.CLAIMS for file in _FILES), ())
