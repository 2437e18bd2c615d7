"""The long form of these tests: it keeps its place, and runs by name only."""

from pathlib import Path

import pytest

from tests.faults import campaign
from tests.faults.fuzz import Report


def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after some inputs, it feeds the next ones, and keeps what was found."""
    fed: list[tuple[int, int]] = []

    def feed(target: str, first: int, count: int, seconds: float) -> Report:
        fed.append((first, count))
        return Report(inputs=min(4, count), findings={"a finding": [1, first]})

    monkeypatch.setattr(campaign, "fuzz", feed)
    monkeypatch.setattr(campaign, "INPUTS", 10)
    monkeypatch.setattr(campaign, "pieces", lambda _: {"fuzz x": campaign.fuzz_turn("x")})
    place = tmp_path / "place.json"
    campaign.go_on(place, seconds=0.0, only=[])
    assert fed == []
    campaign.go_on(place, seconds=60, only=[])
    assert fed == [(0, 10), (4, 6), (8, 2)]
    campaign.go_on(place, seconds=60, only=[])  # nothing is left
    places = campaign.read_places(place)
    assert len(fed) == 3 and places["fuzz x"].findings == {"a finding": [3, 0]}
    assert "| fuzz x | 10 | 10 |" in campaign.report(places)


@pytest.mark.campaign
@pytest.mark.timeout(24 * 3600)
@pytest.mark.parametrize("seconds", [3600])
def test_an_hour_of_all_pieces(tmp_path: Path, seconds: float) -> None:
    """Longer: python -m tests.faults.campaign --seconds N --place FILE."""
    campaign.go_on(tmp_path / "place.json", seconds, only=[])
    places = campaign.read_places(tmp_path / "place.json")
    print(campaign.report(places))
    assert {name: place.findings for name, place in places.items() if place.findings} == {}
