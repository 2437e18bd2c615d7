"""The fitted lines of the soak; the soak itself is a command that takes minutes."""

import random
from pathlib import Path

import pytest

from tests.faults.soak import slope_of, soak


def noise(slope: float) -> list[tuple[float, float]]:
    rng = random.Random(1)
    return [(step, 300 + slope * step + rng.gauss(0, 2)) for step in range(5000)]


def test_a_leak_is_seen_and_noise_is_none() -> None:
    leak = slope_of(noise(0.001))
    assert leak.slope - leak.margin > 0.0005 and leak.slope + leak.margin < 0.0015
    flat = slope_of(noise(0))
    assert flat.slope - flat.margin < 0 < flat.slope + flat.margin


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_nothing_grows(tmp_path: Path) -> None:
    """Longer: python -m tests.faults.soak --steps N."""
    _, found = soak(tmp_path, 4000, seconds=3000)
    for name, per_10_000 in {"private_mb": 10.0, "files": 1.0, "threads": 1.0}.items():
        one = found[name]
        assert 10_000 * (one.slope - one.margin) < per_10_000, f"{name}: {one}"
