"""All claims, in the order of the table."""

from benchmarks.claim import Claim
from benchmarks.claims import (
    characters,
    checkpoints,
    decoding,
    loader,
    loops,
    matrix_share,
    memory,
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
    memory,
    decoding,
    prepare,
    streaming,
    loader,
    loops,
    characters,
    checkpoints,
    resuming,
    tokenizers_alone,
    safety,
    starting,
)

CLAIMS: tuple[Claim, ...] = sum((file.CLAIMS for file in _FILES), ())
