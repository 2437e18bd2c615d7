"""Order: exact epochs, no dependence on the machine, O(1) at any position."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.data import order
from dist_lm.data.order import permute, rank_places, row_keys, sequence_ids

COUNTS = st.one_of(st.integers(1, 300), st.integers(4000, 4200), st.integers(32_000, 41_000))


@settings(deadline=None)
@given(count=COUNTS, seed=st.integers(0, 2**63), epoch=st.integers(0, 2**20))
def test_every_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    ids = sequence_ids(np.arange(epoch * count, (epoch + 1) * count), count, seed)
    assert np.array_equal(np.sort(ids), np.arange(count))


@settings(deadline=None, max_examples=30)
@given(
    count=COUNTS, seed=st.integers(0, 2**32), start=st.integers(0, 10**6), length=st.integers(1, 50)
)
def test_a_position_is_looked_up_alone_as_in_a_batch(
    count: int, seed: int, start: int, length: int
) -> None:
    positions = np.arange(start, start + length)
    alone = []
    for n in range(length):
        alone += sequence_ids(positions[n : n + 1], count, seed).tolist()
    assert sequence_ids(positions, count, seed).tolist() == alone


@settings(deadline=None)
@given(batch=st.integers(1, 200), world=st.integers(1, 64))
def test_places_of_all_ranks_are_the_global_batch(batch: int, world: int) -> None:
    places = np.concatenate([rank_places(rank, world, batch) for rank in range(world)])
    assert np.array_equal(np.sort(places), np.arange(batch))


def test_1024_ranks_cover_every_sequence_once() -> None:
    batch = 1500
    count = 6_000
    world = 1024
    seen = np.zeros(count, dtype=np.int64)
    for step in range(count // batch):
        for rank in range(world):
            positions = step * batch + rank_places(rank, world, batch)
            np.add.at(seen, sequence_ids(positions, count, 5), 1)
    assert (seen == 1).all()


def test_epochs_and_seeds_shuffle_differently() -> None:
    def order_of(epoch: int, seed: int) -> np.ndarray:
        return sequence_ids(np.arange(epoch * 1000, (epoch + 1) * 1000), 1000, seed)

    orders = [order_of(0, 1), order_of(1, 1), order_of(0, 2), np.arange(1000)]
    for a, b in combinations(orders, 2):
        assert np.mean(a == b) < 0.01  # chance: 0.001


def test_shuffling_is_thorough() -> None:
    """The place in the epoch says nothing about the sequence: they do not correlate."""
    ids = sequence_ids(np.arange(20_000), 20_000, 3)
    assert abs(np.corrcoef(np.arange(20_000), ids)[0, 1]) < 0.03
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.03


def test_reads_stay_local() -> None:
    """At any moment few blocks of a large dataset are read; which ones is shuffled too."""
    ids = sequence_ids(np.arange(5_000_000, 5_010_000), 10**9, 3)
    blocks = np.unique(ids // order.BLOCK)
    assert len(blocks) <= 16
    assert blocks.max() - blocks.min() > 10_000  # of 244,141


@settings(deadline=None)
@given(size=st.integers(1, 500), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    out = permute(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert np.array_equal(np.sort(out), np.arange(size))


def test_the_order_never_changes_between_versions() -> None:
    """A run must resume under a later dist_lm: these numbers are a promise."""
    assert sequence_ids(np.arange(6), 100_000, 7).tolist() == GOLDEN
    assert row_keys(1, np.arange(2)).tolist() == [6301985355436268297, 8112600223918159332]


GOLDEN = [8448, 11655, 50305, 51161, 50210, 66425]


@pytest.mark.parametrize("position", [0, 10**12, 2**50])
def test_far_positions_cost_the_same(position: int) -> None:
    assert 0 <= int(sequence_ids(np.array([position]), 10**9 + 7, 1)[0]) < 10**9 + 7
