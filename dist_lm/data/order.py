"""Which sequences make up the global batch of a step: pure integer maths of (seed, step), vectorised over positions.

Position p = step * global_batch + j counts every sequence of the run; j is a place in the global batch and rank(j) =
j mod world. Nothing here knows more of the machine than that one modulo. A sequence is looked up through keyed
permutations, so any position costs O(1) time and memory, and each epoch is a new exact permutation.

Reads stay local: a pass takes the sequences in groups of GROUP random blocks of BLOCK neighbours, and permutes
within a group. So at any moment only a few places of a large dataset are read, and a small dataset is one group.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

BLOCK = 4096  # neighbouring sequences that travel together
GROUP = 8  # blocks that are shuffled into each other
_FEISTEL_ROUNDS = 4
LONGEST_PERIOD = 1000  # positions over which the shares of a mixture are exact

# What a hash is for. Mixed into it, so that no two uses share random bits. Changing one changes every run's data.
FOR_DROPOUT = 1
FOR_EPOCH = 2
FOR_SHORT_BLOCK = 3
FOR_GROUP = 4
FOR_BLOCKS = 5
FOR_STREAM = 5  # of the run's seed, as FOR_BLOCKS is of an epoch's key
FOR_PARTS = 6
FOR_DOCUMENTS = 7
FOR_PACKED_SEQUENCES = 8
FOR_SHARDS_IN_A_MIXTURE = 9


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
    return hash_words(seed, FOR_DROPOUT, positions.astype(np.uint64)).view(np.int64)


def period_of(weights: Sequence[float]) -> list[int]:
    """How many sequences of each source make up a period: exact for weights like .7, .2, .1, else to a thousandth."""
    exact = [Fraction(str(weight)) for weight in weights]
    parts = [weight / sum(exact) for weight in exact]
    size = lcm(*(part.denominator for part in parts))
    if size > LONGEST_PERIOD:
        size = LONGEST_PERIOD
    counts = [int(part * size) for part in parts]
    by_rest = sorted(range(len(parts)), key=lambda i: (counts[i] - parts[i] * size, i))
    for i in by_rest[: size - sum(counts)]:
        counts[i] += 1
    return counts


class MixtureSchedule:
    """Which source each position reads: shares exact over a period, evenly spread in it, stage after stage."""

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]]):
        """`stages`: (first position, weight of each source), the first one from position 0."""
        self.starts = np.array([start for start, _ in stages], np.int64)
        self._patterns: list[Ints] = []  # the sources of a period
        self._ranks: list[Ints] = []  # how many earlier places of the period have the same source
        self._before: list[Ints] = []  # positions of each source before the stage
        before = np.zeros(len(stages[0][1]), np.int64)
        for number, (_, weights) in enumerate(stages):
            counts = period_of(weights)
            sources = np.repeat(np.arange(len(counts)), counts)
            ranks = np.concatenate([np.arange(n) for n in counts])
            due = (2 * ranks + 1) / np.array(counts)[
                sources
            ]  # the middle of its share of the period
            by_time = np.lexsort((sources, due))
            self._patterns.append(sources[by_time])
            self._ranks.append(ranks[by_time])
            self._before.append(before)
            if number + 1 < len(stages):
                before = self.before(stages[number + 1][0], number)

    def before(self, position: int, stage: int | None = None) -> Ints:
        """How many positions before this one each source has."""
        stage = int(np.searchsorted(self.starts, position, "right")) - 1 if stage is None else stage
        pattern, before = self._patterns[stage], self._before[stage]
        rounds, rest = divmod(position - int(self.starts[stage]), len(pattern))
        each, begun = (
            np.bincount(part, minlength=len(before)) for part in (pattern, pattern[:rest])
        )
        total: Ints = before + rounds * each + begun
        return total

    def at(self, positions: Ints) -> tuple[Ints, Ints]:
        """The source of each position, and how many earlier positions of the run had that source."""
        sources, earlier = np.empty_like(positions), np.empty_like(positions)
        stages = np.searchsorted(self.starts, positions, "right") - 1
        for stage in np.unique(stages).tolist():
            here, pattern = stages == stage, self._patterns[stage]
            rounds, place = np.divmod(positions[here] - self.starts[stage], len(pattern))
            sources[here] = pattern[place]
            a_round = np.bincount(pattern, minlength=len(self._before[stage]))
            earlier[here] = (self._before[stage] + rounds[:, None] * a_round)[
                np.arange(len(place)), pattern[place]
            ]
            earlier[here] += self._ranks[stage][place]
        return sources, earlier


def sequence_ids(positions: Ints, count: int, seed: int) -> Ints:
    """The sequence, 0..count-1, at each position of the run; positions count..2*count-1 are the second epoch."""
    epoch, q = np.divmod(positions, count)
    key = hash_words(seed, FOR_EPOCH, epoch.astype(np.uint64))
    full, short = divmod(count, BLOCK)
    places = full + (short > 0)
    # The one shorter block comes at a random place, so that the start of every place has a closed form.
    short_place = (
        (hash_words(key, FOR_SHORT_BLOCK) % np.uint64(places)).astype(np.int64)
        if short
        else np.full_like(q, full)
    )

    def start(place: Ints) -> Ints:
        return place * BLOCK - (place > short_place) * (BLOCK - short)

    def place_of(q: Ints) -> Ints:
        before = short_place * BLOCK
        after = np.where(q < before + short, short_place, (q - short) // BLOCK + 1)
        return np.where(q < before, q // BLOCK, after)

    group = place_of(q) // GROUP
    low, high = start(group * GROUP), start(np.minimum((group + 1) * GROUP, places))
    q = low + permute(q - low, high - low, hash_words(key, FOR_GROUP, group.astype(np.uint64)))
    place = place_of(q)
    offset = q - start(place)
    among_full = np.minimum(place - (place > short_place), max(full - 1, 0))
    block = np.where(
        place == short_place,
        full,
        permute(among_full, np.full_like(q, max(full, 1)), hash_words(key, FOR_BLOCKS)),
    )
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
        left, right = (
            right,
            left ^ (_mix(right ^ key ^ np.uint64(number * 0x9E3779B97F4A7C15 % 2**64)) & mask),
        )
    return (left << half) | right


def _words(value: int | Words) -> Words:
    return np.array([value % 2**64], dtype=np.uint64) if isinstance(value, int) else value


def _mix(x: Words) -> Words:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
