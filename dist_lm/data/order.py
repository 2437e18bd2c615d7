"""The sequences that make up the global batch of a step.

It is integer maths of (seed, step), vectorised over positions. Position p = step * global_batch + j
counts every sequence of the run. j is a place in the global batch, and rank j mod world trains on
it; nothing else here knows the machine. A sequence is looked up through keyed permutations, so
any position costs O(1) time and memory, and each epoch is another exact permutation.

Reads stay local. Sequences that are neighbours on disk form blocks of BLOCK. An epoch shuffles the
blocks, takes GROUP of them at a time, and shuffles the sequences of these into each other. So at
any moment only a few places of a large dataset are read, and a small dataset is one group.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
Numbers = TypeVar("Numbers", int, Ints)

BLOCK = 4096  # neighbouring sequences that travel together
GROUP = 8  # blocks that are shuffled into each other
LONGEST_PERIOD = 1000  # positions over which the shares of a mixture are exact
_FEISTEL_ROUNDS = 4
_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, as splitmix64 has it

# What a hash is for. It is mixed into the hash, so that no two uses share random bits. Changing one
# of these numbers changes every run's data.
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


# --- hashes and permutations


def hash_words(first: int | Words, *more: int | Words) -> Words:
    """64 well-mixed bits from a chain of integers: splitmix64's finalizer after each of them."""
    words = _mix(_words(first))
    for value in more:
        words = _mix(words ^ _words(value))
    return words


def permute(x: Ints, size: Ints, key: Words) -> Ints:
    """A keyed permutation of 0..size-1, elementwise.

    A Feistel network permutes the numbers of the next even count of bits. A result that is not
    below `size` goes through it again until it is, on average less than four times (cycle
    walking, Black and Rogaway 2002).
    """
    bits = np.frexp(np.maximum(size - 1, 1))[1]
    half = ((bits + 1) // 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    limit = size.astype(np.uint64)
    out = _feistel(x.astype(np.uint64), half, mask, key)
    outside = np.flatnonzero(out >= limit)
    while outside.size:
        out[outside] = _feistel(out[outside], half[outside], mask[outside], key[outside])
        outside = outside[out[outside] >= limit[outside]]
    return out.astype(np.int64)


def shuffled(count: int, key: Words) -> list[int]:
    """The numbers 0..count-1 in an order that follows from a key of one word."""
    order: list[int] = permute(np.arange(count), np.full(count, count), key.repeat(count)).tolist()
    return order


def _feistel(x: Words, half: Words, mask: Words, key: Words) -> Words:
    """Permute numbers of 2 * half bits."""
    left = x >> half
    right = x & mask
    for number in range(_FEISTEL_ROUNDS):
        round_key = key ^ np.uint64(number * _GOLDEN_RATIO % 2**64)
        mixed = left ^ (_mix(right ^ round_key) & mask)
        left = right
        right = mixed
    return (left << half) | right


def _words(value: int | Words) -> Words:
    if isinstance(value, int):
        return np.array([value % 2**64], dtype=np.uint64)
    return value


def _mix(x: Words) -> Words:
    """The step and the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    x = x + np.uint64(_GOLDEN_RATIO)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- ranks and rows


def batch_of_step(step: int, stepped_over: Sequence[Sequence[int]]) -> int:
    """The global batch that a step trains on, both counted from 0.

    Without anything to step over it has the step's own number. `stepped_over` has ranges of global
    batches in order, each from its first one to the one after its last.
    """
    batch = step
    for first, stop in stepped_over:
        if first > batch:
            break
        batch += stop - first
    return batch


def batch_after(steps: int, stepped_over: Sequence[Sequence[int]]) -> int:
    """The global batch that follows those of the first `steps` steps, stepped over or not."""
    if steps == 0:
        return 0
    return batch_of_step(steps - 1, stepped_over) + 1


def rank_places(rank: int, world: int, global_batch: int, unit: int = 1) -> Ints:
    """The places j of the global batch that a rank trains on; some ranks may have more.

    The ranks take turns. A turn has `unit` neighbouring places.
    """
    places = np.arange(global_batch, dtype=np.int64)
    ours: Ints = places[rank_of(places, world, unit) == rank]
    return ours


def rank_of(places: Numbers, world: int, unit: int) -> Numbers:
    """The rank that trains on a place of the global batch."""
    return places // unit % world


def row_of(places: Numbers, world: int, unit: int) -> Numbers:
    """Which of its rank's rows a place is."""
    return places // (unit * world) * unit + places % unit


def row_keys(seed: int, positions: Ints) -> Ints:
    """A hash for each row, from which its dropout masks follow, whichever rank computes it."""
    return hash_words(seed, FOR_DROPOUT, positions.astype(np.uint64)).view(np.int64)


# --- the order of prepared sequences


def sequence_ids(positions: Ints, count: int, seed: int) -> Ints:
    """The sequence, 0..count-1, at each position. The second epoch begins at position `count`."""
    epoch, turn = np.divmod(positions, count)
    key = hash_words(seed, FOR_EPOCH, epoch.astype(np.uint64))
    slots = _Slots(count, key)
    turn = _shuffle_within_group(turn, slots, key)
    slot = slots.holding(turn)
    offset = turn - slots.start(slot)
    ids: Ints = _block_in(slot, slots, key) * BLOCK + offset
    return ids


class _Slots:
    """An epoch as a row of slots with one block each: which of its turns 0..count-1 lie where.

    Blocks have BLOCK sequences, but for the last one where BLOCK does not divide the count. That
    shorter block lies in a random slot, the same for the whole epoch, so that the start of every
    slot has a closed form. Arrays have one element for each position that is looked up, because
    positions may be of different epochs.
    """

    def __init__(self, count: int, key: Words):
        self.full_blocks, self.short_length = divmod(count, BLOCK)
        if self.short_length:
            self.number = self.full_blocks + 1
            chosen = hash_words(key, FOR_SHORT_BLOCK) % np.uint64(self.number)
            self.short_slot = chosen.astype(np.int64)
        else:
            self.number = self.full_blocks
            no_slot = self.number  # behind the last one
            self.short_slot = np.full(key.shape, no_slot, np.int64)

    def start(self, slot: Ints) -> Ints:
        """The first turn of a slot."""
        missing = BLOCK - self.short_length
        return slot * BLOCK - (slot > self.short_slot) * missing

    def holding(self, turn: Ints) -> Ints:
        """The slot that a turn lies in."""
        short_start = self.short_slot * BLOCK
        short_end = short_start + self.short_length
        slot_behind = (turn - self.short_length) // BLOCK + 1
        from_short_on = np.where(turn < short_end, self.short_slot, slot_behind)
        return np.where(turn < short_start, turn // BLOCK, from_short_on)


def _shuffle_within_group(turn: Ints, slots: _Slots, key: Words) -> Ints:
    """Permute the turns of each group of GROUP neighbouring slots among themselves."""
    group = slots.holding(turn) // GROUP
    start = slots.start(group * GROUP)
    end = slots.start(np.minimum((group + 1) * GROUP, slots.number))
    group_key = hash_words(key, FOR_GROUP, group.astype(np.uint64))
    return start + permute(turn - start, end - start, group_key)


def _block_in(slot: Ints, slots: _Slots, key: Words) -> Ints:
    """The block in each slot; the full ones are permuted over the slots beside the short one."""
    is_behind_short = slot > slots.short_slot
    # The short slot has no number among the full ones; what it gets here is replaced below.
    number_among_full = np.minimum(slot - is_behind_short, max(slots.full_blocks - 1, 0))
    size = np.full_like(slot, max(slots.full_blocks, 1))
    full_block = permute(number_among_full, size, hash_words(key, FOR_BLOCKS))
    return np.where(slot == slots.short_slot, slots.full_blocks, full_block)


# --- the order of a mixture's sources


def period_of(weights: Sequence[float]) -> list[int]:
    """The number of sequences of each source in a period.

    Exact for weights like .7, .2, .1, whose period is short; others are rounded to a thousandth.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    size = min(lcm(*(share.denominator for share in shares)), LONGEST_PERIOD)
    counts = [int(share * size) for share in shares]
    # Rounding down left some places. They go to the sources that lost most by it.
    losses = [share * size - count for share, count in zip(shares, counts, strict=True)]
    most_lost_first = sorted(range(len(shares)), key=lambda source: (-losses[source], source))
    for source in most_lost_first[: size - sum(counts)]:
        counts[source] += 1
    return counts


class MixtureSchedule:
    """The source of each position. Shares are exact over a period and evenly spread in it, stage
    after stage.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]]):
        """`stages`: (first position, weight of each source) in order, the first one from position
        0.
        """
        self._stages: list[_Stage] = []
        before = np.zeros(len(stages[0][1]), np.int64)
        for start, weights in stages:
            if self._stages:
                before = self._stages[-1].before(start)
            self._stages.append(_Stage(start, weights, before))
        self._starts = np.array([stage.start for stage in self._stages], np.int64)

    def before(self, position: int) -> Ints:
        """The number of positions before this one that each source has."""
        return self._stages[int(self._numbers(position))].before(position)

    def at(self, positions: Ints) -> tuple[Ints, Ints]:
        """The source of each position, and how many earlier positions of the run had it."""
        sources = np.empty_like(positions)
        earlier = np.empty_like(positions)
        numbers = self._numbers(positions)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            sources[here], earlier[here] = self._stages[number].at(positions[here])
        return sources, earlier

    def _numbers(self, positions: int | Ints) -> Ints:
        """The stage of each position."""
        return np.asarray(np.searchsorted(self._starts, positions, "right")) - 1


