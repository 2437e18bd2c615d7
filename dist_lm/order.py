"""Which sequences make up the global batch of a step: pure integer maths of (seed, step), vectorised over positions.

Position p = step * global_batch + j counts every sequence of the run; j is a place in the global batch and rank(j) =
j mod world. Nothing here knows more of the machine than that one modulo. A sequence is looked up through keyed
permutations, so any position costs O(1) time and memory, and each epoch is a new exact permutation.

Reads stay local: a pass takes the sequences in groups of GROUP random blocks of BLOCK neighbours, and permutes
within a group. So at any moment only a few places of a large dataset are read, and a small dataset is one group.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

BLOCK = 4096  # neighbouring sequences that travel together
GROUP = 8  # blocks that are shuffled into each other
_FEISTEL_ROUNDS = 4


def hash_words(first: int | Words, *more: int | Words) -> Words:
    """64 well-mixed bits from a chain of integers (splitmix64's finalizer after each)."""
    words = _mix(_words(first))
    for value in more:
        words = _mix(words ^ _words(value))
    return words


def rank_places(rank: int, world: int, global_batch: int) -> Ints:
    """The places j of the global batch that this rank trains on; with fewer than its peers it fills up."""
    return np.arange(rank, global_batch, world, dtype=np.int64)


def row_keys(seed: int, positions: Ints) -> Ints:
    """A hash per row from which dropout masks follow: the same wherever and with whomever the row is computed."""
    return hash_words(seed, 1, positions.astype(np.uint64)).view(np.int64)


def sequence_ids(positions: Ints, count: int, seed: int) -> Ints:
    """The sequence, 0..count-1, at each position of the run; positions count..2*count-1 are the second epoch."""
    epoch, q = np.divmod(positions, count)
    key = hash_words(seed, 2, epoch.astype(np.uint64))
    full, short = divmod(count, BLOCK)
    places = full + (short > 0)
    # The one shorter block comes at a random place, so that the start of every place has a closed form.
    short_place = (hash_words(key, 3) % np.uint64(places)).astype(np.int64) if short else np.full_like(q, full)

    def start(place: Ints) -> Ints:
        return place * BLOCK - (place > short_place) * (BLOCK - short)

    def place_of(q: Ints) -> Ints:
        before = short_place * BLOCK
        after = np.where(q < before + short, short_place, (q - short) // BLOCK + 1)
        return np.where(q < before, q // BLOCK, after)

    group = place_of(q) // GROUP
    low, high = start(group * GROUP), start(np.minimum((group + 1) * GROUP, places))
    q = low + permute(q - low, high - low, hash_words(key, 4, group.astype(np.uint64)))
    place = place_of(q)
    offset = q - start(place)
    among_full = np.minimum(place - (place > short_place), max(full - 1, 0))
    block = np.where(place == short_place, full, permute(among_full, np.full_like(q, max(full, 1)), hash_words(key, 5)))
    ids: Ints = block * BLOCK + offset
    return ids


def permute(x: Ints, size: Ints, key: Words) -> Ints:
    """A keyed permutation of 0..size-1, elementwise: a Feistel network on the next even number of bits, walked until
    it lands inside (on average less than four times)."""
    half = ((np.frexp(np.maximum(size - 1, 1))[1] + 1) // 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = _feistel(x.astype(np.uint64), half, mask, key)
    outside = np.flatnonzero(out >= size.astype(np.uint64))
    while outside.size:
        out[outside] = _feistel(out[outside], half[outside], mask[outside], key[outside])
        outside = outside[out[outside] >= size[outside].astype(np.uint64)]
    return out.astype(np.int64)


def _feistel(x: Words, half: Words, mask: Words, key: Words) -> Words:
    left, right = x >> half, x & mask
    for number in range(_FEISTEL_ROUNDS):
        left, right = right, left ^ (_mix(right ^ key ^ np.uint64(number * 0x9E3779B97F4A7C15 % 2**64)) & mask)
    return (left << half) | right


def _words(value: int | Words) -> Words:
    return np.array([value % 2**64], dtype=np.uint64) if isinstance(value, int) else value


def _mix(x: Words) -> Words:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