class _Stage:
    """The positions from `start` on, whose sources repeat one pattern."""

    def __init__(self, start: int, weights: Sequence[float], before: Ints):
        self.start = start
        self._before = before  # positions of each source before this stage
        self._counts = np.array(period_of(weights), np.int64)  # of each source in a period
        sources = np.repeat(np.arange(len(self._counts)), self._counts)
        nth = np.concatenate([np.arange(count) for count in self._counts])
        # A source's nth sequence is due in the middle of the nth of equal parts of the period.
        due = (2 * nth + 1) / self._counts[sources]
        by_time = np.lexsort((sources, due))
        self._pattern: Ints = sources[by_time]  # the source of each place of a period
        self._nth: Ints = nth[by_time]  # how many earlier places of the period have the same source

    def before(self, position: int) -> Ints:
        """Positions of each source before this one, which is in the stage or ends it."""
        rounds, place = divmod(position - self.start, len(self._pattern))
        begun = np.bincount(self._pattern[:place], minlength=len(self._counts))
        total: Ints = self._before + rounds * self._counts + begun
        return total

    def at(self, positions: Ints) -> tuple[Ints, Ints]:
        """The source of each position, and how many earlier positions of the run had it."""
        since_start = positions - self.start
        rounds = since_start // len(self._pattern)
        place = since_start % len(self._pattern)
        sources = self._pattern[place]
        earlier: Ints = self._before[sources] + rounds * self._counts[sources] + self._nth[place]
        return sources, earlier
